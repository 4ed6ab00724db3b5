"""Published NPNet checkpoints: read without running code, named as in `NPNet`, nothing left over."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from diffusers_ext.core.tensor_files import read_pickled_tensors, read_tensors

VARIANTS = {2048: "SDXL", 1024: "Hunyuan-DiT"}  # by text width; DreamShaper's shapes are SDXL's
TEXT_LENGTH = 77
# Constants that old versions of timm saved with the weights.
_CONSTANTS = re.compile(r"unet_embedding\.swin\..*\.(relative_position_index|attn_mask)")
# In every checkpoint, without effect on the output: checked and dropped.
_UNUSED = {
    "unet_svd.bn.weight": (256,),
    "unet_svd.bn.bias": (256,),
    "unet_svd.bn.running_mean": (256,),
    "unet_svd.bn.running_var": (256,),
    "unet_svd.bn.num_batches_tracked": (),
    "unet_embedding.swin.head.fc.weight": (1000, 768),
    "unet_embedding.swin.head.fc.bias": (1000,),
}
# Name in `NPNet` -> official name; `q_proj` and the like are thirds of `qkv`.
_RENAMES = [
    (r"^text_norm\.", "embeeding."),
    (r"^svd_branch\.left_mlp\.", "unet_svd.mlp1."),
    (r"^svd_branch\.right_mlp\.", "unet_svd.mlp2."),
    (r"^svd_branch\.value_mlp\.", "unet_svd.mlp3.0."),
    (r"^svd_branch\.output_mlp\.", "unet_svd.mlp4."),
    (r"^svd_branch\.attention\.", "unet_svd.attention."),
    (r"^noise_transformer\.", "unet_embedding."),
    (r"\.swin\.embeddings\.patch_embeddings\.projection\.", ".swin.patch_embed.proj."),
    (r"\.swin\.embeddings\.norm\.", ".swin.patch_embed.norm."),
    (r"\.swin\.encoder\.layers\.", ".swin.layers."),
    (r"\.swin\.layernorm\.", ".swin.norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.relative_position_bias\.", ".attn."),
    (r"\.blocks\.(\d+)\.attention\.o_proj\.", r".blocks.\1.attn.proj."),
    (r"\.blocks\.(\d+)\.attention\.[qkv]_proj\.", r".blocks.\1.attn.qkv."),
]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries under dotted names."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def read_checkpoint(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of an official `.pth` or of a safetensors file under the official names, flat."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`path` must be a file with NPNet's weights, got {path}.")
    remedy = "Get the published file again, or its safetensors form."
    if path.suffix == ".safetensors":
        tree: Any = read_tensors(path, remedy=remedy)[0]
    else:
        tree = read_pickled_tensors(path, remedy=remedy)
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path} must hold a dictionary of weights, got {type(tree).__name__}.")
    weights = dict(flatten(tree))
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: `{name}` must be a tensor, got {type(value).__name__}.")
    # The official name is misspelt; safetensors ports spell it out.
    return {re.sub(r"^text_embedding\.", "embeeding.", name): value.detach() for name, value in weights.items()}


def find_variant(weights: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, int]]:
    """Which published network the weights are, from the width of its text projection."""
    name = "embeeding.linear.weight"
    if name not in weights:
        tops = sorted({key.partition(".")[0] for key in weights})
        raise ValueError(f"the checkpoint must be NPNet's, with `{name}`; got {', '.join(tops) or 'nothing'}.")
    shape = tuple(weights[name].shape)
    widths = {(8, TEXT_LENGTH * width): width for width in VARIANTS}
    if shape not in widths:
        raise ValueError(f"`{name}` must have one of the shapes {list(widths)}, got {shape}.")
    return VARIANTS[widths[shape]], {"text_embed_dim": widths[shape]}


def official_name(name: str) -> str:
    """The official name of a tensor of `NPNet`."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    # timm counts the merging of patches to the stage after it.
    return re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)


def third_of_qkv(name: str) -> int | None:
    """0, 1 or 2 for a query, key or value projection of `NPNet`'s Swin."""
    found = re.search(r"\.swin\..*\.attention\.([qkv])_proj\.", name)
    return "qkv".index(found[1]) if found else None


def expected_shapes(model_state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of all that a checkpoint of this model must hold."""
    shapes = dict(_UNUSED)
    for name, tensor in model_state.items():
        rows, *rest = tensor.shape
        thirds = 1 if third_of_qkv(name) is None else 3
        shapes[official_name(name)] = (thirds * rows, *rest)
    return shapes


def convert_npnet(
    weights: Mapping[str, torch.Tensor], model_state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Official weights under the names of `NPNet`.

    The batch norm of the SVD branch and Swin's classification head must be there, as in every published file, but take
    no part in the network and are dropped.

    Args:
        weights: as `read_checkpoint` gives them.
    """
    weights = {name: value for name, value in weights.items() if not _CONSTANTS.fullmatch(name)}
    shapes = expected_shapes(model_state)
    for kind, names in (("missing", shapes.keys() - weights.keys()), ("surplus", weights.keys() - shapes.keys())):
        if names:
            listed = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"the checkpoint must hold exactly NPNet's keys, got {len(names)} {kind}: {listed}.")
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"`{name}` must be {shape}, got {tuple(weights[name].shape)}.")
    converted = {}
    for name in model_state:
        value, third = weights[official_name(name)], third_of_qkv(name)
        converted[name] = (value if third is None else value.chunk(3)[third]).float().contiguous()
    return converted
