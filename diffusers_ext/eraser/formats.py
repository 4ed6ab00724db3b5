"""Read and write the files of an eraser, in PEFT's format or legacy; no code in them is run.

Behaviour of the legacy format: TobisawaMisakii/T2VUnlearning@f626c6f10f72c611d2ab739ff23c1a933a1671d0.
"""

from __future__ import annotations

import copy
import io
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from diffusers_ext.core.artifacts import sealed, write_atomically
from diffusers_ext.core.sources import check_download_arguments, files_on_hub, refuse_checkpoint
from diffusers_ext.core.tensor_files import CONFIG_KEY, FLOATING, config_digest, read_pickled_tensors, read_tensors
from diffusers_ext.core.text_files import read_json
from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.tensors import (
    PARTS,
    EraserShape,
    StateDict,
    eraser_shape,
    family_of_tensors,
    kind_of,
    layer_name,
)
from diffusers_ext.families.family import import_class

# The file of the config and the file of the weights, by format.
FORMATS = {"peft": (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME), "legacy": ("eraser_config.json", "eraser_weights.pt")}
FILE_NAMES = tuple(name for names in FORMATS.values() for name in names)
_EXPECTED = " or ".join(" and ".join(names) for names in FORMATS.values())
_LEGACY_TYPE = "adapter"
_LEGACY_KEY = re.compile(r"(transformer_blocks\.\d+\.attn1)\.adapter")
_LEGACY_LAYER = re.compile(r"transformer_blocks\.\d+\.attn1\.")
_PEFT_PREFIX = "base_model.model."
_CODEBOOK, _CODEBOOK_SIZE = f"{_PEFT_PREFIX}text_codebook", "text_codebook_size"


class EraserFile(NamedTuple):
    """A saved eraser."""

    config: EraserConfig  # of the legacy format only the rank is known
    tensors: StateDict
    shape: EraserShape
    num_layers: int | None  # blocks of the transformer it was made for; `None` where no file says
    codebook: torch.Tensor | None = None  # that text is rounded to, (tokens, text_dim)


def from_legacy(tree: Any, source: str = "`tree`") -> StateDict:
    """The legacy dictionary `{block: {part: tensor}}` under the names in the transformer.

    Blocks are `transformer_blocks.{i}.attn1.adapter`; parts `down.weight` `(rank, dim)`, `down.bias` `(rank,)`,
    `up.weight` `(dim, rank)` and `up.bias` `(dim,)`. Errors begin with `source`.
    """
    if not isinstance(tree, Mapping) or not tree:
        found = "an empty dictionary" if isinstance(tree, Mapping) else f"a {type(tree).__name__}"
        raise ValueError(f"{source} must hold a dictionary of erasers, got {found}.")
    tensors = {}
    for key, parts in tree.items():
        name = _LEGACY_KEY.fullmatch(str(key))
        if name is None:
            raise ValueError(
                f"Every key of {source} must be transformer_blocks.<i>.attn1.{_LEGACY_TYPE}, got "
                f"{key!r}. Only erasers of CogVideoX can be loaded."
            )
        if not isinstance(parts, Mapping) or set(parts) != set(PARTS):
            found = sorted(map(str, parts)) if isinstance(parts, Mapping) else type(parts).__name__
            raise ValueError(f"{source}: `{key}` must hold {list(PARTS)}, got {found}.")
        for part, value in parts.items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"{source}: `{key}.{part}` must be a tensor, got {type(value).__name__}.")
            tensors[layer_name(name[1], part)] = value.detach()
    return tensors


def to_legacy(tensors: Mapping[str, torch.Tensor], num_layers: int) -> dict[str, StateDict]:
    """The legacy dictionary of an eraser, for the code that wants one in each of `num_layers` blocks.

    A block without an eraser gets zeros: `up(gelu(down(x))) = 0` then.
    """
    shape = eraser_shape(tensors)
    if kind_of(tensors) != "gelu" or not all(map(_LEGACY_LAYER.match, tensors)):
        raise ValueError(
            f"`format` must be 'peft' for an eraser of the kind {kind_of(tensors)!r} at `{next(iter(tensors))}`, got "
            "'legacy': that code knows erasers of CogVideoX with GELU alone."
        )
    tree = {}
    for index in range(num_layers):
        source = f"transformer_blocks.{index if index in shape.blocks else shape.blocks[0]}.attn1"
        tree[f"transformer_blocks.{index}.attn1.{_LEGACY_TYPE}"] = {
            part: tensors[layer_name(source, part)].detach().cpu() * (index in shape.blocks) for part in PARTS
        }
    return tree


