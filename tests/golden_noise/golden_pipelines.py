"""Tiny pipelines of all families, as tests of the golden-noise pipelines need them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, Flux2Pipeline, Flux2Transformer2DModel
from transformers import Qwen3ForCausalLM

from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.families import find_family
from diffusers_ext.families.family import NetworkSizes
from diffusers_ext.golden_noise.networks.base import GoldenNoiseNetwork
from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel
from diffusers_ext.golden_noise.networks.npnet import NPNet
from diffusers_ext.golden_noise.networks.sequence_rnn import NoiseSequenceRNN
from diffusers_ext.golden_noise.networks.sequence_transformer import NoiseSequenceTransformer
from diffusers_ext.golden_noise.pipelines import (
    GoldenNoiseFlux2KleinPipeline,
    GoldenNoiseFlux2Pipeline,
    GoldenNoiseFluxPipeline,
    GoldenNoiseHunyuanDiTPipeline,
    GoldenNoisePipeline,
    GoldenNoiseQwenImagePipeline,
    GoldenNoiseSD3Pipeline,
    GoldenNoiseXLPipeline,
    GoldenNoiseZImagePipeline,
)
from diffusers_ext.golden_noise.redenoise import encode_prompts
from tests.tiny_current_pipelines import tiny_flux2_pipeline, tiny_qwen_image_pipeline, tiny_z_image_pipeline
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_image_pipelines import tiny_flux_pipeline, tiny_hunyuan_dit_pipeline, tiny_sd3_pipeline
from tests.tiny_pipelines import sdxl_pipeline
from tests.tiny_text_encoders import mistral3, qwen3_config

PROMPTS = ["a red seven", "a blue one on a green background"]


@dataclass(frozen=True)
class Family:
    """A golden pipeline, the plain one it derives from, and what a call of it needs."""

    golden: type
    plain: Callable[[], DiffusionPipeline]
    pixels: int
    other_size: tuple[int, int]
    call: dict[str, Any] = field(default_factory=dict)


def hunyuan_dit_pipeline() -> DiffusionPipeline:
    """With a sampler that draws no noise of its own."""
    pipeline = tiny_hunyuan_dit_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


def flux2_pipeline() -> DiffusionPipeline:
    """With 32 tokens, not 512, and a text encoder of as many layers as are read."""
    pipeline = tiny_flux2_pipeline()
    pipeline.tokenizer.model_max_length = 32
    torch.manual_seed(0)
    pipeline.register_modules(text_encoder=Qwen3ForCausalLM(qwen3_config(pipeline.tokenizer, 32, 3)).eval())
    return pipeline


def flux2_dev_pipeline() -> DiffusionPipeline:
    """As `flux2_pipeline`, told the guidance scale; the chat leaves its system out, of more tokens than there are."""
    klein = flux2_pipeline()
    tokenizer = klein.tokenizer
    tokenizer.chat_template = "{% for message in messages[1:] %}{{ message.content[0].text }}{% endfor %}"
    config = {name: value for name, value in klein.transformer.config.items() if name[0] != "_"}
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(**{**config, "guidance_embeds": True}).eval()
    return Flux2Pipeline(klein.scheduler, klein.vae, mistral3(tokenizer, 32, 3), tokenizer, transformer)


FLUX2_CALL = {"max_sequence_length": 32, "text_encoder_out_layers": (1, 2, 3)}


FAMILIES = {
    "sd": Family(GoldenNoisePipeline, random_digits_pipeline, 32, (24, 40)),
    "sdxl": Family(GoldenNoiseXLPipeline, sdxl_pipeline, 32, (24, 40)),
    "hunyuan_dit": Family(
        GoldenNoiseHunyuanDiTPipeline, hunyuan_dit_pipeline, 64, (48, 80), {"use_resolution_binning": False}
    ),
    "sd3": Family(GoldenNoiseSD3Pipeline, tiny_sd3_pipeline, 32, (24, 40)),
    "flux": Family(GoldenNoiseFluxPipeline, tiny_flux_pipeline, 32, (24, 40)),
    "flux2": Family(GoldenNoiseFlux2KleinPipeline, flux2_pipeline, 32, (24, 40), FLUX2_CALL),
    "flux2_dev": Family(GoldenNoiseFlux2Pipeline, flux2_dev_pipeline, 32, (24, 40), FLUX2_CALL),
    "qwen_image": Family(GoldenNoiseQwenImagePipeline, tiny_qwen_image_pipeline, 32, (24, 40)),
    "z_image": Family(GoldenNoiseZImagePipeline, tiny_z_image_pipeline, 32, (24, 40)),
}


NETWORKS: dict[str, tuple[type, dict[str, Any]]] = {
    "model": (GoldenNoiseModel, {"width": 64, "num_layers": 1, "num_heads": 2}),
    "npnet": (
        NPNet,
        {
            "svd_hidden_dim": 8,
            "svd_output_dim": 16,
            "svd_num_heads": 2,
            "swin_image_size": 16,
            "swin_patch_size": 2,
            "swin_embed_dim": 8,
            "swin_depths": (2,),
            "swin_num_heads": (2,),
            "swin_window_size": 4,
        },
    ),
    "transformer": (
        NoiseSequenceTransformer,
        {
            "patch_size": 2,
            "d_model": 16,
            "nhead": 2,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "dim_feedforward": 24,
            "num_steps": 2,
        },
    ),
    "rnn": (
        NoiseSequenceRNN,
        {
            "cnn_base_filters": 8,
            "cnn_num_blocks": (1, 1),
            "cnn_feat_dim": 16,
            "gru_hidden_size": 12,
            "num_attention_heads": 2,
            "num_attention_layers": 1,
            "num_steps": 2,
        },
    ),
}


def network_sizes(pipeline: DiffusionPipeline) -> NetworkSizes:
    return find_family(pipeline).network_sizes(denoiser_of(pipeline).config)


def random_network(pipeline: DiffusionPipeline, name: str = "model", **config: Any) -> GoldenNoiseNetwork:
    """A small network for the pipeline's latents and text whose output is far from the identity."""
    sizes = network_sizes(pipeline)
    network_class, options = NETWORKS[name]
    shared = {"in_channels": sizes.in_channels, "sample_size": 8, "text_embed_dim": sizes.text_embed_dim}
    if network_class is NPNet:
        shared["text_length"] = text_length(pipeline)
    torch.manual_seed(0)
    network = network_class(**{**shared, **options, **config}).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def text_length(pipeline: DiffusionPipeline) -> int:
    """Tokens that the network reads."""
    return encode_prompts(pipeline, PROMPTS[:1]).prompt_embeds.shape[1]


