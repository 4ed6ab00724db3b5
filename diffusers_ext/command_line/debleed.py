"""`diffusers-ext debleed`: take out of a LoRA what acts on preserved prompts; `interference`: of several, tell it."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ext.command_line.options import Command, Outcome, add_base_model_arguments, load_base_pipeline

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from diffusers_ext.nullspace.statistics import FeatureStatistics


_CRITERIA = {
    "damping": "smooth: the smaller, the nearer to a hard cut; 1e-3 without prompts of the subject",
    "energy": "cut off directions with up to this share of the energy",
    "rank": "keep so many directions",
    "threshold": "keep directions below this eigenvalue",
    "percentile": "keep this percentage of the directions",
}
_MEASURED = (
    "Drawn with {prompts} preserved prompts from the same seeds, {num_inference_steps} steps: mean drift of "
    "pixels (0 to 1) from the base {before:.4g} with the LoRA as it was, {after:.4g} with the result; base "
    "against itself {floor:.3g}."
)
_USUAL_DAMPING, _USUAL_STRICTNESS = 1e-3, 10.0


def _add_debleed_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("lora", help="file, folder or Hub name")
    parser.add_argument("--weight_name", help="of the LoRA's file in a folder or repository")
    parser.add_argument("--output_path", "--output", required=True, help="ends in .safetensors")
    parser.add_argument("--format", choices=["diffusers", "kohya"], default="diffusers")
    group = parser.add_argument_group("what to protect")
    _add_statistics_arguments(group)
    group.add_argument(
        "--uncovered",
        choices=["error", "keep", "drop"],
        default="error",
        help="what to do with modules that the statistics do not cover",
    )
    group.add_argument(
        "--text_encoders",
        action="store_true",
        help="also project what the LoRA changes in text encoders; the base model reads the statistics' prompts again",
    )
    group = parser.add_argument_group("what to keep of the LoRA")
    group.add_argument("--instance_prompt", action="append", default=[], help="asks for its subject; may be repeated")
    group.add_argument("--strictness", type=float, help="more protects more and keeps less of it; 10 without it")
    group = parser.add_argument_group("without prompts of the subject, what to cut off")
    exclusive = group.add_mutually_exclusive_group()
    for name, explanation in _CRITERIA.items():
        kind = int if name == "rank" else float
        exclusive.add_argument(f"--{name}", type=kind, help=explanation)
    group = parser.add_argument_group("drawing, to measure")
    group.add_argument(
        "--measure",
        nargs="?",
        type=int,
        const=8,
        help="draw this many preserved prompts (8) with the base, the LoRA and the result",
    )
    group.add_argument("--num_inference_steps", type=int, default=25, help="of each picture")
    add_base_model_arguments(parser, required=False)


def _add_statistics_arguments(group: Any) -> None:
    group.add_argument("--statistics", required=True, help="folder or Hub name, of `collect`")
    group.add_argument("--statistics_subfolder", help="folder inside that")
    group.add_argument("--statistics_revision", help="on the Hub")


def _load_statistics(args: argparse.Namespace) -> FeatureStatistics:
    from diffusers_ext.nullspace.statistics import FeatureStatistics

    return FeatureStatistics.from_pretrained(
        args.statistics, subfolder=args.statistics_subfolder, revision=args.statistics_revision
    )


def _run_debleed(args: argparse.Namespace) -> Outcome:
    from diffusers_ext.core.sources import lora_file
    from diffusers_ext.families.lora_files import check_output_path, export_lora, kept_metadata, read_lora_file
    from diffusers_ext.nullspace.debleed import (
        debleed_lora,
        preserved_energy,
        relative_drift,
        uncovered_modules,
        with_text_encoders,
    )

    check_output_path(args.output_path)
    statistics = _load_statistics(args)
    lora, metadata = read_lora_file(lora_file(args.lora, args.weight_name))
    criterion = _criterion(args)
    subject: dict[str, Any] = {"instance_prompts": args.instance_prompt, "text_encoders": args.text_encoders}
    if args.instance_prompt or args.text_encoders:
        subject["pipeline"] = _base_pipeline(args, statistics.facts.get("base_model"))
    projected_by = with_text_encoders(statistics, subject["pipeline"], lora) if args.text_encoders else statistics
    left_out = uncovered_modules(lora, projected_by)
    projected = debleed_lora(lora, statistics, uncovered=args.uncovered, **subject, **criterion)
    export_lora(projected, args.format, args.output_path, metadata=kept_metadata(metadata))
    before, after = (preserved_energy(tensors, projected_by) for tensors in (lora, projected))
    left = {name: after.get(name, 0.0) / energy for name, energy in before.items() if energy > 0}
    share = sum(after.values()) / sum(before.values()) if left else None
    facts: dict[str, Any] = {
        "output_path": args.output_path,
        "format": args.format,
        "criterion": criterion,
        "modules": sum(key.endswith(".lora_A.weight") for key in lora),
        "covered_modules": len(before),
        "uncovered_modules": left_out,
        "uncovered": args.uncovered if left_out else None,
        "drift_left": share,
        "drift_left_by_module": left,
    }
    words = [debleed_verdict(len(before), left, share, left_out, args.uncovered)]
    if args.text_encoders:
        drifts = [relative_drift(tensors, projected_by, subject["pipeline"]) for tensors in (lora, projected)]
        facts["predicted_drift"] = {name: [drift, drifts[1].get(name, 0.0)] for name, drift in drifts[0].items()}
        words.append(text_encoder_words(facts["predicted_drift"]))
    if args.measure:
        pipeline = subject.get("pipeline")
        facts["measured_drift"] = measured = _measure(args, pipeline, statistics, lora, projected)
        words.append(_MEASURED.format(**measured))
    return Outcome(facts, "\n".join([*words, f"Wrote {args.output_path}"]))


def text_encoder_words(drifts: Mapping[str, Sequence[float]]) -> str:
    """Of the modules in text encoders among `{name: predicted drift before and after}`, one line each."""
    told = {name: pair for name, pair in drifts.items() if name.startswith("text_encoder")}
    if not told:
        return "The LoRA changes no text encoder."
    lines = [f"  {name}: {before:.3g} -> {after:.3g}" for name, (before, after) in told.items()]
    return "\n".join(["Predicted drift of what text encoders give for preserved prompts:", *lines])


def _criterion(args: argparse.Namespace) -> dict[str, float]:
    """How to project, as the command line says it."""
    if args.measure is not None and (args.measure < 1 or args.num_inference_steps < 1):
        raise ValueError(
            f"`measure` and `num_inference_steps` must be at least 1, got {args.measure} and "
            f"{args.num_inference_steps}."
        )
    criterion = {name: getattr(args, name) for name in _CRITERIA if getattr(args, name) is not None}
    if args.instance_prompt and criterion:
        raise ValueError(
            f"`{next(iter(criterion))}` must not be given with `instance_prompt`, got both. Give `strictness` with it."
        )
    if args.strictness is not None and not args.instance_prompt:
        raise ValueError("`instance_prompt` must be given with `strictness`, got none.")
    if args.instance_prompt:
        return {"strictness": _USUAL_STRICTNESS if args.strictness is None else args.strictness}
    return criterion or {"damping": _USUAL_DAMPING}


def _measure(
    args: argparse.Namespace,
    pipeline: DiffusionPipeline | None,
    statistics: FeatureStatistics,
    lora: dict[str, torch.Tensor],
    projected: dict[str, torch.Tensor],
) -> dict[str, float]:
    """Drift of pictures of preserved prompts from the base's, of the LoRA as it was and of the result."""
    from diffusers_ext.evaluation.forgetting import PRESERVED, evaluate_forgetting

    pipeline = pipeline or _base_pipeline(args, statistics.facts.get("base_model"))
    statistics.check_pipeline(pipeline)
    prompts = [prompt for prompt in statistics.facts["prompts"] if prompt][: args.measure]
    if not prompts:
        raise ValueError("`statistics` must name their prompts with `measure`, got none.")
    found: dict[str, float] = {"prompts": len(prompts), "num_inference_steps": args.num_inference_steps}
    for name, tensors in (("before", lora), ("after", projected)):
        pipeline.load_lora_weights(dict(tensors), adapter_name=name)
        try:
            report = evaluate_forgetting(
                pipeline,
                None,
                prompts,
                num_images_per_prompt=1,
                seed=args.seed,
                num_inference_steps=args.num_inference_steps,
                show_progress=False,
            )
        finally:
            pipeline.delete_adapters(name)
        found[name] = report.summary[PRESERVED]["pixel_drift"]
        found["floor"] = report.drift_floor
    return found