def check_eraser_folder(folder: Path, format: str) -> None:
    """Raise `ValueError` for a format or folder that nothing can be written in."""
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {tuple(FORMATS)}, got {format!r}.")
    if folder.is_file():
        raise ValueError(f"`save_directory` must be a folder, got the file {folder}.")
    for other, names in FORMATS.items():
        if other != format and any((folder / name).exists() for name in names):
            raise ValueError(
                f"`save_directory` must not hold an eraser of another format, got {folder} with one "
                f"of format {other!r}. Choose another folder."
            )


def check_eraser_tensors(tensors: StateDict, name: str, dtype: torch.dtype | None = None) -> None:
    """Raise `ValueError` unless tensors, as they are to be written, are the eraser `name` with an effect.

    `dtype`, that they were brought to, is for the error: a narrow one may overflow, or leave nothing.
    """
    eraser_shape(tensors, f"The eraser {name!r}" + (f" in {dtype}" if dtype else ""))
    if not any(tensor.any() for key, tensor in tensors.items() if "eraser_up" in key):
        raise ValueError(
            f"A saved eraser must have an effect, got {name!r} with zero in every `eraser_up`. Train it first."
        )


def described(config: EraserConfig, **given: str | None) -> EraserConfig:
    """A copy of a config, with what is given in the place of what it says."""
    config = copy.copy(config)
    for name, value in given.items():
        setattr(config, name, value or getattr(config, name))
    return config


def eraser_contents(
    format: str,
    config: EraserConfig,
    tensors: StateDict,
    num_layers: int,
    model_class: type[torch.nn.Module] | None = None,
    codebook: torch.Tensor | None = None,
) -> dict[str, bytes]:
    """`{file name: content}`, weights first; `AutoPeftModel` loads `model_class`, by default CogVideoX's."""
    config_name, weights_name = FORMATS[format]
    if format == "legacy":
        if codebook is not None:
            raise ValueError(
                f"`format` must be 'peft' for an eraser with a text codebook, got 'legacy', which has no place for "
                f"its {len(codebook)} tokens."
            )
        facts = {"eraser_type": _LEGACY_TYPE, "eraser_rank": eraser_shape(tensors).rank}
        weights = io.BytesIO()
        torch.save(to_legacy(tensors, num_layers), weights)
        return {weights_name: weights.getvalue(), config_name: (json.dumps(facts, indent=4) + "\n").encode()}
    config.inference_mode = True
    model_class = model_class or import_class(family_of_tensors(tensors).denoiser_class)
    facts = config.to_dict()
    facts["auto_mapping"] = {"base_model_class": model_class.__name__, "parent_library": model_class.__module__}
    facts = {name: sorted(v) if isinstance(v, set) else v for name, v in facts.items()}
    if config.kind == "gelu":  # as every eraser before there were kinds
        del facts["kind"]
    if codebook is None:
        del facts[_CODEBOOK_SIZE]
    weights = {_PEFT_PREFIX + name: tensor for name, tensor in tensors.items()}
    weights |= {} if codebook is None else {_CODEBOOK: codebook}
    content = (json.dumps(facts, indent=2, sort_keys=True) + "\n").encode()
    metadata = {"format": "pt", CONFIG_KEY: _eraser_config_digest(json.loads(content))}
    return {weights_name: sealed(weights, metadata), config_name: content}


def write_eraser_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files; a new folder appears with all of them or not at all."""
    if folder.exists():
        _replace_files(folder, files)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as staging:
        staged = Path(staging, folder.name)
        staged.mkdir()
        write_eraser_files(staged, files)
        os.replace(staged, folder)


def _replace_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write all files or leave the old ones: weights that are sealed with another config are refused."""
    old = {name: (folder / name).read_bytes() for name in files if (folder / name).is_file()}
    written = []
    try:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_atomically(folder / name, content)
            written.append(name)
    except BaseException:
        for name in written:
            if name in old:
                write_atomically(folder / name, old[name])
            else:
                (folder / name).unlink()
        raise


def read_eraser(
    pretrained_model_name_or_path: str | os.PathLike, *, subfolder: str | None = None, **download_arguments: Any
) -> EraserFile:
    """Read a saved eraser without a model; arguments and errors as in `load_eraser`."""
    check_download_arguments(download_arguments, "read_eraser")
    source = Path(pretrained_model_name_or_path)
    refuse_checkpoint(source / (subfolder or ""))
    if source.is_file():
        raise ValueError(
            f"`pretrained_model_name_or_path` must be a folder or 'user/name', got the file {source}. Give its folder."
        )
    if source.is_dir():
        config_path, weights_path = _find_in_folder(source / (subfolder or ""))
    else:
        name = str(pretrained_model_name_or_path)
        config_path, weights_path = _download(name, subfolder, download_arguments)
    read = _read_peft if config_path.name == CONFIG_NAME else _read_legacy
    return read(config_path, weights_path)


