"""Base models as shapes: classes and configs of their components without any weights, and what calls of them cost."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

from diffusers_ext.core.settings import did_you_mean
from diffusers_ext.core.text_files import read_json
from diffusers_ext.families import FAMILIES, families_of
from diffusers_ext.families.base_source import is_single_file
from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.noise_statistics import noise_statistics
from diffusers_ext.golden_noise.redenoise import guided_prediction, redenoise_sequence
from diffusers_ext.planning.settings import GoldenNoisePlanSettings
from diffusers_ext.planning.tracing import tensor_bytes
from diffusers_ext.planning.work import Job, Precision, Work, inference_work

DENOISERS = ("unet", "transformer")
TIMESTEP = 500


@dataclass(frozen=True)
class Component:
    """One model of a pipeline: its class, and what its config says besides the class's own defaults."""

    class_name: str
    config: Mapping[str, Any]

    def build(self, dtype: torch.dtype = torch.float32, **changed: Any) -> torch.nn.Module:
        """The model on the meta device, frozen, in eval mode; `changed` are other values of its config."""
        model_class, config = _model_class(self.class_name), {**self.config, **changed}
        with torch.device("meta"):
            if issubclass(model_class, diffusers.ModelMixin):
                model = model_class.from_config(config)
            else:
                model = model_class(model_class.config_class(**config))
        # Not the method of diffusers, which has a warning about every cast.
        return torch.nn.Module.to(model, dtype).requires_grad_(False).eval()

    def whole_config(self) -> Any:
        """The config with all fields, those that the class fills in too; nothing is built."""
        model_class = _model_class(self.class_name)
        if not issubclass(model_class, diffusers.ModelMixin):
            return model_class.config_class(**self.config)
        parameters = inspect.signature(model_class.__init__).parameters.values()
        defaults = {one.name: one.default for one in parameters if one.name != "self"}
        return FrozenDict({**defaults, **self.config})

    def parameters(self) -> int:
        """How many."""
        return sum(parameter.numel() for parameter in self.build().parameters())

    def bytes(self, dtype: torch.dtype) -> int:
        """Of the weights and buffers in a dtype."""
        return module_bytes(self.build(dtype))


@dataclass(frozen=True)
class BaseModel:
    """The components of a pipeline that have weights."""

    name: str  # as it is published, or the folder
    pipeline: str  # class name
    components: Mapping[str, Component]  # in the order of the pipeline
    stored_dtype: torch.dtype | None = None  # of published weights; `None` for a folder, which is there already
    index: Mapping[str, Any] = field(default_factory=dict)  # what `model_index.json` says besides components
    scheduler: tuple[str, Mapping[str, Any]] | None = None  # class and config, where they are known

    @property
    def denoiser(self) -> str:
        """Name of the UNet or transformer."""
        return next(name for name in DENOISERS if name in self.components)

    @property
    def text_encoders(self) -> list[str]:
        """Their names, in order."""
        return [name for name in self.components if name.startswith("text_encoder")]

    @property
    def download(self) -> int:
        """Bytes of the weights as they are published; 0 for a folder."""
        if self.stored_dtype is None:
            return 0
        sizes = (part.parameters() for part in self.components.values())
        return sum(sizes) * self.stored_dtype.itemsize

    def component(self, name: str) -> Component:
        """One of them; `ValueError` where there is none of that name."""
        if name not in self.components:
            raise ValueError(f"`model` must have a {name}, got {self.name} with {sorted(self.components)}.")
        return self.components[name]