def _base_pipeline(args: argparse.Namespace, collected_on: str | None) -> DiffusionPipeline:
    """The model that reads the subject's prompts: the one named, else that of the statistics."""
    source = args.pretrained_model_name_or_path or collected_on
    if not source:
        raise ValueError(
            "`pretrained_model_name_or_path` must be given with `instance_prompt` or `measure`, got None, "
            "and the statistics do not name their base model."
        )
    return load_base_pipeline(argparse.Namespace(**{**vars(args), "pretrained_model_name_or_path": source}))


def debleed_verdict(
    covered: int, left: dict[str, float], share: float | None, left_out: Sequence[str], uncovered: str
) -> str:
    """What was done, over which modules, and what nobody looked at.

    Args:
        covered: modules with a statistic; all of them were projected.
        left: share of its predicted drift that each of them keeps; those without any are left out.
        share: the same over all of them; `None` where none had any.
        left_out: modules without a statistic, with their component; `uncovered` is what was done with these.
    """
    if not covered:
        told = "Nothing was projected: the statistics cover no module of the LoRA."
    elif share is None:
        told = f"The {covered} modules that the statistics cover do not act on preserved prompts."
        if not left_out:
            told = "The LoRA does not act on what is preserved: nothing had to be taken out of it."
    else:
        worst = max(left, key=left.get)
        told = (
            f"The predicted drift on preserved prompts fell to {100 * share:.3g} % of what it was, over "
            f"{len(left)} modules; the worst of them, {worst}, keeps {100 * left[worst]:.3g} %."
        )
    if not left_out:
        return told
    counts = Counter(name.partition(".")[0] for name in left_out)
    where = ", ".join(f"{count} in {component}" for component, count in sorted(counts.items()))
    if uncovered == "drop":
        return f"{told} Modules without a statistic were removed: {where}."
    told += (
        f" Not covered: {len(left_out)} modules without a statistic were kept as they were and not "
        f"measured ({where}), so pictures of preserved prompts may move as before. Draw them with "
        "--measure, collect more --features, or pass --uncovered drop."
    )
    if any(component.startswith("text_encoder") for component in counts):
        told += " A text encoder that changes also changes what the projected modules read; pass --text_encoders."
    return told


