"""The run of an eraser's training, from its prompts to its file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch.utils._python_dispatch import _disable_current_modes

from diffusers_ext.eraser.adapter.config import (
    EraserConfig,
    check_rank,
    eraser_size,
    transformer_width,
)
from diffusers_ext.eraser.batch import EraserText, RowMaker
from diffusers_ext.eraser.masks.attention import concept_attention
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.eraser.step import EraserStep
from diffusers_ext.families.family import Family
from diffusers_ext.families.registry import match_family, titles_of
from diffusers_ext.families.velocity import Velocity
from diffusers_ext.planning.base_model import BaseModel, Component
from diffusers_ext.planning.disk_sizes import (
    REPORT_BYTES,
    checkpoint_bytes,
    kept_checkpoints,
    safetensors_bytes,
)
from diffusers_ext.planning.eraser_run_setting import STORAGE_DTYPES, EraserRunSetting
from diffusers_ext.planning.run_draft import Phase, RunDraft
from diffusers_ext.planning.work import (
    WEIGHT_DTYPES,
    Job,
    Precision,
    Work,
    inference_work,
    training_works,
)


_COMPONENTS = ("transformer", "vae", "text_encoder")
_ADAPTER_NAME = "default"
_STUDENT, _TEACHER, _VAE = "student's activations", "teacher's pass", "VAE"
# Latents kept of a point, by part: x_t with v_concept and v_anchor, x_t with the velocity.
_KEPT_LATENTS = {"target": 3, "preserved": 2}


def draft_eraser(base: BaseModel, *, as_on_gpu: bool = True, **setting: Any) -> RunDraft:
    """The phases of an eraser's training.

    Args:
        base: a CogVideoX.
        as_on_gpu: shapes are traced as a GPU runs them.
        setting: fields of `EraserRunSetting`.

    Raises:
        ValueError: another pipeline, or a setting that the model cannot take.
    """
    if match_family(base.components[base.denoiser].class_name, "eraser") is None:
        raise ValueError(
            f"`model` must be a {titles_of('eraser')} pipeline for the eraser, got {base.pipeline or 'none'} in "
            f"{base.name}."
        )
    missing = [name for name in _COMPONENTS if name not in base.components]
    if missing:
        raise ValueError(
            f"`model` must have a {missing[0]}, got {base.name} with {sorted(base.components)}."
        )
    run = EraserRun.of(base, EraserRunSetting(**setting), as_on_gpu)
    notes = []
    if run.setting.latents_source != "trajectory":
        notes.append("Passes of the teacher inside of steps are in the memory, not in the time.")
    if run.setting.latents_source == "video":
        notes.append("The time to read and encode videos is not counted.")
    parts, phases, disk = _parts(run), _phases(run), _disk(run)
    return RunDraft("eraser", base, asdict(run.setting), parts, phases, disk, notes)


@dataclass(frozen=True)
class EraserRun:
    """A base model and how an eraser is trained for it, as shapes."""

    base: BaseModel
    family: Family
    setting: EraserRunSetting  # the clip's size filled in
    latents: tuple[int, int, int, int]  # (frames, channels, height, width)
    config: Mapping[str, Any]  # of the transformer, with all fields
    precision: Precision

    @classmethod
    def of(cls, base: BaseModel, setting: EraserRunSetting, as_on_gpu: bool) -> EraserRun:
        """With the clip's size filled in; `ValueError` for one that the model cannot take."""
        configs = [base.components[name].whole_config() for name in ("transformer", "vae")]
        family = match_family(base.components[base.denoiser].class_name, "eraser")
        check_rank(setting.rank, transformer_width(configs[0]))
        own = family.clip_size(*configs)
        given = (setting.num_frames, setting.height, setting.width)
        size = [side if chosen is None else chosen for chosen, side in zip(given, own)]
        latents = family.latent_shape(*configs, *size)
        setting = replace(setting, num_frames=size[0], height=size[1], width=size[2])
        precision = Precision(WEIGHT_DTYPES[setting.mixed_precision], as_on_gpu)
        return cls(base, family, setting, latents, configs[0], precision)

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen models."""
        return self.precision.dtype

    def build(self, name: str, layers: int | None = None) -> torch.nn.Module:
        """A component without data, or the same with fewer blocks."""
        component = self.base.components[name]
        if layers is not None:
            config = {**component.config, "num_layers": layers}
            component = Component(component.class_name, config)
        return component.build(self.dtype)

    def student(self, layers: int | None = None) -> torch.nn.Module:
        """The transformer with an eraser that trains, in float32 as it trains."""
        model = self.build("transformer", layers)
        config = EraserConfig(r=self.setting.rank)
        inject_adapter_in_model(config, model, _ADAPTER_NAME, low_cpu_mem_usage=True)
        if self.setting.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model.train()

    def velocity(self, model: torch.nn.Module) -> Velocity:
        """Of a model with data, with conditions without content."""
        return self.family.empty_velocity(model, self.latents, self.dtype)

    def text(self, rows: int, device: torch.device | None = None) -> torch.Tensor:
        """Embeddings without content."""
        tokens, width = self.family.text_length(self.config), self.family.text_width(self.config)
        return torch.zeros(rows, tokens, width, dtype=self.dtype, device=device)


def _parts(run: EraserRun) -> dict[str, int]:
    """What is known without a trace; what is traced has its place among it."""
    eraser = 4 * eraser_size(run.config, run.setting.rank)
    sizes = {name: run.base.components[name].bytes(run.dtype) for name in _COMPONENTS}
    parts = {"transformer": sizes["transformer"], "eraser": eraser, "gradients": eraser}
    parts |= {"optimizer": 2 * eraser, _STUDENT: 0, _TEACHER: 0}
    parts["text encoder"] = sizes["text_encoder"]
    parts["text encoder's activations"] = 0
    if run.setting.validation or run.setting.latents_source == "video" or _vae_waits(run):
        parts[_VAE] = sizes["vae"]
    return parts


def _vae_waits(run: EraserRun) -> bool:
    """Whether the VAE waits in the device's memory: on a CPU, where the host's is the same."""
    return not run.precision.as_on_gpu


def _phases(run: EraserRun) -> list[Phase]:
    """What each phase of the training script does; the text encoder is gone after the first."""
    setting, passes = run.setting, run.setting.num_inference_steps
    waiting = (_VAE,) if _vae_waits(run) else ()
    rows, target, preserved = (
        setting.sampling_batch_size,
        setting.target_rows,
        setting.preserved_rows,
    )
    text = math.ceil(setting.num_prompts / setting.text_batch_size)
    phases = [Phase("text", ("text encoder",), [_text_work(run, text)])]
    if setting.latents_source == "trajectory":
        batches, others = (
            math.ceil(count / rows)
            for count in (setting.num_target_trajectories, setting.num_preserved_trajectories)
        )
        kept = min(setting.points_per_trajectory, passes)
        # The anchor is asked where a point of a target run is kept; guidance needs two prompts always.
        three, two = batches * kept, batches * (passes - kept) + others * passes
        works = [
            _teacher_work(run, three, 3 * rows, reads=setting.localization),
            _teacher_work(run, two, 2 * rows),
        ]
        phases.append(Phase("sampling", ("transformer", *waiting), works))
    asked = []
    if setting.latents_source != "trajectory":
        # For the concept's prompts, the anchor's, preserved ones and, for masks, the empty one.
        together = (3 if setting.localization else 2) * target + preserved
        count = max(target, preserved) if setting.rows_in_turn else together
        asked = [_teacher_work(run, 0, count, reads=setting.localization)]
    trains = ("transformer", "eraser", *waiting)
    phases.append(Phase("training", trains, _step_works(run), asked))
    if setting.latents_source == "video":
        phases.append(Phase("encoding", ("transformer", _VAE), (), [_vae_work(run, 0)]))
    if setting.validation:
        # Beside the eraser's clip of each validation, once the base model's.
        steps = setting.max_train_steps
        drawn = 1 + math.ceil(steps / (setting.validation_steps or steps))
        works = [_teacher_work(run, drawn * passes, 2), _vae_work(run, drawn, decodes=True)]
        resident = ("transformer", "eraser", "optimizer", _VAE)
        phases.append(Phase("validation", resident, works))
    return phases


def _text_work(run: EraserRun, times: int) -> Work:
    size = (run.setting.text_batch_size, run.family.text_length(run.config))

    def begin(encoder: torch.nn.Module, device: torch.device) -> Callable[[], object]:
        return lambda: encoder(torch.zeros(size, dtype=torch.long, device=device))

    build = partial(run.build, "text_encoder")
    layers = run.base.components["text_encoder"].whole_config().num_layers
    return inference_work("text encoder's activations", times, build, begin, layers=layers)


def _vae_work(run: EraserRun, times: int, *, decodes: bool = False) -> Work:
    """One clip in one piece, as without tiling: latents to pixels, or pixels to latents."""
    frames, channels, height, width = run.latents
    pixels = (1, 3, run.setting.num_frames, run.setting.height, run.setting.width)

    def begin(vae: torch.nn.Module, device: torch.device) -> Callable[[], object]:
        size = (1, channels, frames, height, width) if decodes else pixels
        given = torch.randn(size, dtype=run.dtype, device=device)
        return lambda: (vae.decode if decodes else vae.encode)(given)

    name = f"VAE's {'decoding' if decodes else 'encoding'}"
    return inference_work(name, times, partial(run.build, "vae"), begin)


def _teacher_work(run: EraserRun, times: int, rows: int, *, reads: bool = False) -> Work:
    """The frozen model is asked for some rows; for masks its attention is read in a third of them."""

    def make(layers: int | None = None) -> Job:
        model = run.build("transformer", layers)
        concept = torch.zeros(rows, run.family.text_length(run.config), dtype=torch.bool)
        concept[: max(1, rows // 3), 0] = True

        def begin(device: torch.device) -> Callable[[], object]:
            velocity = run.velocity(model)
            x_t = torch.randn(rows, *run.latents, device=device)
            t = torch.zeros(rows, dtype=torch.long, device=device)
            prompts = run.text(rows, device)

            @torch.no_grad()
            def repeat() -> None:
                with ExitStack() as stack:
                    if reads:
                        # Which rows hold the concept is data, which traced tensors do not have.
                        with _disable_current_modes():
                            stack.enter_context(concept_attention(model, concept))
                    stack.enter_context(run.precision.autocast(model))
                    velocity(x_t, t, prompts)

            return repeat

        return Job([model], begin)

    return Work(_TEACHER, times, make, layers=run.config.num_layers)


def _step_works(run: EraserRun) -> list[Work]:
    """The training's own step over samples without content."""
    setting, eraser = run.setting, 4 * eraser_size(run.config, run.setting.rank)
    recipe = EraserTraining(
        rank=setting.rank,
        preserved_share=setting.preserved_rows / (setting.target_rows + setting.preserved_rows),
        localization_weight=1.0 if setting.localization else 0.0,
        separate_passes=setting.rows_in_turn,
    )

    def begin(model: torch.nn.Module, device: torch.device) -> Callable[[], torch.Tensor]:
        # One prompt, with data: the training keeps them in the host's memory.
        with _disable_current_modes():
            embeds = run.text(1)
        text = EraserText(embeds, embeds, embeds, embeds[0])
        velocity, grid = run.velocity(model), run.family.token_grid(run.config, run.latents)
        maker = RowMaker(velocity, text, recipe, device, grid=grid, scheduler=None)
        step = EraserStep(maker, recipe, _ADAPTER_NAME)
        return lambda: step(model, _samples(run, grid, device), torch.Generator())["loss"]

    work = Work(
        _STUDENT,
        setting.max_train_steps,
        run.student,
        layers=run.config.num_layers,
        apart=3 * eraser,
    )
    batches = setting.gradient_accumulation_steps
    return training_works(work, batches, run.precision, begin, weight_decay=1e-2)


