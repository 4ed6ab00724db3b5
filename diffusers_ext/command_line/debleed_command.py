"""`diffusers-ext debleed`: take out of a LoRA what acts on preserved prompts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from diffusers_ext.command_line.base_pipeline import add_base_model_arguments, load_base_pipeline
from diffusers_ext.command_line.command import Command, Outcome
from diffusers_ext.command_line.lora_source import locate_lora


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


_CRITERIA = {
    "damping": "smooth: the smaller, the nearer to a hard cut; 1e-3 without prompts of the subject",
    "energy": "cut off directions with up to this share of the energy",
    "rank": "keep so many directions",
    "threshold": "keep directions below this eigenvalue",
    "percentile": "keep this percentage of the directions",
}
_USUAL_DAMPING, _USUAL_STRICTNESS = 1e-3, 10.0


def add_debleed_arguments(parser: argparse.ArgumentParser) -> None:
    """A LoRA, what it must leave alone, and how strictly."""
    parser.add_argument("lora", help="file, folder or Hub name")
    parser.add_argument("--weight_name", help="of the LoRA's file in a folder or repository")
    parser.add_argument("--output_path", "--output", required=True, help="ends in .safetensors")
    parser.add_argument("--format", choices=["diffusers", "kohya"], default="diffusers")
    group = parser.add_argument_group("what to protect")
    group.add_argument("--statistics", required=True, help="folder or Hub name, of `collect`")
    group.add_argument("--statistics_subfolder", help="folder inside that")
    group.add_argument("--statistics_revision", help="on the Hub")
    group.add_argument(
        "--uncovered",
        choices=["error", "keep", "drop"],
        default="error",
        help="what to do with modules that the statistics do not cover",
    )
    group = parser.add_argument_group("what to keep of the LoRA")
    group.add_argument(
        "--instance_prompt",
        action="append",
        default=[],
        help="asks for its subject; may be repeated",
    )
    group.add_argument(
        "--strictness",
        type=float,
        help="more protects more and keeps less of it; 10 without it",
    )
    group = parser.add_argument_group("without prompts of the subject, what to cut off")
    exclusive = group.add_mutually_exclusive_group()
    for name, explanation in _CRITERIA.items():
        kind = int if name == "rank" else float
        exclusive.add_argument(f"--{name}", type=kind, help=explanation)
    add_base_model_arguments(parser, required=False)


def run_debleed(args: argparse.Namespace) -> Outcome:
    """Project and write."""
    from diffusers_ext.nullspace.debleed import debleed_lora, preserved_energy
    from diffusers_ext.nullspace.lora_files import check_output_path, export_lora, read_lora
    from diffusers_ext.nullspace.statistics import FeatureStatistics

    check_output_path(args.output_path)
    statistics = FeatureStatistics.from_pretrained(
        args.statistics, subfolder=args.statistics_subfolder, revision=args.statistics_revision
    )
    lora = read_lora(locate_lora(args.lora, args.weight_name))
    criterion = {name: getattr(args, name) for name in _CRITERIA if getattr(args, name) is not None}
    if args.instance_prompt and criterion:
        raise ValueError(
            f"`{next(iter(criterion))}` must not be given with `instance_prompt`, got both. Give "
            "`strictness` with it."
        )
    if args.strictness is not None and not args.instance_prompt:
        raise ValueError("`instance_prompt` must be given with `strictness`, got none.")
    subject: dict[str, Any] = {}
    if args.instance_prompt:
        criterion = {
            "strictness": _USUAL_STRICTNESS if args.strictness is None else args.strictness
        }
        subject = {
            "instance_prompts": args.instance_prompt,
            "pipeline": _base_pipeline(args, statistics.facts.get("base_model")),
        }
    criterion = criterion or {"damping": _USUAL_DAMPING}
    projected = debleed_lora(lora, statistics, uncovered=args.uncovered, **subject, **criterion)
    export_lora(projected, args.format, args.output_path)
    before, after = (preserved_energy(tensors, statistics) for tensors in (lora, projected))
    left = {name: after.get(name, 0.0) / energy for name, energy in before.items() if energy > 0}
    share = sum(after.values()) / sum(before.values()) if left else None
    worst = max(left, key=left.get) if left else None
    facts: dict[str, Any] = {
        "output_path": args.output_path,
        "format": args.format,
        "criterion": criterion,
        "modules": sum(key.endswith(".lora_A.weight") for key in lora),
        "covered_modules": len(before),
        "drift_left": share,
        "drift_left_by_module": left,
    }
    return Outcome(facts, f"{_verdict(share, worst, left)}\nWrote {args.output_path}")


def _base_pipeline(args: argparse.Namespace, collected_on: str | None) -> DiffusionPipeline:
    """The model that reads the subject's prompts: the one named, else that of the statistics."""
    source = args.pretrained_model_name_or_path or collected_on
    if not source:
        raise ValueError(
            "`pretrained_model_name_or_path` must be given with `instance_prompt`, got None, and the "
            "statistics do not name their base model."
        )
    return load_base_pipeline(
        argparse.Namespace(**{**vars(args), "pretrained_model_name_or_path": source})
    )


def _verdict(share: float | None, worst: str | None, left: dict[str, float]) -> str:
    if share is None or worst is None:
        return "The LoRA does not act on what is preserved: nothing had to be taken out of it."
    return (
        f"The predicted drift on preserved prompts fell to {100 * share:.3g} % of what it was, over "
        f"{len(left)} modules; the worst of them, {worst}, keeps {100 * left[worst]:.3g} %."
    )


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
    add_debleed_arguments,
    run_debleed,
)