DEBLEED = Command(
    "debleed",
    "take out of a LoRA what acts on preserved prompts",
    "Project a trained LoRA so that preserved prompts keep their pictures, without training. With prompts "
    "that ask for its subject, the subject is kept.",
    (
        'debleed my_lora.safetensors --statistics statistics --instance_prompt "a photo of sks dog" '
        "--output_path quieter.safetensors",
        "debleed user/lora --statistics user/statistics --energy 1e-4 --uncovered keep "
        "--format kohya --output_path quieter.safetensors",
    ),
    _add_debleed_arguments,
    _run_debleed,
    output="output_path",
)


def _add_interference_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("loras", nargs="+", metavar="LORA", help="two or more files, folders or Hub names")
    group = parser.add_argument_group("what they are for")
    group.add_argument(
        "--instance_prompt",
        action="append",
        default=[],
        help="asks for the subject of a LoRA: once for each of them, in their order; the trigger phrases that the "
        "files name without it",
    )
    group.add_argument("--weights", type=float, nargs="+", default=[], help="of the adapters, in their order; 1 each")
    group = parser.add_argument_group("what is preserved")
    _add_statistics_arguments(group)
    group.add_argument("--text_encoders", action="store_true", help="also what LoRAs change in text encoders")
    add_base_model_arguments(parser, required=False)


def _run_interference(args: argparse.Namespace) -> Outcome:
    from diffusers_ext.core.sources import lora_file
    from diffusers_ext.families.lora_files import read_lora_file
    from diffusers_ext.nullspace.interference import interference_report

    names = [Path(source).stem for source in args.loras]
    for flag, values in (("instance_prompt", args.instance_prompt), ("weights", args.weights)):
        if values and len(values) != len(names):
            raise ValueError(f"`{flag}` must be given for each of {len(names)} LoRAs, got {len(values)}.")
    if len({*names}) < len(names):
        raise ValueError(f"`loras` must have names of their own, got {names}. Rename a file.")
    statistics, loras, prompts = _load_statistics(args), {}, {}
    for index, (name, source) in enumerate(zip(names, args.loras)):
        loras[name], metadata = read_lora_file(lora_file(source))
        prompt = args.instance_prompt[index] if args.instance_prompt else metadata.get("modelspec.trigger_phrase")
        if not prompt:
            raise ValueError(f"`instance_prompt` must be given, got none, and {source} names no trigger phrase.")
        prompts[name] = [prompt]
    pipeline = _base_pipeline(args, statistics.facts.get("base_model"))
    weights = dict(zip(names, args.weights))
    report = interference_report(
        pipeline, loras, statistics, prompts, weights=weights, text_encoders=args.text_encoders
    )
    words = [
        report.to_table(),
        f"Relative change of what {len(report.linears)} Linears give, told by the statistics; nothing was drawn. The "
        "share of a subject is that of what its own LoRA moves there.",
    ]
    for name, modules in report.uncovered.items():
        if modules:
            words.append(f"Not covered: {len(modules)} modules of {name} without a statistic, such as {modules[0]}.")
    return Outcome({"prompts": prompts, "weights": weights, **asdict(report)}, "\n".join(words))


INTERFERENCE = Command(
    "interference",
    "say how far LoRAs that are used together disturb each other",
    "Tell, before a picture is drawn, how far each of several LoRAs moves what the base model reads for the subjects "
    "of the others and for the preserved prompts, by pairs and all together, and what directions they share.",
    (
        'interference dog.safetensors cat.safetensors --instance_prompt "a photo of sks dog" '
        '--instance_prompt "a photo of zwx cat" --statistics statistics',
        "interference user/dog user/cat --statistics user/statistics --weights 1 0.7 --json",
    ),
    _add_interference_arguments,
    _run_interference,
)