def _samples(run: EraserRun, grid: tuple[int, int, int], device: torch.device) -> dict[str, Any]:
    """A batch of teacher samples without content."""
    rows = max(run.setting.target_rows, run.setting.preserved_rows)

    def latents() -> torch.Tensor:
        return torch.zeros(rows, *run.latents, device=device)

    def numbers() -> torch.Tensor:
        return torch.zeros(rows, dtype=torch.long, device=device)

    target = {"x_t": latents(), "t": numbers(), "prompt": numbers()}
    target |= {"v_concept": latents(), "v_anchor": latents()}
    if run.setting.localization:
        target["mask"] = torch.zeros(rows, *grid, device=device)
    preserved = {"x_t": latents(), "t": numbers(), "prompt": numbers(), "velocity": latents()}
    return {"target": target, "preserved": preserved}


def _sample_bytes(run: EraserRun) -> int:
    """Of the kept trajectories, on disk or in the host's memory."""
    setting = run.setting
    if setting.latents_source != "trajectory":
        return 0
    points = min(setting.points_per_trajectory, setting.num_inference_steps)
    clips = {"target": setting.num_target_trajectories}
    clips["preserved"] = setting.num_preserved_trajectories
    count = points * sum(clips[part] * number for part, number in _KEPT_LATENTS.items())
    itemsize = STORAGE_DTYPES[setting.trajectories_dtype].itemsize
    return count * math.prod(run.latents) * itemsize


def _disk(run: EraserRun) -> dict[str, int]:
    setting, model = run.setting, run.student()
    weights = {n: p for n, p in model.named_parameters() if "eraser_" in n}
    disk = {"eraser": safetensors_bytes(weights) + REPORT_BYTES}
    samples = _sample_bytes(run)
    if samples:
        disk["teacher's samples (on disk, or in the host's memory)"] = samples
    checkpoint = checkpoint_bytes(weights.values(), weights.values())
    count = kept_checkpoints(
        setting.max_train_steps, setting.checkpointing_steps, setting.checkpoints_total_limit
    )
    return {**disk, "checkpoints": count * checkpoint} if count else disk
