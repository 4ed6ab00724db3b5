"""`diffusers-ext edit`: let a model read other words where a prompt names a concept, without training."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from diffusers_ext.command_line.options import Command, Outcome, add_base_model_arguments, load_base_pipeline


def _add_edit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "edits",
        nargs="+",
        metavar="TARGET[=ANCHOR]",
        help="a concept and the words to be read in its place; without = the concept of the preserved prompts that is "
        "read most like it, with nothing behind = the empty prompt",
    )
    parser.add_argument("--preserve", required=True, help="file of the prompts to keep, one a line, or a table")
    parser.add_argument("--output_dir", required=True, help="folder of the LoRA and its report")
    group = parser.add_argument_group("how")
    group.add_argument("--preserve_weight", type=float, default=1.0, help="more keeps more of the preserved prompts")
    group.add_argument("--eps", type=float, default=1e-4, help="price of large weights")
    group.add_argument("--hard", action="store_true", help="exact: change nothing at all for the preserved prompts")
    group.add_argument("--kept", type=float, default=0.9999, help="share of the edit that the rank keeps")
    group.add_argument("--no_sub_phrases", action="store_true", help="preserve the prompts as they are, and no parts")
    group.add_argument("--negative_prompt", default="", help="that pictures will be drawn with")
    add_base_model_arguments(parser)


def _run_edit(args: argparse.Namespace) -> Outcome:
    from diffusers_ext.nullspace.edit import edit_concept
    from diffusers_ext.nullspace.prompts import read_prompts_file

    edits = {}
    for text in args.edits:
        target, sign, anchor = text.partition("=")
        if target.strip() in edits:
            raise ValueError(f"`edits` must name each target once, got {target.strip()!r} again.")
        edits[target.strip()] = anchor.strip() if sign else None
    prompts = read_prompts_file(args.preserve)
    pipeline = load_base_pipeline(args)
    result = edit_concept(
        pipeline,
        edits,
        prompts,
        negative_prompt=args.negative_prompt,
        preserve_weight=args.preserve_weight,
        eps=args.eps,
        hard=args.hard,
        kept=args.kept,
        expand_sub_phrases=not args.no_sub_phrases,
    )
    result.save(args.output_dir, base_model=args.pretrained_model_name_or_path)
    rows = result.report.layers
    words = [
        f"{len(rows)} Linears that read text alone, of ranks up to {max(row['rank'] for row in rows)}, make up "
        f"{100 * min(row['achieved'] for row in rows):.1f} % or more of the edit each; their predicted drift on "
        f"{result.report.preserved_prompts} preserved prompts is {max(row['drift'] for row in rows):.3g} at most. "
        "Nothing was drawn.",
        "Preserved prompts that move most: "
        + ", ".join(f"{prompt!r} {drift:.3g}" for prompt, drift in result.report.most_moved.items()),
        f"Wrote {args.output_dir}",
    ]
    return Outcome({"output_dir": args.output_dir, "edits": result.told, **asdict(result.report)}, "\n".join(words))


EDIT = Command(
    "edit",
    "let a model read other words for a concept, without training",
    "Change in closed form what the denoiser reads for a concept, and keep what it reads for the preserved prompts. "
    "The result is an ordinary LoRA; its scale is a dial.",
    (
        "edit three=nine --preserve prompts.txt --output_dir outputs/no_three "
        "--pretrained_model_name_or_path examples/digits/model",
    ),
    _add_edit_arguments,
    _run_edit,
    output="output_dir",
    result_names=("edit_report.json",),
)
