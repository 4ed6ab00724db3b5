"""What a training of an eraser leaves: the adapter, a report, and a repository on the Hub."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers import CogVideoXPipeline
from huggingface_hub import ModelCard

from diffusers_ext.eraser.saving import save_eraser
from hub_cards import render
from training.eraser_arguments import recipe_of
from training.eraser_text import RunText
from training.loop import TrainingLoop
from training.output_folder import staged_output
from training.publish import card_data, make_repository, patterns_below, upload_output


REPORT_NAME = "training_report.json"
# Of the recipe, what a card shows.
_SHOWN = (
    "guidance_scale", "unlearning_weight", "preservation_weight", "localization_weight",
    "loss_type", "latents_source", "learning_rate", "train_batch_size",
    "gradient_accumulation_steps", "max_train_steps",
)  # fmt: skip


def eraser_report(
    args: argparse.Namespace, text: RunText, loop: TrainingLoop, **facts: Any
) -> dict[str, Any]:
    """Everything about a training as JSON, the token left out."""
    trained = [p for group in loop.optimizer.param_groups for p in group["params"]]
    return {
        "arguments": {name: value for name, value in vars(args).items() if name != "hub_token"},
        "recipe": asdict(recipe_of(args)),
        "parameters": sum(parameter.numel() for parameter in trained),
        "preserved_concepts": text.preserved_concepts,
        "prompts": text.prompts.facts,
        **facts,
        "history": loop.history,
        "seconds": loop.seconds,
    }


def save_result(
    args: argparse.Namespace,
    pipeline: CogVideoXPipeline,
    adapter_name: str,
    report: dict[str, Any],
) -> None:
    """Write the eraser and the report, all at once."""
    with staged_output(args.output_dir, last=("adapter_config.json",)) as folder:
        save_eraser(
            pipeline.transformer,
            folder,
            adapter_name=adapter_name,
            base_model_name_or_path=public_name(args.pretrained_model_name_or_path),
        )
        report_text = json.dumps(report, indent=2) + "\n"
        (folder / REPORT_NAME).write_text(report_text, encoding="utf-8")


def public_name(source: str) -> str:
    """A model's name; of a folder the last part, as a path of this machine means nothing to others."""
    return Path(source).resolve().name if Path(source).exists() else source


def eraser_card(
    args: argparse.Namespace, repo_id: str, report: dict[str, Any], clips: Sequence[Path] = ()
) -> ModelCard:
    """The card of a trained eraser, without network access.

    Args:
        args: of the training script.
        repo_id: where the card is going to be.
        report: as in `training_report.json`.
        clips: of validation prompts, below the output folder.
    """
    prompts = [p for p in args.validation_prompt for _ in range(args.num_validation_videos)]
    widget = [
        {"text": prompt, "output": {"url": path.relative_to(args.output_dir).as_posix()}}
        for prompt, path in zip(prompts, clips)
    ]
    tags = ["text-to-video", "diffusers", "diffusers-training", "concept-erasure", "eraser"]
    size = report["size"]
    return render(
        "eraser",
        card_data(args, tags, widget=widget or None),
        base=public_name(args.pretrained_model_name_or_path),
        repo_id=repo_id,
        concept=args.target_concept,
        anchor_concept=args.anchor_concept,
        pipeline=CogVideoXPipeline.__name__,
        rank=args.eraser_rank,
        parameters=f"{report['parameters']:,}",
        settings={
            "clips": f"{size['num_frames']} x {size['height']} x {size['width']}",
            **{name: report["recipe"][name] for name in _SHOWN},
        },
        preserved_concepts=report["preserved_concepts"],
        figures={},
    )


def publish_eraser(args: argparse.Namespace, report: dict[str, Any], clips: Sequence[Path]) -> str:
    """Upload the output folder (eraser, report, card, last clips), without checkpoints and logs.

    Returns:
        Address of the commit.
    """
    repo_id = make_repository(args)
    ignored = ["checkpoint-*", ".partial-*", f"{args.logging_dir}/*"]
    ignored += patterns_below(args.output_dir, args.trajectories_dir, args.video_dir)
    return upload_output(args, eraser_card(args, repo_id, report, clips), repo_id, ignored)
