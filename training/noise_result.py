"""What a training of a golden-noise network leaves: the network, a report, and a repository on the Hub."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from hub_cards import render
from training.output_folder import staged_output
from training.publish import card_data, make_repository, upload_output


# The pipeline of this package that takes the network for a base pipeline.
PIPELINES = {
    "StableDiffusionPipeline": "GoldenNoisePipeline",
    "StableDiffusionXLPipeline": "GoldenNoiseXLPipeline",
    "HunyuanDiTPipeline": "GoldenNoiseHunyuanDiTPipeline",
    "StableDiffusion3Pipeline": "GoldenNoiseSD3Pipeline",
    "FluxPipeline": "GoldenNoiseFluxPipeline",
}
_ANY_SIZE = ("GoldenNoiseModel", "NoiseSequenceTransformer", "NoiseSequenceRNN")


def network_report(
    args: argparse.Namespace, network: torch.nn.Module, **facts: Any
) -> dict[str, Any]:
    """Everything about a training as JSON, the token left out."""
    return {
        "arguments": {name: value for name, value in vars(args).items() if name != "hub_token"},
        "network": type(network).__name__,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "trained_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        **facts,
    }


def save_network(
    args: argparse.Namespace, network: torch.nn.Module, report: dict[str, Any]
) -> None:
    """Write the network and the report, all at once."""
    with staged_output(args.output_dir, last=("config.json",)) as folder:
        network.save_pretrained(folder)
        text = json.dumps(report, indent=2) + "\n"
        (folder / "training_report.json").write_text(text, encoding="utf-8")


def network_card(args: argparse.Namespace, repo_id: str, report: dict[str, Any]) -> ModelCard:
    """The card of a trained network, without network access.

    Args:
        args: of the training script.
        repo_id: where the card is going to be.
        report: as in `training_report.json`.
    """
    last = report["validation"][-1] if report["validation"] else {}
    figures = {name: value for name, value in last.items() if name != "step"}
    generation = report["data"]["generation"] or {}
    shown = {k: v for k, v in generation.items() if isinstance(v, (str, int, float)) and v != ""}
    if generation.get("reward"):
        shown["reward"] = f"{generation['reward']['name']}, {generation['reward']['version']}"
    base = args.pretrained_model_name_or_path
    if Path(base).exists():  # a path of this machine means nothing to others
        base = Path(base).name
    shown |= {name: base for name in shown if name == "pretrained_model_name_or_path"}
    return render(
        "golden_noise_network",
        card_data(args, ["diffusers", "diffusers-training", "golden-noise"]),
        base=base,
        repo_id=repo_id,
        network=report["network"],
        pipeline=PIPELINES[report["pipeline_class"]],
        parameters=f"{report['parameters']:,}",
        noises=report["data"],
        generation=shown,
        figures={name: f"{value:.4f}" for name, value in figures.items()},
        steps=args.max_train_steps,
        ema=args.use_ema,
        any_size=report["network"] in _ANY_SIZE,
    )


def publish_network(args: argparse.Namespace, report: dict[str, Any]) -> str:
    """Upload the output folder (network, report, card), without checkpoints and logs.

    Returns:
        Address of the commit.
    """
    repo_id = make_repository(args)
    ignored = ["checkpoint-*", ".partial-*", f"{args.logging_dir}/*"]
    return upload_output(args, network_card(args, repo_id, report), repo_id, ignored)
