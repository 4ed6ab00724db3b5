"""What a training of an eraser leaves: the adapter, a report, and a repository on the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline

from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.eraser.adapter.outputs import erasers_disabled
from diffusers_ext.eraser.files import save_eraser
from diffusers_ext.eraser.recipe import EraserSettings
from diffusers_ext.evaluation.report_files import write_clip
from diffusers_ext.families import find_family
from diffusers_ext.families.text_conditioning import repeat_text
from diffusers_ext.hub.card import Card, make_card
from diffusers_ext.hub.kinds import public_name
from diffusers_ext.training.eraser.data import ClipSize, FirstFrames
from diffusers_ext.training.eraser.prompts import GivenTexts, RunText
from diffusers_ext.training.run.base_model import read_components
from diffusers_ext.training.run.loop import TrainingLoop
from diffusers_ext.training.run.script import (
    ON_THE_WAY,
    card_arguments,
    left_here,
    prepare_upload,
    push_output,
    reported_arguments,
    staged_output,
    widget_of,
)

logger = get_logger(__name__)

REPORT_NAME = "training_report.json"
# Of the recipe, what a card shows.
_SHOWN = (
    "negative_guidance", "unlearning_weight", "preservation_weight", "localization_weight",
    "loss_type", "latents_source", "learning_rate", "train_batch_size",
    "gradient_accumulation_steps", "max_train_steps",
)  # fmt: skip
_GAP = 2  # white pixels between the two clips


class ClipValidation:
    """Draws `--validation_prompt` at fixed seeds every `--validation_steps` and at the end.

    Each file shows the base model on the left and the eraser at full strength on the right, from the same noise. The
    text encoder is gone by then, so prompts come as embeddings. `files` are the clips of the last call; `part`, which
    names them, is the transformer that trains where a model has several.
    """

    def __init__(
        self,
        settings: EraserSettings,
        pipeline: DiffusionPipeline,
        accelerator: Accelerator,
        text: RunText,
        size: ClipSize,
        first_frames: FirstFrames | None = None,
    ) -> None:
        self.settings, self.pipeline, self.accelerator = settings, pipeline, accelerator
        self.prompt_embeds, self.size, self.first_frames = text.validation, size, first_frames
        self.empty_embed = text.embeds.empty
        self.files: list[Path] = []
        self.part = ""
        self._base: dict[tuple[int, int], np.ndarray] = {}

    def draw(self, step: int) -> None:
        """Draw and save the clips of one step; the models' modes and the VAE's place come back."""
        if not self.accelerator.is_main_process:
            return
        folder = Path(self.settings.output_dir, "validation")
        folder.mkdir(parents=True, exist_ok=True)
        self.files = []
        decoders = [getattr(self.pipeline, name) for name in find_family(self.pipeline, "eraser").decoders]
        with ExitStack() as restore:
            for decoder in decoders:
                restore.callback(decoder.to, decoder.device)
                decoder.to(self.accelerator.device)
            restore.enter_context(quiet_run(self.pipeline))
            for prompt in range(len(self.settings.validation_prompt)):
                for video in range(self.settings.num_validation_videos):
                    path = folder / f"step-{step:06d}{self.part}-prompt-{prompt}-video-{video}.gif"
                    write_clip(self._side_by_side(prompt, video), path, fps=self.settings.validation_fps)
                    self.files.append(path)
        logger.info(f"Drew {len(self.files)} validation clips at step {step}.")

    def _side_by_side(self, prompt: int, video: int) -> np.ndarray:
        """`(frames, height, 2 width and a gap, 3)` uint8: base and erased."""
        key = (prompt, video)
        if key not in self._base:
            with ExitStack() as off:
                for name in find_family(self.pipeline, "eraser").expert_timesteps(self.pipeline):
                    off.enter_context(erasers_disabled(getattr(self.pipeline, name)))
                self._base[key] = self._clip(prompt, video)
        base = self._base[key]
        gap = np.full((*base.shape[:2], _GAP, 3), 255, np.uint8)
        return np.concatenate([base, gap, self._clip(prompt, video)], 2)

    @torch.no_grad()
    def _clip(self, prompt: int, video: int) -> np.ndarray:
        family = find_family(self.pipeline, "eraser")
        device, dtype = self.accelerator.device, getattr(self.pipeline, family.denoiser).dtype
        texts = (self.prompt_embeds[[prompt]], repeat_text(self.empty_embed, 1))
        arguments = family.clip_arguments(*(text.to(device, dtype) for text in texts))
        if self.first_frames is not None:
            pictures = self.first_frames.pictures
            arguments["image"] = pictures[video % len(pictures)]
        with family.guided_call(self.pipeline, self.settings.sampling_guidance_scale) as guidance:
            found = self.pipeline(
                **arguments,
                **guidance,
                generator=torch.Generator().manual_seed(self.settings.seed + video),
                **family.size_arguments(*self.size),
                num_inference_steps=self.settings.num_inference_steps,
                output_type="np",
            )[0]
        frames = found if family.draws_pictures else found[0]  # a picture each
        return (np.asarray(frames).clip(0, 1) * 255).round().astype(np.uint8)


def eraser_report(
    settings: EraserSettings, text: RunText, loops: Mapping[str, TrainingLoop], **facts: Any
) -> dict[str, Any]:
    """Everything about a training as JSON, the token left out.

    Of a model with several transformers there is a loop for each, by name, and the log says which.
    """
    trained = [p for loop in loops.values() for group in loop.optimizer.param_groups for p in group["params"]]
    history = [{**row, "transformer": name} for name, loop in loops.items() for row in loop.history]
    return {
        "arguments": reported_arguments(settings),
        "recipe": settings.recipe(),
        "parameters": sum(parameter.numel() for parameter in trained),
        "preserved_concepts": text.preserved_concepts,
        "prompts": text.prompts.facts,
        **facts,
        "history": history if len(loops) > 1 else next(iter(loops.values())).history,
        "seconds": sum(loop.seconds for loop in loops.values()),
    }


def save_result(
    settings: EraserSettings, pipeline: DiffusionPipeline, adapter_name: str, report: dict[str, Any]
) -> None:
    """Write the eraser and the report, all at once."""
    with staged_output(settings.output_dir, ("adapter_config.json",), ON_THE_WAY) as folder:
        experts = find_family(pipeline, "eraser").expert_timesteps(pipeline)
        save_eraser(
            pipeline if len(experts) > 1 else getattr(pipeline, next(iter(experts))),
            folder,
            adapter_name=adapter_name,
            base_model_name_or_path=settings.hub_base_model or public_name(settings.pretrained_model_name_or_path),
        )
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def eraser_facts(settings: EraserSettings, report: Mapping[str, Any], clips: Sequence[Path] = ()) -> dict[str, Any]:
    """What the card of a trained eraser tells besides base model and licence, JSON-able."""
    prompts = [p for p in settings.validation_prompt for _ in range(settings.num_validation_videos)]
    size, recipe = report["size"], report["recipe"]
    return {
        "trained_on": _trained_on(report),
        "settings": {
            "clips": f"{size['num_frames']} x {size['height']} x {size['width']}",
            **{name: recipe[name] for name in _SHOWN},
        },
        "widget": widget_of(settings, prompts, clips),
        "concept": settings.target_concept,
        "anchor_concept": settings.anchor_concept or "",
        "preserved_concepts": list(report["preserved_concepts"]),
    }


def trained_eraser_card(
    settings: EraserSettings, report: Mapping[str, Any], clips: Sequence[Path] = ()
) -> Callable[..., Card]:
    """The card but for the name of its repository; raises `ValueError` where a fact, as the licence, is not known."""
    return make_card(
        "eraser",
        **eraser_facts(settings, report, clips),
        pipeline=read_components(settings)["_class_name"],
        rank=settings.rank,
        parameters=report["parameters"],
        **card_arguments(settings),
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


def prepare_eraser_upload(settings: EraserSettings, given: GivenTexts, size: ClipSize) -> None:
    """Check the upload before the run, with what the command line and its files tell."""
    known = {
        "size": size._asdict(),
        "recipe": settings.recipe(),
        "preserved_concepts": given.preserved_concepts or [],
        "prompts": {"target": given.target, "preserved": given.preserved_prompts},
        "parameters": 1,
    }
    prepare_upload(settings, trained_eraser_card(settings, known))


def publish_eraser(settings: EraserSettings, report: Mapping[str, Any], clips: Sequence[Path]) -> str:
    """Upload the output folder without checkpoints and logs; returns the address of the commit."""
    ignored = left_here(settings, settings.trajectories_dir, settings.video_dir, settings.first_frames_dir)
    return push_output(settings, trained_eraser_card(settings, report, clips), ignored)
