"""Weights of open_clip's CLIP under the names of transformers' `CLIPModel`, nothing left over."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from diffusers_ext.core.tensor_files import read_pickled_tensors, read_tensors


_REMEDY = "It must be a checkpoint of nothing but tensors, and may be truncated: download it again."
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_OUTSIDE_BLOCKS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelt so in transformers
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
_IN_BLOCKS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def vit_h_14_config() -> CLIPConfig:
    """The model of HPSv2 (and of PickScore): open_clip's ViT-H-14, 986 million parameters."""
    shared = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "projection_dim": 1024}
    vision = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    text = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 0,
    }
    return CLIPConfig(
        text_config={**text, **shared}, vision_config={**vision, **shared}, projection_dim=1024
    )


def map_open_clip(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename, and split the attention's joint q/k/v projection."""
    mapped: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        block = _BLOCK.fullmatch(key)
        if key in _OUTSIDE_BLOCKS:
            mapped[_OUTSIDE_BLOCKS[key]] = tensor
        elif key in _TRANSPOSED:
            mapped[_TRANSPOSED[key]] = tensor.t().contiguous()
        elif block is not None:
            tower = "vision_model" if block[1] else "text_model"
            prefix = f"{tower}.encoder.layers.{block[2]}."
            mapped |= {prefix + name: part for name, part in _map_inside(block[3], tensor, key)}
        else:
            raise ValueError(f"`state_dict` must hold an open_clip CLIP model, got the key {key}.")
    return mapped


def _map_inside(name: str, tensor: torch.Tensor, key: str) -> list[tuple[str, torch.Tensor]]:
    """New names and tensors of one tensor inside a transformer block."""
    layer, _, kind = name.rpartition(".")
    if layer in _IN_BLOCKS and kind in ("weight", "bias"):
        return [(f"{_IN_BLOCKS[layer]}.{kind}", tensor)]
    if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = name.removeprefix("attn.in_proj_")
        parts = zip("qkv", tensor.chunk(3))
        return [(f"self_attn.{letter}_proj.{kind}", part.contiguous()) for letter, part in parts]
    raise ValueError(f"`state_dict` must hold an open_clip CLIP model, got the key {key}.")


def check_weights(
    weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """Raise `ValueError` unless names and shapes are those of `expected`, one for one."""
    surplus = sorted(weights.keys() - expected.keys())
    missing = sorted(expected.keys() - weights.keys())
    if surplus or missing:
        raise ValueError(
            "The checkpoint must hold exactly the weights of the model, got "
            f"{len(missing)} missing {missing[:3]} and {len(surplus)} surplus {surplus[:3]}."
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"`{name}` must have shape {tuple(expected[name].shape)}, got "
                f"{tuple(tensor.shape)} in the checkpoint."
            )


def read_checkpoint(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The state dict of a safetensors file, or of a `.pt` file with or without `state_dict` in it."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_tensors(path, remedy=_REMEDY)[0]
    # Only the newer format of `torch.save`, a zip file, can be mapped into memory.
    mmap = path.is_file() and zipfile.is_zipfile(path)
    content = read_pickled_tensors(path, mmap=mmap, remedy=_REMEDY)
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict):
        raise ValueError(f"{path} must hold a state dict, got {type(weights).__name__}.")
    wrong = [key for key, value in weights.items() if not torch.is_tensor(value)]
    if wrong:
        kind = type(weights[wrong[0]]).__name__
        raise ValueError(f"{path} must hold a state dict, got dict with {wrong[0]!r} a {kind}.")
    return weights


def load_open_clip(
    path: str | os.PathLike, config: CLIPConfig, dtype: torch.dtype = torch.float32
) -> CLIPModel:
    """A `CLIPModel` with an open_clip checkpoint's weights, strictly.

    Args:
        config: the checkpoint's structure; the number of heads cannot be read off the weights.
    """
    weights = map_open_clip(read_checkpoint(path))
    with torch.device("meta"):
        check_weights(weights, CLIPModel(config).state_dict())
    # transformers' own loader, because it neither initialises what it overwrites nor forgets the
    # buffers that are in no checkpoint.
    return CLIPModel.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