def module_bytes(module: torch.nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return tensor_bytes([*module.parameters(), *module.buffers()])


def read_base_model(model: str | os.PathLike) -> BaseModel:
    """A published base model by its name, or a pipeline in a local folder.

    Nothing is fetched, and of a folder only configs are read. Raises `ValueError` where `model` is neither.
    """
    if Path(model).is_dir():
        return read_folder(Path(model))
    if is_single_file(model):
        raise ValueError(
            f"`model` must be the folder of a pipeline or a published name, got {model}, a single file, "
            "which has no configs to plan by. Name the model that it is derived from, such as SDXL."
        )
    found = published_model(str(model))
    if found is None:
        raise ValueError(
            f"`model` must be the folder of a pipeline or one of {published_names()}, got "
            f"{str(model)!r}.{did_you_mean(str(model), published_names())} Download another model and name its folder."
        )
    return found


def read_folder(folder: Path) -> BaseModel:
    """The pipeline in a local folder; `ValueError` where there is none, or one without a denoiser."""
    index = _read_json(folder / "model_index.json")
    components = {}
    for name, entry in index.items():
        class_name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        path = folder / name / "config.json"
        # Tokenizers and schedulers have no weights, and no config of this name.
        if class_name is None or not path.is_file() or _model_class(class_name) is None:
            continue
        config = {key: value for key, value in _read_json(path).items() if key[0] != "_"}
        components[name] = Component(class_name, config)
    if not set(components) & set(DENOISERS):
        raise ValueError(
            f"`model` must have one of {DENOISERS} with a config.json, got {folder} with {sorted(components)}."
        )
    said = {key: value for key, value in index.items() if key[0] != "_" and not isinstance(value, list)}
    kind, path = index.get("scheduler", (None, None))[1], folder / "scheduler" / "scheduler_config.json"
    scheduler = (kind, _read_json(path)) if kind is not None and path.is_file() else None
    return BaseModel(str(folder), index.get("_class_name", ""), components, None, said, scheduler)


def published_names() -> list[str]:
    """Short names of all that are known, in order."""
    return [model.short_name for family in FAMILIES for model in family.published]


def published_model(name: str) -> BaseModel | None:
    """The model of a short name or a name on the Hub, in any spelling; `None` for another."""
    wanted = _key(name.rpartition("/")[2])
    for family in FAMILIES:
        for model in family.published:
            if wanted in (_key(model.short_name), _key(model.repository.rpartition("/")[2])):
                parts = {part: Component(*of) for part, of in model.components.items()}
                told = (model.dtype, model.index, model.scheduler)
                return BaseModel(model.repository, family.pipelines[0], parts, *told)
    return None


def _key(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"`model` must be the folder of a pipeline, got one without {path}.")
    return read_json(path)


def _model_class(name: str) -> type[torch.nn.Module] | None:
    if name == "StableDiffusionSafetyChecker":
        return StableDiffusionSafetyChecker
    for library in (diffusers, transformers):
        found = getattr(library, name, None)
        if isinstance(found, type) and issubclass(found, torch.nn.Module):
            return found
    return None


class TextShape(NamedTuple):
    """One prompt as the denoiser reads it."""

    tokens: int
    width: int
    pooled: int | None
    second: tuple[int, int] | None  # tokens and width of a second text (Hunyuan-DiT)
    masked: bool


class ImageShapes:
    """Shapes of a base model at one `resolution`, pixels of a side; the model's own when `None`.

    Attributes:
        latents: `(channels, height, width)`, unpacked also for Flux.
        vae_latents, pixels: of one picture, as the VAE gives and takes them.
        text: of one prompt.

    Raises:
        ValueError: a pipeline that the `tool` is not known for, or a size that it cannot draw.
    """

    def __init__(self, base: BaseModel, resolution: int | None = None, tool: str = "golden_noise") -> None:
        families = {family.pipelines[0]: family for family in families_of(tool)}
        if base.pipeline not in families:
            raise ValueError(
                f"`model` must be a pipeline of {sorted(families)}, got {base.pipeline or 'none'} in {base.name}."
            )
        self.base, self.family = base, families[base.pipeline]
        self.config = base.component(base.denoiser).whole_config()
        sizes = self._assembled({"vae": base.component("vae").build()})
        scale, own = self.family.pixels_per_latent(sizes), self.family.sample_size(self.config)
        if resolution is None and not isinstance(own, int):
            raise ValueError("`resolution` must be given for a model without a square size of its own, got None.")
        self.resolution = own * scale if resolution is None else resolution
        multiple = scale * self.family.patch(self.config)
        if self.resolution < 1 or self.resolution % multiple:
            raise ValueError(f"`resolution` must be a multiple of {multiple} for {base.name}, got {self.resolution}.")
        side = self.resolution // scale
        self.latents = (self.family.latent_channels(self.config), side, side)
        self.vae_latents = tuple(self.family.to_vae(sizes, torch.empty(1, *self.latents, device="meta")).shape)
        frames = (1,) if self.family.video_vae else ()
        self.pixels = (1, 3, *frames, self.resolution, self.resolution)
        self.text = self._text()

    @property
    def embedded_guidance(self) -> bool:
        """Whether the denoiser takes the guidance scale as an input, so that one call is enough."""
        return self.family.embedded_guidance(self.config)

    @property
    def usual_guidance(self) -> float:
        """The guidance scale of the model where none is given."""
        return self.family.usual_guidance(getattr(diffusers, self.base.pipeline), self.config)

    def encoder_tokens(self, name: str) -> int:
        """How many tokens a text encoder reads."""
        component = self.base.component(name)
        if component.class_name.startswith(("T5", "UMT5")):
            return self.family.t5_tokens
        own = None if self.family.flow_matching else self.config.get("text_len")  # of Hunyuan-DiT's BERT
        config = component.whole_config()
        return own or min(getattr(config, "text_config", config).max_position_embeddings, self.family.longest_text)

    def conditioning(self, rows: int, device: torch.device, dtype: torch.dtype) -> TextConditioning:
        """Prompts without content, with their negative ones where the model takes any."""
        shape = self.text
        made = {"prompt_embeds": torch.randn(rows, shape.tokens, shape.width, dtype=dtype)}
        if shape.pooled is not None:
            made["pooled_prompt_embeds"] = torch.randn(rows, shape.pooled, dtype=dtype)
        if shape.second is not None:
            made["prompt_embeds_2"] = torch.randn(rows, *shape.second, dtype=dtype)
            made["attention_mask_2"] = torch.ones(rows, shape.second[0], dtype=torch.long)
        if shape.masked:
            made["attention_mask"] = torch.ones(rows, shape.tokens, dtype=torch.long)
        if not self.embedded_guidance:
            made |= {f"negative_{name}": tensor.clone() for name, tensor in made.items()}
        return TextConditioning(**made).to(device)

    def guided(
        self, pipeline: DiffusionPipeline, latents: torch.Tensor, text: TextConditioning, guidance_scale: float
    ) -> torch.Tensor:
        """A step's prediction: in one call where golden noise knows how, otherwise in a call for each side."""
        if "golden_noise" in self.family.tools:
            return guided_prediction(pipeline, latents, TIMESTEP, text, guidance_scale)
        latents, timestep = latents.to(text.prompt_embeds.dtype), torch.full((), TIMESTEP, device=latents.device)
        found = text.tensors()
        negative = {name.removeprefix("negative_"): x for name, x in found.items() if name.startswith("negative_")}
        sides = [text.positive()]
        if negative and guidance_scale != 1:
            sides.append(TextConditioning(**negative))
        outputs = [self.family.predict(pipeline, latents, timestep, side, guidance_scale).float() for side in sides]
        return outputs[-1] + guidance_scale * (outputs[0] - outputs[-1])

    def pipeline(self, dtype: torch.dtype) -> DiffusionPipeline:
        """The pipeline on the meta device with its denoiser and its VAE, in float32, alone."""
        dtypes = {self.base.denoiser: dtype, "vae": torch.float32}
        return self._assembled({name: self.base.component(name).build(dtypes[name]) for name in dtypes})

    def _assembled(self, parts: dict[str, Any]) -> DiffusionPipeline:
        pipeline_class = getattr(diffusers, self.base.pipeline)
        if "requires_safety_checker" in inspect.signature(pipeline_class.__init__).parameters:
            parts["requires_safety_checker"] = False
        parts["scheduler"] = (
            diffusers.FlowMatchEulerDiscreteScheduler()
            if self.family.flow_matching
            else diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
        )
        needed, _ = pipeline_class._get_signature_keys(pipeline_class)
        return pipeline_class(**{**dict.fromkeys(needed), **parts})

    def _text(self) -> TextShape:
        config, family = self.config, self.family
        shapes = family.text_shapes(config)
        tokens, width = shapes["prompt_embeds"]
        if tokens is None:
            present = self.base.text_encoders
            read = (n if n in present else present[-1] for n in family.token_encoders)
            tokens = sum(map(self.encoder_tokens, read))
        second = shapes.get("prompt_embeds_2")
        masked = "attention_mask" in family.text_fields and family.pads_text
        return TextShape(tokens, width, family.pooled_width(config), second, masked)


def encode_prompts_work(shapes: ImageShapes, rows: int, times: float, precision: Precision) -> Work:
    """All text encoders read `rows` prompts, as `encode_prompt` lets them."""
    names, hidden = shapes.base.text_encoders, shapes.family.reads_hidden_states
    sizes = [(rows, shapes.encoder_tokens(name)) for name in names]

    def build() -> torch.nn.Module:
        return torch.nn.ModuleList(shapes.base.component(name).build(precision.dtype) for name in names)

    def begin(encoders: torch.nn.Module, device: torch.device) -> Callable[[], object]:
        return lambda: [
            encoder(torch.zeros(size, dtype=torch.long, device=device), output_hidden_states=hidden)
            for encoder, size in zip(encoders, sizes, strict=True)
        ]

    return inference_work("text encoders' activations", times, build, begin)


def denoiser_work(
    shapes: ImageShapes,
    times: float,
    precision: Precision,
    begin: Callable[[DiffusionPipeline, torch.device], Callable[[], object]],
    kept_name: str | None = None,
) -> Work:
    """Calls of the denoiser in its pipeline, without gradients; as `inference_work`."""

    def make() -> Job:
        pipeline = shapes.pipeline(precision.dtype)
        modules = [getattr(pipeline, shapes.base.denoiser), pipeline.vae]
        return Job(modules, lambda device: torch.no_grad()(begin(pipeline, device)))

    return Work("denoiser's activations", times, make, kept_name)


def guided_work(shapes: ImageShapes, rows: int, guidance_scale: float, times: float, precision: Precision) -> Work:
    """A step of drawing `rows` pictures; guidance doubles them inside."""

    def begin(pipeline: DiffusionPipeline, device: torch.device) -> Callable[[], object]:
        latents = torch.randn(rows, *shapes.latents, device=device)
        text = shapes.conditioning(rows, device, precision.dtype)
        predict = partial(shapes.guided, pipeline, latents, text, guidance_scale)
        return lambda: latents + 0.1 * predict()

    return denoiser_work(shapes, times, precision, begin)


def redenoise_work(
    shapes: ImageShapes, setting: GoldenNoisePlanSettings, rows: int, times: float, precision: Precision
) -> Work:
    """Golden noises of `rows` pairs, and what is noted of them."""

    def begin(pipeline: DiffusionPipeline, device: torch.device) -> Callable[[], object]:
        text = shapes.conditioning(rows, device, precision.dtype)

        def repeat() -> None:
            source = torch.randn(rows, *shapes.latents)
            states = redenoise_sequence(
                pipeline, source.to(device), text, repeats=setting.num_steps, w1=setting.w1, w2=setting.w2
            )
            deltas = states.cpu() - source[:, None]
            noise_statistics(source + deltas.half()[:, -1].float())

        return repeat

    return denoiser_work(shapes, times, precision, begin)


def vae_work(base: BaseModel, size: tuple[int, ...], times: float, dtype: torch.dtype, *, decodes: bool) -> Work:
    """The VAE turns latents of this size into pixels in one piece, as without tiling, or pixels into latents."""

    def begin(vae: torch.nn.Module, device: torch.device) -> Callable[[], object]:
        given = torch.randn(size, dtype=dtype, device=device)
        return partial(vae.decode if decodes else vae.encode, given, return_dict=False)

    name = f"VAE's {'decoding' if decodes else 'encoding'}"
    return inference_work(name, times, partial(base.component("vae").build, dtype), begin)
