"""The run of an eraser's training, from its prompts to its file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from peft import inject_adapter_in_model
from torch.utils._python_dispatch import _disable_current_modes

from diffusers_ext.eraser.adapter.config import EraserConfig, check_rank, eraser_size, transformer_width
from diffusers_ext.eraser.batch import RowMaker
from diffusers_ext.eraser.concept_attention import concept_attention
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.eraser.step import EraserStep
from diffusers_ext.eraser.teacher.runs import EraserText, plan_trajectories
from diffusers_ext.families import match_family, titles_of
from diffusers_ext.families.family import Family, Velocity
from diffusers_ext.families.text_conditioning import Text, TextConditioning
from diffusers_ext.planning.models import BaseModel, vae_work
from diffusers_ext.planning.optimizers import state_bytes
from diffusers_ext.planning.settings import EraserPlanSettings
from diffusers_ext.planning.tracing import REPORT_BYTES, checkpoint_bytes, safetensors_bytes
from diffusers_ext.planning.work import (
    OPTIMIZER,
    WEIGHT_DTYPES,
    Draft,
    Job,
    Phase,
    Precision,
    Work,
    inference_work,
    training_works,
)

_ADAPTER_NAME = "default"
_STUDENT, _TEACHER, _VAE = "student's activations", "teacher's pass", "VAE"
_OTHER = "other transformer"
_SAMPLES = "teacher's samples (on disk, or in the host's memory)"
_STORAGE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def draft_eraser(base: BaseModel, setting: EraserPlanSettings, *, as_on_gpu: bool = True) -> Draft:
    """The phases of an eraser's training; the text encoder is gone after the first.

    Raises `ValueError` for a pipeline that erasers are not known for, or a setting that the model cannot take.
    """
    run = eraser_run(base, setting, as_on_gpu)
    setting = run.setting
    notes = []
    if run.parts_count > 1 and base.scheduler is None:
        notes.append("Each of the two transformers is counted with whole runs of the teacher; they are shorter.")
    if setting.latents_source != "trajectory":
        notes.append("Passes of the teacher inside of steps are in the memory, not in the time.")
    if setting.latents_source == "video":
        notes.append("The time to read and encode videos is not counted.")
    return Draft("eraser", base, asdict(setting), run.parts(), run.phases(), run.disk(), notes)


def eraser_run(base: BaseModel, setting: EraserPlanSettings, as_on_gpu: bool = True) -> EraserRun:
    """The run with the clip's size filled in; raises as `draft_eraser`."""
    # Families share UNets, which their pipelines tell apart.
    known = base.pipeline if base.pipeline and match_family(base.pipeline) else None
    family = match_family(known or base.components[base.denoiser].class_name, "eraser")
    if family is None:
        raise ValueError(
            f"`model` must be a {titles_of('eraser')} pipeline for the eraser, got "
            f"{base.pipeline or 'none'} in {base.name}."
        )
    if type(family).empty_velocity is Family.empty_velocity:
        raise ValueError(
            f"`model` must be a model that draws clips, of which shapes tell the work, for a plan of an eraser, got "
            f"{base.name}, a {family.title}."
        )
    if setting.localization and not family.locates_concepts:
        raise ValueError(f"`localization` must be off for {family.title}, of which masks are not known, got on.")
    configs = [base.component(name).whole_config() for name in ("transformer", "vae")]
    base.component("text_encoder")
    check_rank(setting.rank, transformer_width(configs[0]))
    given = (setting.num_frames, setting.height, setting.width)
    sides = zip(given, family.clip_size(*configs), strict=True)
    size = [own if chosen is None else chosen for chosen, own in sides]
    setting = replace(setting, num_frames=size[0], height=size[1], width=size[2])
    precision = Precision(WEIGHT_DTYPES[setting.mixed_precision], as_on_gpu)
    latents = family.latent_shape(*configs, *size)
    return EraserRun(base, family, setting, latents, configs[0], precision)