def golden_pipeline(family: str, **config: Any) -> DiffusionPipeline:
    """The family's golden pipeline with a `random_network`."""
    return with_network(FAMILIES[family].plain(), family, **config)


def with_network(plain: DiffusionPipeline, family: str, **config: Any) -> DiffusionPipeline:
    """The plain pipeline's golden one, of the same components."""
    pipeline = FAMILIES[family].golden.from_pipe(plain)
    pipeline.set_noise_model(random_network(pipeline, **config))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: DiffusionPipeline, family: str, **arguments: Any) -> torch.Tensor:
    """Pictures `(batch, 3, height, width)` in two steps; for the first prompt and seed 0."""
    pixels = FAMILIES[family].pixels
    defaults = {"height": pixels, "width": pixels, "output_type": "pt", "num_inference_steps": 2}
    if not {"prompt", "prompt_embeds"} & arguments.keys():
        defaults["prompt"] = PROMPTS[0]
    if not {"generator", "latents"} & arguments.keys():
        defaults["generator"] = torch.Generator().manual_seed(0)
    given = {**defaults, **FAMILIES[family].call, **arguments}
    if isinstance(given.get("prompt"), list):
        given["prompt"] = list(given["prompt"])  # into which Z-Image's call writes
    return pipeline(**given).images


def seeded(*seeds: int) -> list[torch.Generator]:
    """One generator a sample."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def record_refining(pipeline: DiffusionPipeline) -> list[dict[str, Any]]:
    """What the pipeline's network is asked for from now on and gives, call by call."""
    calls, network = [], pipeline.noise_model
    refine = network.refine

    def recorded(noise: torch.Tensor, prompt_embeds: torch.Tensor, **arguments: Any):
        golden = refine(noise, prompt_embeds, **arguments)
        calls.append({"noise": noise, "prompt_embeds": prompt_embeds, "golden": golden, **arguments})
        return golden

    network.refine = recorded
    return calls
