"""The class that a base-model family fills in: all that a tool must know of its models and their text."""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from diffusers_ext.families.predictions import Level, scheduler_level
from diffusers_ext.families.published import Published
from diffusers_ext.families.text_conditioning import Text, TextConditioning, token_embeds, with_negatives
from diffusers_ext.families.velocity import TokenGrid, Velocity, latent_scale

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


# Blocks of diffusers' UNets and transformers with cross-attention.
_BLOCK_FEATURES = {
    **{
        f"{prefix}{slot}": (block, slot, path)
        for prefix, block in (("", "attn2"), ("attn1.", "attn1"))
        for slot, path in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0"))
    },
    "ff.in": ("ff", "ff_in", "net.0.proj"),
    "ff.out": ("ff", "ff_out", "net.2"),
}


class NetworkSizes(NamedTuple):
    """What a golden-noise network must be made for to fit a model."""

    in_channels: int  # of the unpacked latents
    text_embed_dim: int  # of the token embeddings
    pooled_dim: int | None = None  # of the pooled embeddings, where the family has them


class Family:
    """A base-model family; what is said here holds for most, a subclass says what differs.

    Classes are named, not imported, so that knowing a family costs nothing: by their bare name where they are
    diffusers', as `"module:Name"` otherwise. Methods take a pipeline, its denoiser's `config` or the denoiser.
    """

    name: ClassVar[str]  # for files and reports
    title: ClassVar[str]  # for messages
    pipelines: ClassVar[tuple[str, ...]]  # the first draws from text alone
    modular_blocks: ClassVar[tuple[str, ...]] = ()  # of modular diffusers, that draw from text
    draws_pictures: ClassVar[bool] = False  # and no clips; to an eraser they are clips of one frame
    image_pipeline: ClassVar[str | None] = None  # draws clips from a first frame besides; erasers train on it as well
    published: ClassVar[tuple[Published, ...]] = ()  # models on the Hub, for the planner
    tools: ClassVar[frozenset[str]] = frozenset()  # that work with it: "nullspace", "golden_noise", "eraser"
    needs_diffusers: ClassVar[str | None] = None  # the first version whose pipeline does what is said here
    golden_pipeline: ClassVar[str | None] = None  # of this package, with a golden-noise network
    nullspace_pipeline: ClassVar[str | None] = None  # of this package, with feature statistics
    # Of its text encoder's keys in a whole checkpoint, which tells it from others.
    single_file_prefix: ClassVar[str | None] = None
    # What other programs read in a LoRA's metadata: {width of the text: (version of kohya's scripts, architecture)}.
    lora_versions: ClassVar[Mapping[int, tuple[str, str | None]]] = {}
    # How ComfyUI calls the modules of a transformer's LoRAs, where not as diffusers: regular expressions, replaced one
    # by one; `None` where it does not read them or that is not known.
    comfyui_names: ClassVar[Mapping[str, str] | None] = {}
    denoiser: ClassVar[str] = "transformer"  # component of the pipeline, and the key prefix of its LoRAs
    denoiser_class: ClassVar[str]
    vae_class: ClassVar[str] = "AutoencoderKL"
    video_vae: ClassVar[bool] = False  # to which a picture is a clip of one frame
    # The model predicts `noise - x_0` on straight paths; otherwise what its scheduler's `prediction_type` says, at the
    # levels of `alphas_cumprod`. `predictions.py` converts them.
    flow_matching: ClassVar[bool] = False
    negated_output: ClassVar[bool] = False  # the denoiser gives minus what it predicts, and the pipeline turns it
    own_levels: ClassVar[bool] = False  # the pipeline hands its scheduler levels of noise, evenly spaced
    text_fields: ClassVar[tuple[str, ...]] = ("prompt_embeds",)  # of `TextConditioning` that the denoiser reads
    token_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)  # whose tokens it reads, one after the other
    reads_hidden_states: ClassVar[bool] = False  # of its text encoders, by the pipeline
    t5_tokens: ClassVar[int] = 256  # that T5 reads where the pipeline's call has the default length
    longest_text: ClassVar[int] = 512  # that a language model reads by default
    pads_text: ClassVar[bool] = True  # to one length; else one is as long as its prompt, and alone it needs no mask
    # Where `encode_prompt` returns what a golden-noise network reads: {argument of `refine`: place}.
    text_outputs: ClassVar[Mapping[str, int]] = {"prompt_embeds": 0}
    call_arguments: ClassVar[Mapping[str, Any]] = {}  # that make the pipeline take latents of any size as they are
    # Of the call that asks the denoiser once a step and for as little as it can, where defaults and guidance 1 do not.
    smallest_call: ClassVar[Mapping[str, Any]] = {}
    read_by_constructor: ClassVar[tuple[str, ...]] = ()  # components that the pipeline cannot be made without
    reports_steps: ClassVar[bool] = True  # the call's `callback_on_step_end` shows all that a velocity reads
    noises_clips: ClassVar[bool] = True  # a velocity reads clips that are noised, and nothing else that moves
    decoders: ClassVar[tuple[str, ...]] = ("vae",)  # components that make clips of latents
    # Components between the text encoder and the denoiser, that read text alone and take LoRAs.
    text_components: ClassVar[tuple[str, ...]] = ()
    checkpointing_fault: ClassVar[str | None] = None  # what diffusers' gradient checkpointing does to its predictions
    latents_dtype: ClassVar[torch.dtype | None] = None  # that the call denoises in; `None` for the denoiser's
    rounds_size: ClassVar[bool] = False  # the pipeline draws the next smaller size where patches do not tile latents
    blocks: ClassVar[str] = "transformer_blocks"  # list in the denoiser
    text_attention: ClassVar[str | None] = "attn2"  # module of a block where text enters by cross-attention
    # Linears whose inputs null space counts: {feature: (module of a block, slot, Linear of that module)}.
    features: ClassVar[Mapping[str, tuple[str, str, str]]] = _BLOCK_FEATURES
    # Ends of the names of Linears in joint attention: keys and values that read the text stream, and all of them.
    text_stream: ClassVar[tuple[str, ...]] = ("add_k_proj", "add_v_proj")
    attention_linears: ClassVar[tuple[str, ...]] = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip
    # Module of a block that gives video tokens, or `(video, text)`; an eraser takes the place of the dropout that ends
    # its `to_out`. `joint_blocks` are the classes of those blocks.
    joint_attention: ClassVar[str | None] = None
    joint_blocks: ClassVar[tuple[str, ...]] = ()
    video_alone: ClassVar[bool] = False  # its `to_out` reads video tokens alone, and it may give no text
    # Where it gives one stream of both: of the keywords of its call, which tokens are video's, `(batch, tokens, 1)`.
    video_rows: ClassVar[Callable[[Mapping[str, Any]], torch.Tensor] | None] = None
    masks_padding: ClassVar[bool] = False  # the pipeline hides padding from its text encoder
    # Module of a block in which video alone looks at text alone and a concept is seen, if not in `joint_attention`.
    text_keys: ClassVar[str | None] = None
    locates_concepts: ClassVar[bool] = False  # `eraser.concept_attention` reads that attention
    # That erasers are trained in, without flow matching.
    prediction_types: ClassVar[tuple[str, ...]] = ("v_prediction",)

    # Text

    def encode(self, pipeline: DiffusionPipeline, prompts: list[str], negatives: list[str] | None) -> TextConditioning:
        """Encode prompts as the pipeline's own call does; without `negatives`, with those that it takes by itself.

        `ValueError` for negative prompts of a model that takes none.
        """
        raise NotImplementedError

    def token_ids(self, pipeline: DiffusionPipeline, prompt: str) -> list[list[int]]:
        """Of the text that the denoiser reads for a prompt, without padding: a list for each of `token_encoders`."""
        tokenizers = [getattr(pipeline, name.replace("text_encoder", "tokenizer")) for name in self.token_encoders]
        return [tokenizer(prompt, truncation=True).input_ids for tokenizer in tokenizers]

    def text_call(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        """Keywords of the pipeline's call and of `encode_prompt` where its text encoder is none of the defaults'."""
        return {}

    def text_shapes(self, config: Any) -> dict[str, tuple[int | None, ...]]:
        """What follows the batch in the shapes of the text; `None` for any length."""
        shapes: dict[str, tuple[int | None, ...]] = {"prompt_embeds": (None, self.text_width(config))}
        pooled = self.pooled_width(config)
        return shapes if pooled is None else {**shapes, "pooled_prompt_embeds": (pooled,)}

    def text_width(self, config: Any) -> int:
        """Width of the token embeddings that the denoiser reads."""
        return config.cross_attention_dim

    def pooled_width(self, config: Any) -> int | None:
        """Width of the pooled embeddings; `None` where the denoiser reads none."""
        return None

    def added_conditions(
        self, pipeline: DiffusionPipeline, pooled: torch.Tensor | None, height: int, width: int, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """What a UNet is told besides the tokens, of pooled text and the size of a picture in pixels."""
        return {}

    def text_arguments(self, text: TextConditioning) -> dict[str, torch.Tensor]:
        """Keywords of the pipeline's call for prompts that are encoded."""
        return {
            name.replace("attention_mask", "prompt_attention_mask"): tensor for name, tensor in text.tensors().items()
        }

    def network_text(
        self, encoded: tuple[torch.Tensor | None, ...], arguments: Mapping[str, Any]
    ) -> dict[str, torch.Tensor | None]:
        """What a golden-noise network reads of what `encode_prompt` returned for `arguments`."""
        return {name: encoded[place] for name, place in self.text_outputs.items()}

    def modular_text(self, state: Any) -> dict[str, torch.Tensor | None]:
        """The same, from the state of a modular pipeline whose text is repeated for its pictures."""
        return {name: state.get(name) for name in self.text_outputs}

    # Latents

    def latent_channels(self, config: Any) -> int:
        """Of the latents, unpacked."""
        return int(config.in_channels)

    def patch(self, config: Any) -> int:
        """Latent pixels of a side that make one token."""
        return config.get("patch_size", 1)

    def sample_size(self, config: Any) -> int | tuple[int, int]:
        """Side of the latents that the pipeline draws by itself, or height and width."""
        return config.sample_size

    def longest_side(self, config: Any) -> int | None:
        """Tokens of a side that the denoiser has positions for; `None` where it computes them."""
        return None

    def pack(self, pipeline: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(batch, channels, height, width)` as the pipeline's call takes them."""
        return latents

    def unpack(self, pipeline: DiffusionPipeline, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The way back from `pack`, of a picture of `height` x `width` pixels."""
        return latents

    def drawn(self, pipeline: DiffusionPipeline, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """What the pipeline's call returns with `output_type="latent"`, unpacked."""
        return self.unpack(pipeline, latents, height, width)

    def pixels_per_latent(self, pipeline: DiffusionPipeline) -> int:
        """Pixels of a side that make one latent pixel of `predict`."""
        return pipeline.vae_scale_factor

    def latent_scale(self, vae: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Offset and factor, float32, of `from_vae`'s latents: the denoiser's are `(latents - offset) * factor`."""
        return latent_scale(vae)

    def from_vae(self, pipeline: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's latents of pictures `(batch, channels, height, width)`, arranged as `predict` takes them."""
        return latents[:, :, 0] if self.video_vae else latents

    def to_vae(self, pipeline: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
        """The way back from `from_vae`."""
        return latents.unsqueeze(2) if self.video_vae else latents

    def network_sizes(self, config: Any) -> NetworkSizes:
        """What a golden-noise network for this denoiser must be made for."""
        channels = self.latent_channels(config)
        return NetworkSizes(channels, self.text_width(config), self.pooled_width(config))

    # Prediction

    def prediction_type(self, scheduler: Any) -> str | None:
        """What the model predicts under a scheduler, one of `PREDICTION_TYPES`."""
        return "flow_prediction" if self.flow_matching else scheduler.config.get("prediction_type")

    def level(self, scheduler: Any, timesteps: torch.Tensor, x_t: torch.Tensor) -> Level:
        """Where `x_t` lies between x_0 and noise; see `scheduler_level`."""
        return scheduler_level(scheduler, timesteps, x_t, flow_matching=self.flow_matching)

    def embedded_guidance(self, config: Any) -> bool:
        """Whether the denoiser takes the guidance scale as an input (Flux.1-dev, LCM)."""
        return False

    def predict(
        self,
        pipeline: DiffusionPipeline,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: TextConditioning,
        guidance_scale: float,
    ) -> torch.Tensor:
        """One call of the denoiser as its pipeline makes it, without guidance; the shape of `latents`.

        Args:
            latents: `(batch, channels, height, width)`, unpacked, in the denoiser's dtype and on its device.
            timestep: scalar, on the scheduler's scale.
            text: one prompt a sample, in the same dtype.
            guidance_scale: read by models that take it as an input.
        """
        raise NotImplementedError

    def guidance_arguments(self, config: Any, guidance_scale: float) -> dict[str, Any]:
        """What guides the pipeline's call at a scale."""
        return {"guidance_scale": guidance_scale}

    def usual_guidance(self, pipeline_class: type[DiffusionPipeline], config: Any) -> float:
        """The scale where none is given, by the denoiser's config: what a flow-matching call has by itself."""
        if not self.flow_matching:
            return 7.5
        name = next(iter(self.guidance_arguments(config, 1.0)))
        return float(signature(pipeline_class.__call__).parameters[name].default)

    def grid_arguments(self, config: Any, num_steps: int, image_tokens: int) -> dict[str, Any]:
        """What the pipeline passes to `set_timesteps` of a flow-matching scheduler with this `config`.

        A dynamic shift depends on the tokens of a picture.
        """
        levels = {"sigmas": [1 - i / num_steps for i in range(num_steps)]} if self.own_levels else {}
        if not config.use_dynamic_shifting:
            return levels
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        shift = calculate_shift(
            image_tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        return {"mu": shift, **levels}

    # Attention, and where text enters

    def reads_text_alone(self, denoiser: torch.nn.Module, layer: str, slot: str) -> bool:
        """Whether a Linear reads the text as the pipeline gives it; other denoisers transform it first."""
        return False

    # Clips, and where an eraser attaches

    def encode_clip_prompts(self, pipeline: DiffusionPipeline, prompts: list[str]) -> Text:
        """What the call makes of prompts, `""` unconditional, of one length; a tensor where embeddings are all."""
        return self.encode(pipeline, prompts, None).positive()

    def clean_prompt(self, prompt: str) -> str:
        """A prompt as the pipeline's tokenizer gets it."""
        return prompt

    def prompt_length(self, pipeline: DiffusionPipeline) -> int:
        """Tokens that a pipeline's prompts are padded to."""
        return self.text_length(pipeline.transformer.config)

    def clip_arguments(self, text: Text, empty: Text, latents: torch.Tensor | None = None) -> dict[str, Any]:
        """Of the pipeline's call, for prompts guided away from others and latents `(batch, frames, channels, ...)`."""
        tokens = token_embeds(text).shape[1]
        if isinstance(text, torch.Tensor):
            arguments = {"prompt_embeds": text, "negative_prompt_embeds": empty, "max_sequence_length": tokens}
        else:
            arguments = self.text_arguments(with_negatives(text, empty))
        return arguments if latents is None else {**arguments, "latents": latents}

    def guided_call(self, pipeline: Any, guidance_scale: float) -> AbstractContextManager[dict[str, Any]]:
        """Keywords of the pipeline's call at a scale, and what else it needs while it runs."""
        return nullcontext({"guidance_scale": guidance_scale})

    def clip_latents(self, latents: torch.Tensor, latent_shape: Sequence[int]) -> torch.Tensor:
        """What the pipeline's call keeps or returns as latents, `(batch, frames, channels, height, width)`."""
        return latents

    def expert_timesteps(self, pipeline: DiffusionPipeline) -> dict[str, tuple[float, float]]:
        """The pipeline's denoisers by component, and the timesteps from and below which each is asked."""
        return {self.denoiser: (-math.inf, math.inf)}

    @property
    def eraser_target(self) -> str:
        """End of the names of the leaves whose place an eraser takes."""
        return f"{self.joint_attention}.to_out.1"

    def is_joint_attention(self, attention: torch.nn.Module, block: torch.nn.Module) -> bool:
        """Whether an attention of a block is one that an eraser goes beside, also where something wraps it."""
        kinds = {parent.__name__ for parent in type(block).__mro__}
        return bool(kinds.intersection(self.joint_blocks)) and attention is getattr(block, self.joint_attention, None)

    def beside(self, targets: str | Collection[str] | None) -> Family:
        """The family as erasers with such `target_modules` attach to it, where some lie beside other attentions."""
        return self

    def check_attachment(self, config: Any) -> None:
        """Raise `ValueError` for a denoiser of the family's class that erasers do not know."""

    def text_length(self, config: Any) -> int:
        """Tokens that prompts are padded to, by the denoiser's config."""
        raise NotImplementedError

    def clip_size(self, config: Any, vae_config: Any) -> tuple[int, int, int]:
        """Frames, height and width in pixels that the model was made for."""
        raise NotImplementedError

    def latent_shape(
        self, config: Any, vae_config: Any, num_frames: int, height: int, width: int
    ) -> tuple[int, int, int, int]:
        """Shape `(frames, channels, height, width)` of the latents that the pipeline denoises for a clip.

        Raises:
            ValueError: a number of frames or a size that the model cannot take; names the nearest.
        """
        raise NotImplementedError

    def image_channels(self, config: Any) -> int:
        """Channels of a first frame behind those of the noise, that `image_latents` of such a family makes."""
        return 0

    def attention_width(self, config: Any) -> int:
        """Of the attentions that erasers go beside, the narrowest."""
        return int(config["num_attention_heads"]) * int(config.get("attention_head_dim", 64))

    def size_arguments(self, num_frames: int, height: int, width: int) -> dict[str, int]:
        """Keywords of the pipeline's call for a size."""
        return {"num_frames": num_frames, "height": height, "width": width}

    def token_grid(self, config: Any, latent_shape: Sequence[int]) -> TokenGrid:
        """The grid of video tokens of latents `(frames, channels, height, width)`, batched or not.

        Raises:
            ValueError: latents that patches do not tile.
        """
        raise NotImplementedError

    def velocity(
        self, pipeline: DiffusionPipeline, num_frames: int, height: int, width: int, **conditions: Any
    ) -> Velocity:
        """The denoiser's velocity for clips of so many frames and pixels, with the pipeline's conditions.

        `expert`, where a pipeline has several denoisers, names the one whose part it is: one of `expert_timesteps`.

        Raises:
            ValueError: a scheduler that does not take velocities, or a clip that the model cannot take.
        """
        raise NotImplementedError

    def empty_velocity(
        self, transformer: torch.nn.Module, latent_shape: Sequence[int], dtype: torch.dtype
    ) -> Velocity:
        """The same with conditions without content, anywhere, for shapes to be traced."""
        raise NotImplementedError


def import_class(name: str) -> type:
    """The class of a name, as `Family` writes them."""
    return pkgutil.resolve_name(name if ":" in name else f"diffusers:{name}")