@dataclass(frozen=True)
class EraserRun:
    """A base model and how an eraser is trained for it, as shapes."""

    base: BaseModel
    family: Family
    setting: EraserPlanSettings  # with the clip's size
    latents: tuple[int, int, int, int]  # (frames, channels, height, width)
    config: Mapping[str, Any]  # of the transformer, with all fields
    precision: Precision  # of the calls of all models

    def build(self, name: str, **changed: Any) -> torch.nn.Module:
        """A component without data, or the same with another config."""
        return self.base.component(name).build(self.precision.dtype, **changed)

    def student(self, **changed: Any) -> torch.nn.Module:
        """The transformer with an eraser that trains, in float32 as it trains."""
        model = self.build("transformer", **changed)
        config = EraserConfig(r=self.setting.rank, kind=self.setting.kind)
        inject_adapter_in_model(config, model, _ADAPTER_NAME, low_cpu_mem_usage=True)
        if self.setting.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model.train()

    def velocity(self, model: torch.nn.Module) -> Velocity:
        """Of a model with data, with conditions without content."""
        return self.family.empty_velocity(model, self.latents, self.precision.dtype)

    def text(self, rows: int, device: torch.device | None = None) -> Text:
        """Embeddings without content."""
        length, made = self.family.text_length(self.config), {}
        for name, shape in self.family.text_shapes(self.config).items():
            size = (rows, *(length if side is None else side for side in shape))
            made[name] = torch.zeros(size, dtype=self.precision.dtype, device=device)
        if len(made) == 1:
            return made["prompt_embeds"]
        if "attention_mask" in self.family.text_fields:
            made["attention_mask"] = torch.ones(rows, length, dtype=torch.long, device=device)
        return TextConditioning(**made)

    def parts(self) -> dict[str, int]:
        """What is known without a trace; what is traced has its place among it."""
        setting, eraser = self.setting, self._eraser_bytes
        encoders = [name for name in self.base.components if name.startswith("text_encoder")]
        names = ("transformer", "vae", *encoders)
        sizes = {name: self.base.component(name).bytes(self.precision.dtype) for name in names}
        parts = {"transformer": sizes["transformer"], "eraser": self.parts_count * eraser, "gradients": eraser}
        if self.parts_count > 1:
            parts[_OTHER] = sizes["transformer"]
        parts |= {OPTIMIZER: self._state_bytes, _STUDENT: 0, _TEACHER: 0}
        parts |= {"text encoder": sum(sizes[name] for name in encoders), "text encoder's activations": 0}
        if setting.validation or setting.latents_source == "video" or self._waiting:
            parts[_VAE] = sizes["vae"]
        return parts

    @property
    def _eraser_bytes(self) -> int:
        """Of one part, in float32."""
        return 4 * eraser_size(self.config, self.setting.rank, kind=self.setting.kind)

    @property
    def _state_bytes(self) -> int:
        """What the optimizer keeps of one part."""
        return state_bytes(self._eraser.values(), self.setting.optimizer)

    @cached_property
    def _eraser(self) -> dict[str, torch.Tensor]:
        """The weights of one part, without data."""
        return {name: weight for name, weight in self.student().named_parameters() if "eraser_" in name}

    @property
    def parts_count(self) -> int:
        """Transformers, each of which gets a part of the eraser, one after the other."""
        return 2 if "transformer_2" in self.base.components else 1

    @property
    def _other(self) -> tuple[str, ...]:
        """The transformer that does not train, which waits in the host's memory while nothing is drawn."""
        return (_OTHER,) if self.parts_count > 1 else ()

    @property
    def _waiting(self) -> tuple[str, ...]:
        """The VAE waits in the host's memory, which on a CPU is the device's own."""
        return () if self.precision.as_on_gpu else (_VAE,)

    def phases(self) -> list[Phase]:
        """What each phase of the training script does."""
        setting, passes = self.setting, self.setting.num_inference_steps
        phases = [Phase("text", ("text encoder",), [self._text_work()])]
        asked = []
        if setting.latents_source == "trajectory":
            phases.append(Phase("sampling", ("transformer", *self._other, *self._waiting), self._sampling()))
        else:
            # For the concept's prompts, the anchor's, preserved ones and, for masks, the empty one.
            rows = [setting.target_rows] * (3 if setting.localization else 2)
            rows.append(setting.preserved_rows)
            count = max(rows) if setting.separate_passes else sum(rows)
            asked = [self._teacher_work(0, count, reads=setting.localization)]
        rests = not setting.validation and self.precision.as_on_gpu
        trains = ("transformer", "eraser", *(() if rests else self._other), *self._waiting)
        phases.append(Phase("training", trains, self.training_works(), asked))
        if setting.latents_source == "video":
            phases.append(Phase("encoding", ("transformer", _VAE), (), [self._vae_work(0)]))
        if setting.validation:
            # Beside the eraser's clip of each validation, once the base model's.
            drawn = 1 + self.parts_count * setting.validations
            works = [self._teacher_work(drawn * passes, 2), self._vae_work(drawn, decodes=True)]
            resident = ("transformer", *self._other, "eraser", OPTIMIZER, _VAE)
            phases.append(Phase("validation", resident, works))
        return phases

    def served_steps(self) -> list[list[int]]:
        """The steps of the teacher's runs at which each transformer answers and keeps points; it is asked up to them.

        All of them where nothing is known of a scheduler that two share.
        """
        steps, scheduler = self.setting.num_inference_steps, self.base.scheduler
        if self.parts_count == 1 or scheduler is None:
            return [list(range(steps))] * self.parts_count
        made = getattr(diffusers, scheduler[0]).from_config(dict(scheduler[1]))
        made.set_timesteps(steps)
        pipeline = SimpleNamespace(config=FrozenDict(self.base.index), scheduler=made)
        times, found = made.timesteps.tolist(), []
        for low, high in self.family.expert_timesteps(pipeline).values():
            found.append([step for step, t in enumerate(times) if low <= t < high])
        if not all(found):
            raise ValueError(
                f"`num_inference_steps` must have a step for each of the model's transformers, got {steps}, of which "
                "one has none. Take more steps."
            )
        return found

    def _passes(self, part: str, count: int) -> tuple[int, int]:
        """Passes of the teacher in the runs of a part, as they are planned: those in which a point is kept, others."""
        setting, kept, others = self.setting, 0, 0
        for served in self.served_steps():
            points = min(setting.points_per_trajectory, len(served))
            options = {"points_per_trajectory": points, "empty_share": 0.0, "seed": 0, "served": served}
            plans = plan_trajectories(part, count, 1, len(served), **options)
            for start in range(0, count, setting.sampling_batch_size):
                steps = {step for plan in plans[start : start + setting.sampling_batch_size] for step in plan.steps}
                kept += len(steps)
                others += max(steps) + 1 - len(steps)  # a batch goes on to the last step that it keeps
        return kept, others

    def _sampling(self) -> list[Work]:
        setting, rows = self.setting, self.setting.sampling_batch_size
        kept, target = self._passes("target", setting.num_target_trajectories)
        preserved = sum(self._passes("preserved", setting.num_preserved_trajectories))
        guided = 1 if self.family.embedded_guidance(self.config) else 2
        # The anchor is asked where a point of a target run is kept; guidance needs two prompts always.
        return [
            self._teacher_work(kept, (guided + 1) * rows, reads=setting.localization),
            self._teacher_work(target + preserved, guided * rows),
        ]

    def _text_work(self) -> Work:
        setting = self.setting
        size = (setting.text_batch_size, self.family.text_length(self.config))

        def begin(encoder: torch.nn.Module, device: torch.device) -> Callable[[], object]:
            return lambda: encoder(torch.zeros(size, dtype=torch.long, device=device))

        times = math.ceil(setting.num_prompts / setting.text_batch_size)
        build = partial(self.build, "text_encoder")
        config = self.base.component("text_encoder").whole_config()
        layers = getattr(config, "num_layers", None) or config.num_hidden_layers
        return inference_work("text encoder's activations", times, build, begin, layers)

    def _vae_work(self, times: int, *, decodes: bool = False) -> Work:
        """One clip."""
        setting, (frames, channels, height, width) = self.setting, self.latents
        pixels = (1, 3, setting.num_frames, setting.height, setting.width)
        size = (1, channels, frames, height, width) if decodes else pixels
        return vae_work(self.base, size, times, self.precision.dtype, decodes=decodes)

    def _teacher_work(self, times: int, rows: int, *, reads: bool = False) -> Work:
        """The frozen model is asked for some rows; for masks its attention is read in a third of them."""

        def make(**changed: Any) -> Job:
            model = self.build("transformer", **changed)
            concept = torch.zeros(rows, self.family.text_length(self.config), dtype=torch.bool)
            concept[: max(1, rows // 3), 0] = True

            def begin(device: torch.device) -> Callable[[], object]:
                velocity, text = self.velocity(model), self.text(rows, device)
                x_t = torch.randn(rows, *self.latents, device=device)
                t = torch.zeros(rows, dtype=torch.long, device=device)

                @torch.no_grad()
                def repeat() -> None:
                    with ExitStack() as stack:
                        if reads:
                            # Which rows hold the concept is data, which traced tensors do not have.
                            with _disable_current_modes():
                                stack.enter_context(concept_attention(model, concept))
                        stack.enter_context(self.precision.autocast(model))
                        velocity(x_t, t, text)

                return repeat

            return Job([model], begin)

        return Work(_TEACHER, times, make, layers=self.config.num_layers)

    def training_works(self) -> list[Work]:
        """The training's own step over samples without content."""
        setting, apart = self.setting, self._eraser_bytes + self._state_bytes  # gradients, and the optimizer's state
        rows = setting.target_rows + setting.preserved_rows
        recipe = EraserTraining(
            rank=setting.rank,
            kind=setting.kind,
            preserved_share=setting.preserved_rows / rows,
            localization_weight=1.0 if setting.localization else 0.0,
            separate_passes=setting.separate_passes,
        )

        def begin(model: torch.nn.Module, device: torch.device) -> Callable[[], torch.Tensor]:
            # One prompt, with data: the training keeps them in the host's memory.
            with _disable_current_modes():
                embeds = self.text(1)
            text = EraserText(embeds, embeds, embeds, embeds[0] if isinstance(embeds, torch.Tensor) else embeds)
            grid = self.family.token_grid(self.config, self.latents)
            maker = RowMaker(self.velocity(model), text, recipe, device, grid=grid, scheduler=None)
            step = EraserStep(maker, recipe, _ADAPTER_NAME)
            return lambda: step(model, self._samples(grid, device), torch.Generator())["loss"]

        times = self.parts_count * setting.max_train_steps
        work = Work(_STUDENT, times, self.student, layers=self.config.num_layers, apart=apart)
        options = {"optimizer": setting.optimizer, "weight_decay": 1e-2}
        return training_works(work, setting.gradient_accumulation_steps, self.precision, begin, **options)

    def _samples(self, grid: tuple[int, int, int], device: torch.device) -> dict[str, Any]:
        """A batch of teacher samples without content."""
        rows = max(self.setting.target_rows, self.setting.preserved_rows)

        def states(*velocities: str) -> dict[str, torch.Tensor]:
            names = ("x_t", *velocities)
            made = {name: torch.zeros(rows, *self.latents, device=device) for name in names}
            numbers = torch.zeros(rows, dtype=torch.long, device=device)
            return {**made, "t": numbers, "prompt": numbers}

        target = states("v_concept", "v_anchor")
        if self.setting.localization:
            target["mask"] = torch.zeros(rows, *grid, device=device)
        return {"target": target, "preserved": states("velocity")}

    def disk(self) -> dict[str, int]:
        """Files that a run leaves, and the kept trajectories."""
        setting = self.setting
        weights = self._eraser
        disk = {"eraser": self.parts_count * safetensors_bytes(weights) + REPORT_BYTES}
        if setting.latents_source == "trajectory":
            points = sum(min(setting.points_per_trajectory, len(served)) for served in self.served_steps())
            # x_t with v_concept and v_anchor, x_t with the velocity.
            latents = 3 * setting.num_target_trajectories + 2 * setting.num_preserved_trajectories
            itemsize = _STORAGE_DTYPES[setting.trajectories_dtype].itemsize
            disk[_SAMPLES] = points * latents * math.prod(self.latents) * itemsize
        if setting.num_checkpoints:
            size = checkpoint_bytes(weights.values(), weights.values(), optimizer=setting.optimizer)
            disk["checkpoints"] = self.parts_count * setting.num_checkpoints * size
        return disk
