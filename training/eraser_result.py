"""What a training of an eraser leaves: the adapter, a report, and a repository on the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffusers_ext.eraser.recipe import EraserSettings
from diffusers_ext.eraser.saving import save_eraser
from diffusers_ext.hub.card import Card, make_card
from diffusers_ext.hub.licence import public_name
from training.eraser_data import ClipSize
from training.eraser_text import GivenTexts, RunText
from training.loop import TrainingLoop
from training.output_folder import ON_THE_WAY, staged_output
from training.publish import left_here, prepare_upload, push_output, widget_of
from training.text_pipeline import read_components
from training.upload import card_arguments, reported_arguments


REPORT_NAME = "training_report.json"
# Of the recipe, what a card shows.
_SHOWN = (
    "negative_guidance", "unlearning_weight", "preservation_weight", "localization_weight",
    "loss_type", "latents_source", "learning_rate", "train_batch_size",
    "gradient_accumulation_steps", "max_train_steps",
)  # fmt: skip


def eraser_report(
    args: EraserSettings, text: RunText, loop: TrainingLoop, **facts: Any
) -> dict[str, Any]:
    """Everything about a training as JSON, the token left out."""
    trained = [p for group in loop.optimizer.param_groups for p in group["params"]]
    return {
        "arguments": reported_arguments(args),
        "recipe": args.recipe(),
        "parameters": sum(parameter.numel() for parameter in trained),
        "preserved_concepts": text.preserved_concepts,
        "prompts": text.prompts.facts,
        **facts,
        "history": loop.history,
        "seconds": loop.seconds,
    }


def save_result(
    args: EraserSettings,
    pipeline: DiffusionPipeline,
    adapter_name: str,
    report: dict[str, Any],
) -> None:
    """Write the eraser and the report, all at once."""
    with staged_output(args.output_dir, ("adapter_config.json",), ON_THE_WAY) as folder:
        save_eraser(
            pipeline.transformer,
            folder,
            adapter_name=adapter_name,
            base_model_name_or_path=args.hub_base_model
            or public_name(args.pretrained_model_name_or_path),
        )
        report_text = json.dumps(report, indent=2) + "\n"
        (folder / REPORT_NAME).write_text(report_text, encoding="utf-8")


def eraser_facts(
    args: EraserSettings, report: Mapping[str, Any], clips: Sequence[Path] = ()
) -> dict[str, Any]:
    """What the card of a trained eraser tells besides base model and licence, JSON-able.

    Args:
        args: of the training script.
        report: as in `training_report.json`.
        clips: of validation prompts, below the output folder.
    """
    prompts = [p for p in args.validation_prompt for _ in range(args.num_validation_videos)]
    size, recipe = report["size"], report["recipe"]
    return {
        "trained_on": _trained_on(report),
        "settings": {
            "clips": f"{size['num_frames']} x {size['height']} x {size['width']}",
            **{name: recipe[name] for name in _SHOWN},
        },
        "widget": widget_of(args, prompts, clips),
        "concept": args.target_concept,
        "anchor_concept": args.anchor_concept or "",
        "preserved_concepts": list(report["preserved_concepts"]),
    }


def trained_eraser_card(
    args: EraserSettings, report: Mapping[str, Any], clips: Sequence[Path] = ()
) -> Callable[..., Card]:
    """The card of a trained eraser but for the name of its repository; arguments as `eraser_facts`.

    Raises:
        ValueError: a fact is not known, such as the licence.
    """
    return make_card(
        "eraser",
        **eraser_facts(args, report, clips),
        pipeline=read_components(args)["_class_name"],
        rank=args.rank,
        parameters=report["parameters"],
        **card_arguments(args),
    )


def _trained_on(report: Mapping[str, Any]) -> str:
    counts = {name: len(prompts) for name, prompts in report["prompts"].items()}
    clips = {
        "trajectory": "clips that the base model drew itself; no other clips were used",
        "video": "clips of a folder of videos",
        "noise": "noised random numbers; no clips were used",
    }[report["recipe"]["latents_source"]]
    return (
        f"{counts['target']} prompts that ask for the concept and {counts['preserved']} whose clips "
        f"must stay, on {clips}."
    )


def prepare_eraser_upload(args: EraserSettings, given: GivenTexts, size: ClipSize) -> None:
    """Check the upload before the run, with what the command line and its files tell.

    Raises:
        ValueError: no licence is known, or the Hub refuses the card.
    """
    concepts = given.preserved_concepts or []
    known = {
        "size": size._asdict(),
        "recipe": args.recipe(),
        "preserved_concepts": concepts,
        "prompts": {"target": given.target, "preserved": given.preserved_prompts},
        "parameters": 1,
    }
    prepare_upload(args, trained_eraser_card(args, known))


def publish_eraser(args: EraserSettings, report: Mapping[str, Any], clips: Sequence[Path]) -> str:
    """Upload the output folder (eraser, report, card, last clips), without checkpoints and logs.

    Returns:
        Address of the commit.
    """
    card = trained_eraser_card(args, report, clips)
    return push_output(args, card, left_here(args, args.trajectories_dir, args.video_dir))
