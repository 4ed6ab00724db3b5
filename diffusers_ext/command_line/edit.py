"""`diffusers-ext edit`: other words for a concept, without training; `evaluate edit`: what came of it."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ext.command_line.evaluate import Evaluation, load_loras, name_subject
from diffusers_ext.command_line.options import (
    Command,
    Outcome,
    add_base_model_arguments,
    add_hub_arguments,
    check_hub_arguments,
    chosen_device,
    hub_arguments,
    load_base_pipeline,
    load_features,
    picture_arguments,
)
from diffusers_ext.evaluation.settings import EditingSettings

if TYPE_CHECKING:
    from diffusers_ext.evaluation.editing import EditingReport
    from diffusers_ext.nullspace.edit_prompts import ConceptEdit
    from diffusers_ext.nullspace.edit_report import EditReport

_WEIGHTED = re.compile(r"\s*(\d*\.?\d+)\s+(\S.*?)\s*")


def _add_edit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "edits",
        nargs="+",
        metavar="TARGET[=ANCHOR]",
        help="a concept and the words to be read in its place; without = the concept of the preserved prompts that is "
        'read most like it, with nothing behind = the empty prompt; "0.5 nine + 0.5 one" is a mixture',
    )
    parser.add_argument(
        "--preserve",
        required=True,
        help="file of the prompts to keep, one a line, # comments, or a table; those that name a target are edited",
    )
    parser.add_argument(
        "--earlier",
        nargs="+",
        default=(),
        metavar="FOLDER",
        help="edits made before, beside whose LoRAs the new one is to be loaded, the first one first",
    )
    parser.add_argument("--output_dir", required=True, help="folder of the LoRA and its report")
    parser.add_argument("--dry_run", action="store_true", help="say what the edit would do, and write nothing")
    group = parser.add_argument_group("how")
    group.add_argument("--preserve_weight", type=float, default=1.0, help="more keeps more of the preserved prompts")
    group.add_argument("--eps", type=float, default=1e-4, help="price of large weights")
    group.add_argument("--hard", action="store_true", help="exact: change nothing at all for the preserved prompts")
    group.add_argument("--kept", type=float, default=0.999, help="share of the edit that the rank keeps")
    group.add_argument("--no_sub_phrases", action="store_true", help="preserve the prompts as they are, and no parts")
    group.add_argument("--negative_prompt", default="", help="that pictures will be drawn with")
    add_base_model_arguments(parser)
    add_hub_arguments(parser, "LoRA")


def _run_edit(args: argparse.Namespace) -> Outcome:
    from diffusers_ext.core.result_folder import staged_output
    from diffusers_ext.core.sources import lora_file
    from diffusers_ext.nullspace.edit import REPORT_NAME, edit_concept
    from diffusers_ext.nullspace.prompts import read_prompts_file

    edits: dict[str, Any] = {}
    for text in args.edits:
        target, sign, anchor = text.partition("=")
        if target.strip() in edits:
            raise ValueError(f"`edits` must name each target once, got {target.strip()!r} again.")
        edits[target.strip()] = _read_anchor(anchor.strip()) if sign else None
    prompts = read_prompts_file(args.preserve)
    check_hub_arguments(args)
    names = ("negative_prompt", "preserve_weight", "eps", "hard", "kept")
    options = {name: getattr(args, name) for name in names}
    earlier = [edit for folder in args.earlier for edit in _read_edit(folder)[0]]
    loras = [lora_file(folder) for folder in args.earlier]
    pipeline = load_base_pipeline(args)
    if loras:  # part of the weights from here on
        load_loras(pipeline, args.earlier, loras, "earlier")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    result = edit_concept(
        pipeline, edits, prompts, earlier=earlier, expand_sub_phrases=not args.no_sub_phrases, **options
    )
    words = _forecast(result.report, result.told)
    facts = {"output_dir": args.output_dir, "edits": result.told, **asdict(result.report)}
    if args.dry_run:
        return Outcome({**facts, "dry_run": True}, "\n".join([*words, "Wrote nothing."]))
    base = args.base_model or args.pretrained_model_name_or_path
    with staged_output(args.output_dir, last=(REPORT_NAME,)) as folder:
        result.save(folder, base_model=base)
    words.append(f"Wrote {args.output_dir}")
    if args.push_to_hub:
        facts["url"] = result.push_to_hub(**{**hub_arguments(args), "base_model": base})
        words.append(f"Pushed: {facts['url']}")
    return Outcome(facts, "\n".join(words))


def _read_edit(source: str) -> tuple[list[ConceptEdit], list[str], dict[str, Any]]:
    """`read_edit` of a folder or a repository."""
    from diffusers_ext.core.sources import artifact_file
    from diffusers_ext.nullspace.edit import REPORT_NAME, read_edit

    return read_edit(artifact_file(source, REPORT_NAME, None, {}).parent)


def _read_anchor(text: str) -> str | dict[str, float]:
    """Words, or the mixture of `"0.5 nine + 0.5 one"`."""
    parts = [_WEIGHTED.fullmatch(part) for part in text.split("+")]
    return {part[2]: float(part[1]) for part in parts} if len(parts) > 1 and all(parts) else text


def _forecast(report: EditReport, told: dict[str, str]) -> list[str]:
    """What is known without a picture."""
    rows = report.layers
    named = {prompt for row in report.concepts if not row["own_prompts"] for prompt in row["named"]}
    return [
        *(f"{target} is read as {anchor or 'the empty prompt'}." for target, anchor in told.items()),
        f"{len(rows)} Linears that read text alone, of ranks up to {max(row['rank'] for row in rows)}, make up "
        f"{100 * min(row['achieved'] for row in rows):.1f} % or more of the edit each; their predicted drift on "
        f"{report.preserved_prompts} preserved prompts is {max(row['drift'] for row in rows):.3g} at most. "
        f"{report.edited_prompts} prompts are edited, {len(named)} of the given ones among them because they name a "
        f"target. Solved for in {report.seconds:.1f} s. Nothing was drawn.",
        "Preserved prompts that move most: "
        + ", ".join(f"{prompt!r} {drift:.3g}" for prompt, drift in report.most_moved.items()),
        *report.warnings,
    ]


EDIT = Command(
    "edit",
    "let a model read other words for a concept, without training",
    "Change in closed form what the denoiser reads for a concept, and keep what it reads for the preserved prompts. "
    "The result is an ordinary LoRA; its scale is a dial.",
    (
        "edit three=nine --preserve prompts.txt --output_dir outputs/no_three "
        "--pretrained_model_name_or_path examples/digits/model",
        "edit seven --earlier outputs/no_three --preserve prompts.txt --output_dir outputs/no_seven "
        "--pretrained_model_name_or_path examples/digits/model",
        "edit three --preserve prompts.txt --output_dir outputs/no_three --dry_run "
        "--pretrained_model_name_or_path examples/digits/model",
    ),
    _add_edit_arguments,
    _run_edit,
    output="output_dir",
    result_names=("edit_report.json",),
)


def compare_edit(settings: EditingSettings, show_progress: bool = True) -> EditingReport:
    """Draw a model with and without an edit, judge, measure and write."""
    from diffusers_ext.core.result_folder import staged_output
    from diffusers_ext.core.sources import lora_file
    from diffusers_ext.evaluation.editing import evaluate_edit
    from diffusers_ext.evaluation.judges import load_judge
    from diffusers_ext.nullspace.prompts import read_prompts_file

    edits, preserve, _ = _read_edit(settings.edit)
    if settings.preserve is not None:
        preserve = read_prompts_file(settings.preserve)
    unseen = read_prompts_file(settings.unseen_prompts) if settings.unseen_prompts else []
    judge = None if settings.judge is None else load_judge(settings.judge)
    file = lora_file(settings.edit)
    pipeline = load_base_pipeline(settings)
    load_loras(pipeline, [settings.edit], [file], "edit")
    report = evaluate_edit(
        pipeline,
        edits,
        preserve,
        unseen_prompts=unseen,
        judge=judge,
        max_prompts=settings.max_prompts,
        show_progress=show_progress,
        **load_features(settings, chosen_device(settings)),
        **picture_arguments(settings),
    )
    name_subject(report, settings, "pretrained_model_name_or_path", "edit", "judge", "dino", "clip")
    with staged_output(Path(settings.output_dir)) as folder:
        report.save(folder)
    return report


EVALUATE_EDIT = Evaluation(EditingSettings, compare_edit, "NULL_SPACE_RUNS", table=(("per_prompt", False),)).command(
    "evaluate edit",
    "a model with and without an edit of its knowledge: what is gone, what was kept",
    "Draw the same prompts from the same seeds with an edit and without: prompts that name its targets, the same in "
    "words that it does not know, and those that were to be kept. Writes report.json, table.md and sheet.png.",
    (
        "evaluate edit --pretrained_model_name_or_path examples/digits/model --edit outputs/no_three "
        "--judge examples.digits.judge:DigitsJudge --output_dir evaluation",
    ),
)
