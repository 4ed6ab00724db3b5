"""Weights of networks on disk: sealed when they are saved, checked before a model is made of them.

diffusers only logs that weights are missing and fills them with random numbers, and it makes whatever model a config
asks for before it opens the weights.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from diffusers.utils.hub_utils import _add_variant
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, StrictDataclassError

from diffusers_ext.core.artifacts import sealed, write_atomically
from diffusers_ext.core.settings import check_keywords
from diffusers_ext.core.sources import CONFIG_NAME, hub_names
from diffusers_ext.core.tensor_files import (
    CONFIG_KEY,
    REMEDY,
    check_regular_file,
    check_shapes,
    check_tensors,
    config_digest,
    open_tensors,
    read_pickled_tensors,
    read_tensors,
)
from diffusers_ext.core.text_files import read_json
from diffusers_ext.hub.connection import RemoteEntryNotFoundError

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


def convert_npnet(
    weights: Mapping[str, torch.Tensor], model_state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Official weights, as `read_checkpoint` gives them, under the names of `NPNet`; `ValueError` for others."""
    weights = {name: value for name, value in weights.items() if not _CONSTANTS.fullmatch(name)}
    shapes = dict(_UNUSED)
    for name, tensor in model_state.items():
        rows, *rest = tensor.shape
        thirds = 1 if third_of_qkv(name) is None else 3
        shapes[official_name(name)] = (thirds * rows, *rest)
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


LOADING_ARGUMENTS = (
    "subfolder", "revision", "dtype", "variant", "cache_dir", "token", "local_files_only",
    "force_download", "proxies", "use_safetensors", "device_map", "max_memory", "offload_folder",
    "offload_state_dict", "low_cpu_mem_usage", "ignore_mismatched_sizes", "output_loading_info",
    "torch_dtype", "quantization_config", "disable_mmap", "parallel_config",
    "use_flashpack", "flashpack_kwargs",
)  # fmt: skip
_WHERE = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")
# What modules raise for settings that they cannot be made with.
_UNBUILDABLE = (
    TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError, MemoryError,
    StrictDataclassError,
)  # fmt: skip


