"""FLUX.2's own pipeline, with the length, the layer and the size of the digits model as defaults."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
import transformers
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer

MODEL_DIR = Path(__file__).parent / "model"
_LATENT_SIZE = 8
# FLUX.2's pipelines say `use_cache` to a text encoder; CLIP's takes what it does not know from transformers 5 on.
CLIP_TAKES_USE_CACHE = any(
    parameter.kind is parameter.VAR_KEYWORD
    for parameter in inspect.signature(CLIPTextModel.forward).parameters.values()
)


class DigitsFlux2Pipeline(Flux2KleinPipeline):
    """Flux2Klein for a text encoder of two layers and sixteen tokens, in place of Qwen3's 36 and 512.

    The folder loads as a stock `Flux2KleinPipeline` as well; its call then takes `height=32, width=32,
    max_sequence_length=16, text_encoder_out_layers=(2,)`.
    """

    # diffusers reads the components from this signature.
    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLFlux2,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        transformer: Flux2Transformer2DModel,
        is_distilled: bool = False,
    ) -> None:
        if not CLIP_TAKES_USE_CACHE:
            raise ValueError(
                "`transformers` must be 5.0 or newer for the digits' FLUX.2, whose text encoder is CLIP, got "
                f"{transformers.__version__}. Run: pip install -U 'transformers>=5'."
            )
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer, is_distilled)
        self.default_sample_size = _LATENT_SIZE

    def encode_prompt(
        self,
        prompt: str | list[str],
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int = 512,
        text_encoder_out_layers: tuple[int, ...] = (9, 18, 27),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in diffusers, up to the length that the tokenizer knows.

        Layers that lie deeper than the text encoder stand for its last one, which is read once.
        """
        depth = self.text_encoder.config.num_hidden_layers
        return super().encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            prompt_embeds,
            min(max_sequence_length, self.tokenizer.model_max_length),
            tuple(dict.fromkeys(min(layer, depth) for layer in text_encoder_out_layers)),
        )
