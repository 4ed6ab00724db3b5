"""The run of a null-space DreamBooth, from the statistics to the validation pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.data import TensorDataset

from diffusers_ext.core.capture import capture
from diffusers_ext.core.second_moment import SecondMoment
from diffusers_ext.nullspace.collect import shared_inputs, text_only
from diffusers_ext.nullspace.lora import INSTANCE_RUNS, lora_linears
from diffusers_ext.nullspace.projector import ProjectedUpdate
from diffusers_ext.nullspace.scope import attention_linears, check_no_features, settle_scope
from diffusers_ext.nullspace.settings import SCOPES
from diffusers_ext.nullspace.slots import check_features, find_linears
from diffusers_ext.nullspace.statistics import TEXT, FeatureStatistics
from diffusers_ext.nullspace.step import Condition, DreamBoothLoss, FlowSchedule, SoftLoss
from diffusers_ext.planning.models import (
    TIMESTEP,
    BaseModel,
    ImageShapes,
    denoiser_work,
    encode_prompts_work,
    guided_work,
    module_bytes,
    vae_work,
)
from diffusers_ext.planning.settings import NullSpacePlanSettings
from diffusers_ext.planning.tracing import (
    REPORT_BYTES,
    OriginTrace,
    checkpoint_bytes,
    fake_tensors,
    fill_with_fake_tensors,
    safetensors_bytes,
    tensor_bytes,
)
from diffusers_ext.planning.work import (
    OPTIMIZER,
    WEIGHT_DTYPES,
    Draft,
    Job,
    Phase,
    Precision,
    Update,
    Work,
    training_works,
)

_TEXT_BATCH = 16  # times `statistics_batch_size`
_PICTURE_BYTES_PER_PIXEL = 1.5  # of a photographic PNG
_TRAINED, _STATISTICS = "weights that train", "statistics"


def draft_nullspace(base: BaseModel, setting: NullSpacePlanSettings, *, as_on_gpu: bool = True) -> Draft:
    """The phases of a null-space DreamBooth; `ValueError` for a pipeline or a setting that it cannot take."""
    setting.features = check_features(setting.features)
    shapes = ImageShapes(base, setting.resolution, "nullspace")
    setting.resolution = shapes.resolution
    run = NullSpaceRun(shapes, setting, as_on_gpu)
    notes = []
    if run.counts:
        notes.append(f"{setting.num_knowledge_prompts} preserved prompts of {setting.words_per_prompt} words.")
    if shapes.family.flow_matching:
        notes.append(f"Prompts of {shapes.text.tokens} tokens, the most that the model reads by default.")
    denoiser, covered = run.trained_denoiser()
    parts = run.parts(denoiser, covered)
    phases, disk = run.phases(tuple(parts), covered), run.disk(denoiser, covered)
    return Draft("nullspace", base, asdict(setting), parts, phases, disk, notes)


class Covered(NamedTuple):
    """The Linears whose inputs are counted."""

    sources: dict[str, str]  # {dotted name: key of its matrix}
    widths: dict[str, int]  # {key: width}
    readers: dict[str, str]  # {key: dotted name} of those that are read along denoising runs

    @property
    def bytes(self) -> int:
        """Of all matrices, in float64."""
        return 8 * sum(width**2 for width in self.widths.values())

    def empty_statistics(self, device: torch.device) -> FeatureStatistics:
        """Statistics of one vector that is zero."""
        moments = {key: SecondMoment(width, device) for key, width in self.widths.items()}
        for moment in moments.values():
            moment.count = 1
        return FeatureStatistics(moments, dict(self.sources), {})


@dataclass(frozen=True)
class NullSpaceRun:
    """A base model and how a subject is taught to it, as shapes."""

    shapes: ImageShapes
    setting: NullSpacePlanSettings
    as_on_gpu: bool = True

    def __post_init__(self) -> None:
        """Take the model's guidance where none is given."""
        if self.setting.guidance_scale is None:
            self.setting.guidance_scale = self.shapes.usual_guidance

    @property
    def precision(self) -> Precision:
        """Of the denoiser's calls."""
        return Precision(WEIGHT_DTYPES[self.setting.mixed_precision], self.as_on_gpu)

    @property
    def counts(self) -> bool:
        """Whether statistics are collected."""
        return self.setting.directions != "plain"

    def covered(self, denoiser: torch.nn.Module) -> Covered:
        """What statistics cover of a denoiser without an adapter."""
        if settle_scope(denoiser, self.setting.scope) is not None:
            check_no_features(self.setting.features, self.setting.layers)
            return self.scoped
        linears = find_linears(denoiser, self.setting.features, self.setting.layers)
        text = {name: TEXT for name in linears if text_only(denoiser, name)}
        shared = shared_inputs([name for name in linears if name not in text])
        sources = {name: text.get(name) or shared[name] for name in linears}
        widths = {key: linears[name].in_features for name, key in sources.items()}
        return Covered(sources, widths, {key: name for name, key in reversed(shared.items())})

    @cached_property
    def scoped(self) -> Covered:
        """Of a joint model, as `scoped_linears` finds it: by what the tensors are computed from that Linears read."""
        shapes, scope = self.shapes, self.setting.scope or SCOPES[0]
        pipeline = shapes.pipeline(torch.float32)
        model = getattr(pipeline, shapes.base.denoiser)
        linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        read: dict[str, torch.Tensor] = {}
        with fake_tensors(), torch.no_grad():
            fill_with_fake_tensors(model)
            latents, timestep = torch.zeros(1, *shapes.latents), torch.full((), TIMESTEP)
            text = shapes.conditioning(1, torch.device("cpu"), torch.float32).positive()
            named = {TEXT: [text.prompt_embeds], "others": [latents, timestep]}
            if text.pooled_prompt_embeds is not None:
                named["others"].append(text.pooled_prompt_embeds)
            with OriginTrace(named) as trace, capture(model, linears, read.__setitem__):
                shapes.family.predict(pipeline, latents, timestep, text, 1.0)
            alone = [name for name, x in read.items() if trace.of(x) == {TEXT}]
            keys = {(text.prompt_embeds.untyped_storage()._cdata, text.prompt_embeds.shape): TEXT}
            runs = [name for name in attention_linears(model, shapes.family, scope) if name not in alone]
            sources = {n: keys.setdefault((read[n].untyped_storage()._cdata, read[n].shape), n) for n in alone + runs}
        widths = {key: linears[name].in_features for name, key in sources.items()}
        return Covered(sources, widths, {sources[name]: name for name in reversed(runs)})

    def trained_denoiser(self) -> tuple[torch.nn.Module, Covered]:
        """The denoiser as it trains, and what statistics cover."""
        setting = self.setting
        denoiser = self.shapes.base.component(self.shapes.base.denoiser).build(self.precision.dtype)
        covered = self.covered(denoiser)
        if setting.full_finetune:
            for name in covered.sources:
                weight = denoiser.get_submodule(name).weight
                weight.data = weight.data.float()
                weight.requires_grad_(True)
        else:
            config = LoraConfig(r=setting.rank, lora_alpha=setting.rank, target_modules=list(covered.sources))
            with torch.device("meta"):
                inject_adapter_in_model(config, denoiser, "default")
            for _, layer in lora_linears(denoiser):
                a, b = (part["default"].float().weight for part in (layer.lora_A, layer.lora_B))
                a.requires_grad_(setting.directions not in ("generalized", "null"))
                b.requires_grad_(True)
        if setting.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        return denoiser.train(), covered

    def parts(self, denoiser: torch.nn.Module, covered: Covered) -> dict[str, int]:
        """Bytes of all that is loaded; the VAE stays in float32."""
        own, names = self.shapes.base.denoiser, self.shapes.base.components
        sizes = {name.replace("_", " "): self._size(name) for name in names if name != own}
        new = tensor_bytes(list(_adapter(denoiser).values()) or _trained(denoiser))
        sizes = {own: module_bytes(denoiser) - new, **sizes, _TRAINED: new}
        return {**sizes, _STATISTICS: covered.bytes if self.counts else 0}

    def phases(self, loaded: tuple[str, ...], covered: Covered) -> list[Phase]:
        """In order; `loaded` are all parts."""
        setting, shapes = self.setting, self.shapes
        frozen = tuple(name for name in loaded if name not in (_TRAINED, _STATISTICS))
        phases = []
        if self.counts:
            phases.append(Phase("statistics", frozen, self._statistics_works(covered)))
        encoded = setting.views
        if setting.with_prior_preservation:
            encoded += setting.num_class_images
            batch = min(setting.train_batch_size, setting.num_class_images)
            drawn = self._picture_works(setting.num_class_images, batch)
            phases.append(Phase("class pictures", loaded, drawn))
        encoding = vae_work(shapes.base, shapes.pixels, encoded, torch.float32, decodes=False)
        phases.append(Phase("encoding", loaded, [encoding]))
        if shapes.family.flow_matching and not setting.full_finetune:  # their text is encoded, and they are let go
            loaded = tuple(name for name in loaded if not name.startswith("text encoder"))
        phases.append(Phase("training", (*loaded, OPTIMIZER), self.training_works()))
        if setting.num_validation_prompts:
            count = setting.num_validation_prompts * setting.validations
            drawn = self._picture_works(count * setting.num_validation_images, setting.num_validation_images)
            phases.append(Phase("validation", (*loaded, OPTIMIZER), drawn))
        return phases

    def _statistics_works(self, covered: Covered) -> list[Work]:
        setting, works = self.setting, []
        if len(covered.readers) < len(covered.widths):
            rows = min(_TEXT_BATCH * setting.statistics_batch_size, setting.num_texts)
            times = setting.num_texts / rows
            works.append(encode_prompts_work(self.shapes, rows, times, self.precision))
            widths = [width for key, width in covered.widths.items() if key not in covered.readers]
            works.append(self._text_moment_work(widths, rows, times))
        if covered.readers:
            batches = math.ceil((setting.num_knowledge_prompts + 1) / setting.statistics_batch_size)
            if self.shapes.family.flow_matching:  # where the subject's own statistics are of runs, too
                batches += math.ceil(INSTANCE_RUNS / setting.statistics_batch_size)
            works.append(self.trajectory_work(batches * setting.num_inference_steps))
        return works

    def _picture_works(self, count: int, rows: int) -> list[Work]:
        """Pictures are denoised together and decoded one by one."""
        calls, scale = self.setting.num_inference_steps * count / rows, self.setting.guidance_scale
        return [
            guided_work(self.shapes, rows, scale, calls, self.precision),
            vae_work(self.shapes.base, self.shapes.vae_latents, count, torch.float32, decodes=True),
        ]

    def _text_moment_work(self, widths: list[int], rows: int, times: float) -> Work:
        """Second moments of what is read of `rows` prompts."""

        def begin(device: torch.device) -> Callable[[], object]:
            made = {"dtype": self.precision.dtype, "device": device}
            read = [torch.randn(rows, self.shapes.text.tokens, width, **made) for width in widths]
            moments = [SecondMoment(width, device, torch.float64) for width in widths]
            return lambda: [moment.update(x) for moment, x in zip(moments, read, strict=True)]

        return Work("text's second moments", times, lambda: Job([], begin))

    def trajectory_work(self, times: float) -> Work:
        """A denoiser call of a denoising run, whose features are counted."""
        rows, shapes = self.setting.statistics_batch_size, self.shapes

        def begin(pipeline: DiffusionPipeline, device: torch.device) -> Callable[[], object]:
            denoiser = getattr(pipeline, shapes.base.denoiser)
            covered, modules = self.covered(denoiser), dict(denoiser.named_modules())
            targets = {key: modules[name] for key, name in covered.readers.items()}
            moments = {key: SecondMoment(covered.widths[key], device) for key in targets}
            latents = torch.randn(rows, *shapes.latents, device=device)
            text = shapes.conditioning(rows, device, self.precision.dtype)

            def repeat() -> None:
                with capture(denoiser, targets, lambda key, x: moments[key].update(x)):
                    shapes.guided(pipeline, latents, text, self.setting.guidance_scale)

            return repeat

        return denoiser_work(shapes, times, self.precision, begin, _STATISTICS)

    def training_works(self) -> list[Work]:
        """The training's own step over latents without content."""
        setting, shapes, dtype = self.setting, self.shapes, self.precision.dtype
        soft = setting.directions == "soft"
        levels = torch.linspace(1, 1e-3, 1000)
        schedule = FlowSchedule(levels) if shapes.family.flow_matching else DDPMScheduler()
        pipeline = shapes.pipeline(dtype)  # asked for sizes alone

        def begin(denoiser: torch.nn.Module, device: torch.device) -> Callable[[], torch.Tensor]:
            def latents() -> list[torch.Tensor]:
                size = (setting.train_batch_size, *shapes.latents)
                return [torch.zeros(size, device=device) for _ in range(2)]

            text = shapes.conditioning(1, device, dtype).positive()
            condition, prior = Condition(text, shapes.family, pipeline), {}
            if setting.with_prior_preservation:
                pictures = TensorDataset(*latents())
                prior = {"class_latents": pictures, "class_condition": condition}
            step = DreamBoothLoss(schedule, condition, **prior)
            if soft and not setting.full_finetune:
                step = SoftLoss(step, covered.empty_statistics(device), 1.0)
            batch = latents()
            return lambda: step(denoiser, batch, torch.Generator())["loss"]

        def update(optimizer: torch.optim.Optimizer, device: torch.device) -> Update:
            projections = _projections(optimizer.param_groups[0]["params"], device)
            return lambda: ProjectedUpdate(optimizer, projections)

        covered = self.trained_denoiser()[1] if soft else None
        name, build = "activations and gradients", lambda: self.trained_denoiser()[0]
        work = Work(name, setting.max_train_steps, build, OPTIMIZER)
        options = {"update": update} if setting.full_finetune else {}
        batches, used = setting.gradient_accumulation_steps, setting.optimizer
        return training_works(work, batches, self.precision, begin, optimizer=used, **options)

    def disk(self, denoiser: torch.nn.Module, covered: Covered) -> dict[str, int]:
        """Files that a run leaves."""
        setting, disk, trained = self.setting, {}, _trained(denoiser)
        kept = list(_adapter(denoiser).values()) or trained
        if setting.full_finetune:
            sizes = {name: self._size(name) for name in self.shapes.base.components}
            disk["pipeline"] = sum({**sizes, self.shapes.base.denoiser: module_bytes(denoiser)}.values())
        else:
            prefix = self.shapes.base.denoiser
            config = LoraConfig(r=setting.rank, target_modules=list(covered.sources)).to_dict()
            text = json.dumps({f"{prefix}.{name}": v for name, v in config.items()}, default=list)
            named = {f"{prefix}.{name}": tensor for name, tensor in _adapter(denoiser).items()}
            disk["LoRA"] = safetensors_bytes(named, {"lora_adapter_metadata": text})
        if self.counts:
            moments = covered.empty_statistics(torch.device("meta")).moments
            totals = {f"{key}.total": moment.total for key, moment in moments.items()}
            names = len(json.dumps(covered.sources, indent=2))
            disk["statistics"] = safetensors_bytes(totals) + names + REPORT_BYTES
        picture = self.shapes.resolution**2 * _PICTURE_BYTES_PER_PIXEL
        if setting.num_validation_prompts:
            pictures = setting.num_validation_prompts * setting.num_validation_images
            disk["pictures"] = int(setting.validations * pictures * picture)
        if setting.with_prior_preservation:
            disk["class pictures"] = int(setting.num_class_images * picture)
        if setting.num_checkpoints:
            size = checkpoint_bytes(kept, trained, optimizer=setting.optimizer)
            disk["checkpoints"] = setting.num_checkpoints * size
        return {**disk, "report": REPORT_BYTES // 2}

    def _size(self, name: str) -> int:
        dtype = torch.float32 if name == "vae" else self.precision.dtype
        return self.shapes.base.component(name).bytes(dtype)


def _trained(denoiser: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in denoiser.parameters() if parameter.requires_grad]


def _adapter(denoiser: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the LoRA's file by their names in the denoiser; none without a LoRA."""
    tensors = {}
    for name, layer in lora_linears(denoiser):
        tensors[f"{name}.lora_A.weight"] = layer.lora_A["default"].weight
        tensors[f"{name}.lora_B.weight"] = layer.lora_B["default"].weight
    return tensors


def _projections(weights: list[torch.nn.Parameter], device: torch.device) -> Mapping[torch.nn.Parameter, torch.Tensor]:
    """A projection for each weight; those of one width share it, as Linears with one input do."""
    widths = {weight.shape[1] for weight in weights}
    shared = {n: torch.zeros(n, n, dtype=torch.float64, device=device) for n in widths}
    return {weight: shared[weight.shape[1]] for weight in weights}