def read_network_config(source: str | os.PathLike, arguments: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` of a network, by arguments of `from_pretrained`; `ValueError` where there is none."""
    name, kind = "pretrained_model_name_or_path", "a golden-noise network"
    where = {key: arguments[key] for key in _WHERE if arguments.get(key) is not None}
    if Path(source).is_dir():
        path = Path(source, where.get("subfolder", ""), CONFIG_NAME)
        if not path.is_file():
            raise ValueError(
                f"`{name}` must be a folder or Hub name of {kind}, got {source}: there is no "
                f"{path.relative_to(source)} in it."
            )
    else:
        offline = where.get("local_files_only", False)
        with hub_names(name, source, kind, revision=where.get("revision"), local_files_only=offline):
            path = Path(hf_hub_download(str(source), CONFIG_NAME, **where))
    return read_json(path)


class CheckedWeights:
    """Mixin, right before `ModelMixin`: what is loaded is whole, and what the config describes."""

    # Config fields of which each unit has weights: layers, or blocks a stage.
    _counted: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def check_arguments(cls, arguments: Mapping[str, Any]) -> None:
        """Raise `TypeError` for a keyword that is neither `from_pretrained`'s nor of the config."""
        known = [*LOADING_ARGUMENTS, *_config_fields(cls)]
        takes = f"it takes {', '.join(LOADING_ARGUMENTS[:8])} and the fields of the config"
        check_keywords(arguments, known, f"{cls.__name__}.from_pretrained", takes)

    @classmethod
    def check_files(cls, source: str | os.PathLike, config: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
        """Raise `ValueError` unless the weights are whole, finite, and those that the config describes.

        What is too large is refused by the header of the file, before memory is taken.
        """
        if arguments.get("use_flashpack"):  # pipelines pass it on, false by default
            raise ValueError(f"`use_flashpack` must be False for {source}, got True: only safetensors are checked.")
        if config.get("quantization_config"):
            raise ValueError(
                f"{source} must hold plain weights, got quantised ones, which cannot be checked "
                "against the config. Load plain ones with `quantization_config=`."
            )
        pickled = arguments.get("use_safetensors") is False
        paths = weight_files(source, arguments, pickled)
        given = {**config, **arguments}
        fields = {name: given[name] for name in _config_fields(cls) if name in given}
        where = f"the config of {source}"
        if not pickled:
            _check_counts(paths, {name: fields[name] for name in cls._counted if name in fields}, where)
        try:
            with torch.device("meta"):
                expected = dict(cls(**fields).state_dict())
        # Whatever a foreign config asks for: text for numbers, heads of 0, sizes beyond all memory.
        except _UNBUILDABLE as error:
            reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            raise ValueError(f"{where} must describe a {cls.__name__}, got: {reason}") from error
        check_contents(paths, expected, config)

    def save_pretrained(self, save_directory: str | os.PathLike, **arguments: Any) -> None:
        """As in diffusers; the files hold a digest, by which loading finds what was altered."""
        super().save_pretrained(save_directory, **arguments)
        if arguments.get("use_flashpack") or not arguments.get("safe_serialization", True):
            return
        if not arguments.get("is_main_process", True):
            return
        stem = _add_variant(SAFETENSORS_WEIGHTS_NAME, arguments.get("variant")).removesuffix(".safetensors")
        config = read_json(Path(save_directory, self.config_name), allow_nan=True)
        for pattern in (f"{stem}.safetensors", f"{stem}-*-of-*.safetensors"):
            for path in Path(save_directory).glob(pattern):
                tensors, metadata = read_tensors(path, finite=False)
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # the file is replaced
                write_atomically(path, sealed(tensors, {**metadata, CONFIG_KEY: _digest(config)}))


def _config_fields(cls: type) -> list[str]:
    return list(inspect.signature(cls.__init__).parameters)[1:]


def _check_counts(paths: Sequence[Path], counts: Mapping[str, Any], where: str) -> None:
    """Refuse more layers than there are tensors, before any layer is made."""
    tensors = sum(len(list(open_tensors(path).keys())) for path in paths)
    for name, count in counts.items():
        if isinstance(count, (list, tuple)) and all(type(part) is int for part in count):
            count = sum(count)  # blocks a stage
        if type(count) is not int or not 0 <= count <= tensors:
            raise ValueError(
                f"`{name}` must be the number of layers whose weights are there, got {count!r} in "
                f"{where}, but {paths[0]} has {tensors} tensors. {REMEDY}"
            )


def weight_files(source: str | os.PathLike, arguments: Mapping[str, Any], pickled: bool) -> list[Path]:
    """The one weights file of a model, or all that its index names; downloaded from the Hub."""
    name = WEIGHTS_NAME if pickled else SAFETENSORS_WEIGHTS_NAME
    variant = arguments.get("variant")
    index = _find(source, _add_variant(f"{name}.index.json", variant), arguments)
    if index is None:
        path = _find(source, _add_variant(name, variant), arguments)
        if path is None:
            raise ValueError(
                f"{source} must hold {_add_variant(name, variant)}, got none. {REMEDY} A pickle is "
                "read with `use_safetensors=False` alone, a variant with `variant=`."
            )
        return [path]
    mapped = read_json(index).get("weight_map")
    names = sorted({*map(str, mapped.values())}) if isinstance(mapped, dict) else []
    if not names or not all(Path(file).name == file for file in names):
        raise ValueError(f"{index} must name files beside it, got {names}. {REMEDY}")
    found = [_find(source, file, arguments) for file in names]
    missing = [file for file, path in zip(names, found, strict=True) if path is None]
    if missing:
        raise ValueError(f"{index} must name files that are there, got {missing}. {REMEDY}")
    return found


def _find(source: str | os.PathLike, name: str, arguments: Mapping[str, Any]) -> Path | None:
    where = {key: arguments[key] for key in _WHERE if arguments.get(key) is not None}
    if Path(source).is_dir():
        path = Path(source, where.get("subfolder", ""), name)
        return check_regular_file(path) if os.path.lexists(path) else None
    try:
        return Path(hf_hub_download(str(source), name, **where))
    except LocalEntryNotFoundError:
        if where.get("local_files_only"):
            return None
        raise
    except RemoteEntryNotFoundError:
        return None


def check_contents(paths: list[Path], model: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless the files hold exactly the tensors of a model, finite, unaltered, in any precision."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.items()}
    first = paths[0] if len(paths) == 1 else paths[0].parent
    if paths[0].suffix != ".safetensors":
        tree = {}
        for path in paths:
            found = read_pickled_tensors(path)
            if not isinstance(found, dict) or not all(isinstance(x, torch.Tensor) for x in found.values()):
                raise ValueError(f"{path} must hold weights by name, got other objects. {REMEDY}")
            tree |= found
        check_tensors(tree, first, expected=expected)
        _check_floating(tree, model, first)
        return
    shapes = {}
    for path in paths:
        handle = open_tensors(path)
        shapes |= {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}
    check_shapes(shapes, expected, first)
    for path in paths:
        tensors, metadata = read_tensors(path)
        _check_floating(tensors, model, path)
        if metadata.get(CONFIG_KEY, _digest(config)) != _digest(config):
            raise ValueError(
                f"{path} must stand beside the config that it was saved with, got another: the digest in its metadata "
                f"does not fit. {REMEDY} Settings are changed by keywords of `from_pretrained`, not in config.json."
            )


def _check_floating(tensors: Mapping[str, torch.Tensor], model: Mapping[str, torch.Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != model[name].is_floating_point():
            raise ValueError(
                f"{path} must hold {name!r} as {model[name].dtype} or of its kind, got {tensor.dtype}. {REMEDY}"
            )


def _digest(config: Mapping[str, Any]) -> str:
    """Of what the network is; underscored fields say where it came from and which version wrote it."""
    return config_digest({k: v for k, v in config.items() if not k.startswith("_")})
