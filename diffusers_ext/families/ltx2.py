"""LTX-2: clips with sound, of the text of all layers of Gemma 3 through connectors of their own."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from diffusers_ext.core.restored_state import held_attribute
from diffusers_ext.core.seeds import check_flow_levels
from diffusers_ext.families.family import Family, TokenGrid, Velocity
from diffusers_ext.families.text_conditioning import TextConditioning, with_negatives
from diffusers_ext.families.velocity import check_num_frames, check_pixels, check_times, latent_sides

if TYPE_CHECKING:
    from diffusers import LTX2Pipeline

# The pipeline refuses a height or width that is no multiple of this; frames a second, and tokens, of its call.
_PIPELINE_MULTIPLE, _FRAME_RATE, _TOKENS = 32, 24.0, 1024
# Of the call that is guided by the text alone.
_TEXT_GUIDANCE = {
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
    "audio_guidance_rescale": 0.0,
    "spatio_temporal_guidance_blocks": None,
}


class LTX2(Family):
    """LTX-2: its text is edited, and erasers are trained on its video; null space does not learn pictures on it.

    The connectors are a component of the pipeline beside the transformer; its LoRAs are of both. To an eraser's
    training text is what they make of it, which is smaller than what they read. Video and sound look at each other, so
    that the latents of a run are those of both, the sound's in channels behind the video's: see `LTX2Velocity`.
    Erasers lie beside the video's attention to the text, as Wan's; those that lie beside its attention to itself load
    as before.
    """

    name = "ltx2"
    title = "LTX-2"
    pipelines = ("LTX2Pipeline",)
    denoiser_class = "LTX2VideoTransformer3DModel"
    vae_class = "AutoencoderKLLTX2Video"
    video_vae = True
    flow_matching = True
    own_levels = True
    tools = frozenset({"eraser"})
    decoders = ("vae", "audio_vae", "vocoder")
    reports_steps = False  # of the sound
    noises_clips = False  # there would be no sound beside them
    text_fields = ("prompt_embeds", "attention_mask", "prompt_embeds_2")
    text_components = ("connectors",)
    # There the connectors belong to the transformer, and the projection before them to the text encoder.
    comfyui_names = {
        r"^connectors\.text_proj_in$": "text_encoders.text_embedding_projection",
        r"^connectors\.(video|audio)_text_proj_in$": r"text_encoders.text_embedding_projection.\1_aggregate_embed",
        r"^connectors\.(video|audio)_connector\.transformer_blocks\.": (
            r"diffusion_model.\1_embeddings_connector.transformer_1d_blocks."
        ),
        r"^transformer\.": "diffusion_model.",
    }
    # One call a step, of picture and sound.
    smallest_call = {
        "num_frames": 9,
        "stg_scale": 0.0,
        "modality_scale": 1.0,
        "audio_guidance_scale": 1.0,
        "audio_stg_scale": 0.0,
        "audio_modality_scale": 1.0,
        "spatio_temporal_guidance_blocks": None,
    }
    text_stream = ()
    joint_attention, joint_blocks, video_alone = "attn2", ("LTX2VideoTransformerBlock",), True

    def token_ids(self, pipeline: LTX2Pipeline, prompt: str) -> list[list[int]]:
        return super().token_ids(pipeline, prompt.strip())

    def text_width(self, config: Any) -> int:
        return config.caption_channels

    def beside(self, targets: str | Collection[str] | None) -> Family:
        earlier = _LTX2BesideItself()
        return earlier if targets and not isinstance(targets, str) and {*targets} == {earlier.eraser_target} else self

    def clean_prompt(self, prompt: str) -> str:
        return prompt.strip()

    def encode(self, pipeline: LTX2Pipeline, prompts: list[str], negatives: list[str] | None) -> TextConditioning:
        both = (prompts, negatives or [""] * len(prompts))
        return with_negatives(*(self.encode_clip_prompts(pipeline, texts) for texts in both))

    def encode_clip_prompts(self, pipeline: LTX2Pipeline, prompts: list[str]) -> TextConditioning:
        """What the connectors make of prompts, for the video and for the sound."""
        length = self.prompt_length(pipeline)
        embeds, mask, *_ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=length
        )
        read, heard, mask = pipeline.connectors(embeds, mask, padding_side=pipeline.tokenizer.padding_side)
        return TextConditioning(read, attention_mask=mask, prompt_embeds_2=heard)

    def text_arguments(self, text: TextConditioning) -> dict[str, torch.Tensor]:
        """For calls inside of `guided_call`, in which the connectors hand on what they have made."""
        found = text.tensors()
        sides = [side for side in ("", "negative_") if f"{side}prompt_embeds" in found]
        parts = {side: [found[f"{side}prompt_embeds"], found[f"{side}prompt_embeds_2"]] for side in sides}
        arguments = {f"{side}prompt_embeds": torch.cat(pair, dim=-1) for side, pair in parts.items()}
        return arguments | {f"{side}prompt_attention_mask": found[f"{side}attention_mask"] for side in sides}

    @contextmanager
    def guided_call(self, pipeline: LTX2Pipeline, guidance_scale: float) -> Iterator[dict[str, Any]]:
        """Guided by the text alone, the sound as the video; text may be that of `text_arguments`."""
        connectors = pipeline.connectors
        make, config = connectors.forward, connectors.config
        widths = [
            config[f"{stream}_connector_num_attention_heads"] * config[f"{stream}_connector_attention_head_dim"]
            for stream in ("video", "audio")
        ]

        def hand_on(embeds: torch.Tensor, mask: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
            if embeds.shape[-1] != sum(widths):
                return make(embeds, mask, **options)
            return *embeds.split(widths, dim=-1), mask

        with held_attribute(connectors, "forward", hand_on):
            yield {"guidance_scale": guidance_scale, "audio_guidance_scale": guidance_scale, **_TEXT_GUIDANCE}

    def text_length(self, config: Any) -> int:
        return _TOKENS

    def prompt_length(self, pipeline: LTX2Pipeline) -> int:
        """As long as the call's default, or as the tokenizer of a smaller model says."""
        return min(_TOKENS, pipeline.tokenizer.model_max_length)

    def clip_size(self, config: Any, vae_config: Any) -> tuple[int, int, int]:
        """What the pipeline's call draws by default."""
        return 121, 512, 768

    def latent_shape(
        self, config: Any, vae_config: Any, num_frames: int, height: int, width: int
    ) -> tuple[int, int, int, int]:
        """Of the video."""
        halvings = 2 ** sum(vae_config.spatio_temporal_scaling)
        spatial = vae_config.spatial_compression_ratio or vae_config.patch_size * halvings
        temporal = vae_config.temporal_compression_ratio or vae_config.patch_size_t * halvings
        check_num_frames(num_frames, temporal)
        for name, pixels in (("height", height), ("width", width)):
            check_pixels(name, pixels, math.lcm(_PIPELINE_MULTIPLE, spatial))
        shape = ((num_frames - 1) // temporal + 1, config.out_channels, height // spatial, width // spatial)
        self.token_grid(config, shape)
        return shape

    def token_grid(self, config: Any, latent_shape: Sequence[int]) -> TokenGrid:
        patches = (config["patch_size_t"], config["patch_size"])
        if patches != (1, 1):
            raise ValueError(f"`transformer` must have a token for every latent pixel, got patches of {patches}.")
        return TokenGrid(*latent_sides(tuple(latent_shape)))

    def clip_latents(self, latents: torch.Tensor, latent_shape: Sequence[int]) -> torch.Tensor:
        """Those of the video, packed, as the call keeps them."""
        frames, channels, height, width = latent_shape
        return latents.reshape(-1, frames, height, width, channels).movedim(-1, 2)

    def velocity(self, pipeline: LTX2Pipeline, num_frames: int, height: int, width: int) -> LTX2Velocity:
        check_flow_levels(pipeline.scheduler, "pipeline.scheduler")
        self.latent_shape(pipeline.transformer.config, pipeline.vae.config, num_frames, height, width)
        rate = pipeline.audio_sampling_rate / pipeline.audio_hop_length / pipeline.audio_vae_temporal_compression_ratio
        return LTX2Velocity(pipeline.transformer, round(num_frames / _FRAME_RATE * rate))


class _LTX2BesideItself(LTX2):
    """Where erasers were put before."""

    joint_attention = "attn1"


class LTX2Velocity(Velocity):
    """The velocity `noise - x_0` of the video that LTX-2 predicts at `x_t = (1 - sigma) x_0 + sigma noise`.

    It reads the sound's latents at the same level. They lie in further channels of `x_t`, one token after the other in
    the order of the video's places, with zeros of no meaning after the last: a run moves both, and a training's points
    keep both, while velocities to be learned are the video's.

    Args:
        transformer: `LTX2VideoTransformer3DModel`, as `Velocity` takes it.
        num_sounds: tokens of the sound.
    """

    flow_matching = True
    latents_dtype = torch.float32

    def __init__(self, transformer: torch.nn.Module, num_sounds: int) -> None:
        super().__init__(transformer)
        self.num_sounds = num_sounds

    def token_grid(self, latent_shape: Sequence[int]) -> TokenGrid:
        return LTX2().token_grid(self.config, latent_shape)

    def set_timesteps(self, scheduler: Any, num_steps: int, latent_shape: Sequence[int], device: Any = None) -> None:
        tokens = math.prod(self.token_grid(latent_shape))
        scheduler.set_timesteps(device=device, **LTX2().grid_arguments(scheduler.config, num_steps, tokens))

    def state_shape(self, latent_shape: Sequence[int]) -> tuple[int, int, int, int]:
        frames, channels, height, width = latent_shape
        sounds = self.num_sounds * self.config["audio_in_channels"]
        return frames, channels + -(-sounds // (frames * height * width)), height, width

    def without_image(self, x_t: torch.Tensor) -> torch.Tensor:
        """The video's part."""
        return x_t[:, :, : self.config["out_channels"]]

    def sound_of(self, x_t: torch.Tensor) -> torch.Tensor:
        """The sound's part, `(batch, tokens, channels)`."""
        width = self.config["audio_in_channels"]
        behind = x_t[:, :, self.config["out_channels"] :].flatten(1)
        return behind[:, : self.num_sounds * width].unflatten(1, (self.num_sounds, width))

    def joined(self, video: torch.Tensor, sound: torch.Tensor) -> torch.Tensor:
        """Both as one state."""
        shape = self.state_shape(video.shape[1:])
        behind = video.new_zeros(len(video), shape[0], shape[1] - video.shape[2], *shape[2:])
        behind = torch.cat([sound.flatten(1).to(video), behind.flatten(1)[:, sound[0].numel() :]], dim=1)
        return torch.cat([video, behind.view(len(video), shape[0], -1, *shape[2:])], dim=2)

    def of_state(self, x_t: torch.Tensor, t: torch.Tensor, prompt_embeds: TextConditioning) -> torch.Tensor:
        """The velocities of video and sound, as one state."""
        from diffusers.models.modeling_utils import get_parameter_dtype

        self._check_inputs(x_t, t, prompt_embeds)
        dtype, (frames, height, width) = get_parameter_dtype(self.transformer), latent_sides(x_t.shape)
        video, mask = self.without_image(x_t), prompt_embeds.attention_mask
        found, heard = self.transformer(
            hidden_states=video.movedim(2, -1).flatten(1, 3).to(dtype),
            audio_hidden_states=self.sound_of(x_t).to(dtype),
            encoder_hidden_states=prompt_embeds.prompt_embeds.to(dtype),
            audio_encoder_hidden_states=prompt_embeds.prompt_embeds_2.to(dtype),
            timestep=t,
            sigma=t,
            encoder_attention_mask=mask,
            audio_encoder_attention_mask=mask,
            num_frames=frames,
            height=height,
            width=width,
            fps=_FRAME_RATE,
            audio_num_frames=self.num_sounds,
            use_cross_timestep=True,
            return_dict=False,
        )
        found = LTX2().clip_latents(found, video.shape[1:])
        precise = torch.promote_types(found.dtype, torch.float32)
        return self.joined(found.to(precise), heard.to(precise))

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, prompt_embeds: TextConditioning) -> torch.Tensor:
        return self.without_image(self.of_state(x_t, t, prompt_embeds))

    def _check_inputs(self, x_t: torch.Tensor, t: torch.Tensor, text: TextConditioning) -> None:
        channels = self.config["out_channels"]
        if x_t.ndim != 5 or tuple(x_t.shape[1:]) != self.state_shape((x_t.shape[1], channels, *x_t.shape[3:])):
            raise ValueError(
                f"`x_t` must be (batch, frames, {channels} of the video and those of the sound, height, width), got "
                f"{tuple(x_t.shape)}."
            )
        check_times(t, x_t)
        if not isinstance(text, TextConditioning) or not {*LTX2.text_fields} <= text.tensors().keys():
            raise TypeError("`prompt_embeds` must be a TextConditioning with a mask and two texts, got other text.")
        if len(text) != len(x_t):
            raise ValueError(f"`prompt_embeds` must be {len(x_t)} texts, one a clip, got {len(text)}.")
        self.token_grid(x_t.shape)
