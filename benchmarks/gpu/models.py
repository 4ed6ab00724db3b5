"""Base models of published sizes with random weights, made on the device, and tiny ones of the same classes.

Nothing is downloaded: configs are those that the library plans with (`diffusers_ext/families`), weights are filled in
where they will be used, tokenizers are of few words.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from diffusers_ext.planning.models import BaseModel, Component, module_bytes, read_base_model
from diffusers_ext.planning.tracing import move_other_tensors
from diffusers_ext.planning.work import Work, WorkTrace
from examples.digits.prompts import COLORS, DIGITS, TEMPLATES, make_tokenizer
from examples.moving_digits.prompts import make_tokenizer as make_t5_tokenizer

SD15, SDXL, KLEIN = "SD1.5", "SDXL", "FLUX.2-klein-4B"
COG_2B, COG_5B, WAN = "CogVideoX-2b", "CogVideoX-5b", "Wan2.1-1.3B"
PROMPTS = tuple(t.format(color=color, digit=digit) for t in TEMPLATES for color in COLORS for digit in DIGITS)
_SPREAD = 0.02

_SMALL_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
_SMALL_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_SMALL_VAE = {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4}
_SMALL_UNET = {"sample_size": 16, "layers_per_block": 1, "norm_num_groups": 8}
_SMALL_COG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "text_embed_dim": 32,
    "max_text_seq_length": 8,
    "time_embed_dim": 16,
}
# What differs from the published config in a rehearsal, by the class of the component.
TINY: dict[str, dict[str, Any]] = {
    "CLIPTextModel": {**_SMALL_CLIP, "projection_dim": 32},
    "CLIPTextModelWithProjection": {**_SMALL_CLIP, "projection_dim": 32},
    "T5EncoderModel": _SMALL_T5,
    "UMT5EncoderModel": {**_SMALL_T5, "vocab_size": 1000},
    "Qwen3ForCausalLM": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 128,
    },
    "AutoencoderKL": _SMALL_VAE,
    "AutoencoderKLCogVideoX": _SMALL_VAE,
    "AutoencoderKLWan": {"base_dim": 8},
    "AutoencoderKLFlux2": {
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 2,
    },
    "CogVideoXTransformer3DModel": _SMALL_COG,
    "WanTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "ffn_dim": 64,
        "freq_dim": 16,
        "text_dim": 32,
    },
    "Flux2Transformer2DModel": {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 96,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4),
    },
}
_TINY_UNETS = {
    SD15: {**_SMALL_UNET, "block_out_channels": (16, 16, 16, 16), "cross_attention_dim": 32, "attention_head_dim": 2},
    SDXL: {
        **_SMALL_UNET,
        "block_out_channels": (16, 16, 16),
        "cross_attention_dim": 64,
        "attention_head_dim": [1, 2, 2],
        "transformer_layers_per_block": [1, 1, 1],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
}
_SCHEDULERS: dict[str, Callable[[], object]] = {
    "UNet2DConditionModel": lambda: diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    "Flux2Transformer2DModel": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    "CogVideoXTransformer3DModel": lambda: diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"),
}
_MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
_CHAT = (
    "{% for message in messages %}<|im_start|> user {{ message.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


def klein_tokenizer(prompts: list[str], length: int = 512) -> PreTrainedTokenizerFast:
    """Of the words of some prompts, in the chat template that FLUX.2 klein puts them in."""
    words = sorted({word for prompt in prompts for word in prompt.split()})
    vocabulary = [*_MARKS, "user", "assistant", "[unknown]", *words]
    model = models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="[unknown]")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_MARKS[0],
        unk_token="[unknown]",
        chat_template=_CHAT,
        model_max_length=length,
    )


def base_model(name: str, toy: bool) -> BaseModel:
    """A published model as shapes, without its safety checker, or a tiny one of the same classes."""
    base = read_base_model(name)
    parts = {part: of for part, of in base.components.items() if part != "safety_checker"}
    if toy:
        parts = {part: Component(of.class_name, {**of.config, **_tiny(name, of)}) for part, of in parts.items()}
    return replace(base, components=parts)


def weight_bytes(name: str, toy: bool) -> int:
    """Of all components in bfloat16."""
    return sum(component.bytes(torch.bfloat16) for component in base_model(name, toy).components.values())


def needed_bytes(work: Work, trace: WorkTrace, models: int = 1) -> int:
    """What a piece of work takes by the plan, with so many copies of its models."""
    return models * sum(module_bytes(module) for module in work.make().modules) + trace.kept + trace.peak


def _tiny(name: str, component: Component) -> Mapping[str, Any]:
    return _TINY_UNETS[name] if component.class_name == "UNet2DConditionModel" else TINY[component.class_name]


@torch.no_grad()
def fill(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Give a module of the meta device small random weights on a device; nothing that is measured depends on them."""
    module.to_empty(device=device)
    move_other_tensors(module, device)
    generator = torch.Generator(device).manual_seed(0)
    for tensor in module.parameters():
        tensor.data.normal_(std=_SPREAD, generator=generator)
    for tensor in module.buffers():
        if tensor.is_floating_point():  # variances among them
            tensor.normal_(std=_SPREAD, generator=generator).abs_()
        else:
            tensor.zero_()
    return module


def begin_work(work: Work, device: torch.device) -> Callable[[], object]:
    """What is repeated of a piece of work that the library plans, with random weights on the device."""
    modules, begin = work.make()
    for module in modules:
        fill(module, device)
    return begin(device)


def tokenizer_of(class_name: str, toy: bool) -> PreTrainedTokenizerBase:
    """Of few words, for a text encoder of this class, as long as the published one's."""
    if class_name.startswith("CLIP"):
        tokenizer = make_tokenizer()
        tokenizer.model_max_length = 77
        return tokenizer
    if class_name.startswith("Qwen3"):
        return klein_tokenizer(list(PROMPTS), 32 if toy else 512)
    return make_t5_tokenizer()


def make_pipeline(
    name: str, toy: bool, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> DiffusionPipeline:
    """A whole pipeline with random weights on the device."""
    base, parts = base_model(name, toy), {}
    for part, component in base.components.items():
        changed = {}
        if part.startswith("text_encoder"):
            tokenizer = tokenizer_of(component.class_name, toy)
            parts[part.replace("text_encoder", "tokenizer")] = tokenizer
            if component.class_name.startswith("CLIP"):
                changed = {
                    f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")
                }
        parts[part] = fill(component.build(dtype, **changed), device)
    parts["scheduler"] = _SCHEDULERS[base.components[base.denoiser].class_name]()
    pipeline_class = getattr(diffusers, base.pipeline)
    for flag in ("requires_safety_checker", "add_watermarker"):
        if flag in inspect.signature(pipeline_class.__init__).parameters:
            parts[flag] = False
    needed, _ = pipeline_class._get_signature_keys(pipeline_class)
    pipeline = pipeline_class(**{**dict.fromkeys(needed), **parts})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