def _find_in_folder(folder: Path) -> tuple[Path, Path]:
    for names in FORMATS.values():
        if (folder / names[0]).is_file():
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise ValueError(f"{folder} must hold {' and '.join(names)}, got no {missing[0]}.")
            return folder / names[0], folder / names[1]
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
    raise ValueError(f"{folder} must hold {_EXPECTED}, got {found}.")


def _download(source: str, subfolder: str | None, arguments: dict[str, Any]) -> tuple[Path, ...]:
    no_file = f"Repository {source} must hold {_EXPECTED}, got neither."
    missing: EntryNotFoundError | None = None
    with files_on_hub(source, "an eraser", no_file=no_file):
        for names in FORMATS.values():
            try:
                files = [hf_hub_download(source, n, subfolder=subfolder, **arguments) for n in names]
                return tuple(Path(file) for file in files)
            except EntryNotFoundError as error:
                missing = missing or error
        raise missing


def _read_peft(config_path: Path, weights_path: Path) -> EraserFile:
    facts = read_json(config_path)
    kind = facts.get("peft_type")
    if kind != "ERASER":
        raise ValueError(
            f"{config_path} must have the `peft_type` 'ERASER', got {kind!r}. A LoRA is loaded by `load_lora_weights`."
        )
    tensors, metadata = read_tensors(weights_path, dtypes=FLOATING)
    strange = [name for name in tensors if not name.startswith(_PEFT_PREFIX)]
    if strange:
        raise ValueError(f"Every key of {weights_path} must start with {_PEFT_PREFIX!r}, got {strange[0]!r}.")
    codebook = tensors.pop(_CODEBOOK, None)
    tensors = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in tensors.items()}
    shape = eraser_shape(tensors, str(weights_path))
    try:
        config = EraserConfig.from_pretrained(str(config_path.parent))
    # Of what a stranger wrote, PEFT and its classes take much for granted.
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise ValueError(f"{config_path} must be the config of an eraser, got: {error}") from error
    if config.num_layers is not None and config.num_layers <= shape.blocks[-1]:
        raise ValueError(
            f"`num_layers` of {config_path} must be above the last block of the weights, "
            f"{shape.blocks[-1]}, got {config.num_layers}."
        )
    if config.in_features not in (None, shape.width):
        raise ValueError(
            f"`in_features` of {config_path} must be the width {shape.width} of the weights, got {config.in_features}."
        )
    if config.r != shape.rank:
        raise ValueError(f"`r` of {config_path} must be the rank {shape.rank} of the weights, got {config.r}.")
    if config.kind != kind_of(tensors):
        raise ValueError(
            f"`kind` of {config_path} must be {kind_of(tensors)!r} as the weights have it, got {config.kind!r}."
        )
    if config.text_codebook_size != (None if codebook is None else len(codebook)):
        raise ValueError(
            f"`{_CODEBOOK_SIZE}` of {config_path} must be the number of tokens of the codebook in "
            f"{weights_path.name}, got {config.text_codebook_size} beside "
            f"{'no codebook' if codebook is None else tuple(codebook.shape)}."
        )
    expected = metadata.get(CONFIG_KEY)
    if expected is not None and expected != _eraser_config_digest(facts):
        raise ValueError(
            f"{config_path} must be the config that {weights_path.name} was saved beside, got another: "
            "the digest in the metadata of the weights does not fit. Download or write both again."
        )
    base = facts.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"`base_model_name_or_path` of {config_path} must be a name, got {base!r}.")
    return EraserFile(config, tensors, shape, config.num_layers, codebook)


def _read_legacy(config_path: Path, weights_path: Path) -> EraserFile:
    facts = read_json(config_path)
    if facts.get("eraser_type") != _LEGACY_TYPE:
        raise ValueError(f"`eraser_type` of {config_path} must be {_LEGACY_TYPE!r}, got {facts.get('eraser_type')!r}.")
    tree = read_pickled_tensors(weights_path, remedy="Get the file again.")
    tensors = from_legacy(tree, str(weights_path))
    shape = eraser_shape(tensors, str(weights_path))
    if facts.get("eraser_rank") != shape.rank:
        raise ValueError(
            f"`eraser_rank` of {config_path} must be the rank {shape.rank} of the weights, got "
            f"{facts.get('eraser_rank')!r}."
        )
    # The legacy code puts one into every block.
    return EraserFile(EraserConfig(r=shape.rank), tensors, shape, len(shape.blocks))


def _eraser_config_digest(facts: Mapping[str, Any]) -> str:
    """Of a config in PEFT's format, but for the name of the base model, which may be mended by hand."""
    return config_digest({k: v for k, v in facts.items() if k != "base_model_name_or_path"})
