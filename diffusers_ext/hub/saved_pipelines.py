"""Saved pipelines that transformers 4 and 5 read alike, and a word where 4 meets one that only 5 reads.

From 5 on CLIP's text encoder has no `text_model` in the names of its weights, and a tokenizer is one file. Where 4
reads such a pipeline, the text encoder keeps random weights.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import transformers
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

INDEX_NAME = "model_index.json"
_PREFIX = "text_model."
_FAST = "Fast"
_VOCABULARIES = {"tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "vocab.txt"}
_SAYS_TORCH_DTYPE = tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 40)


def with_known_dtype(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a `from_pretrained` of diffusers, which below 0.40 passes `dtype` over and knows `torch_dtype`."""
    if "dtype" not in arguments or not _SAYS_TORCH_DTYPE:
        return dict(arguments)
    return {"torch_dtype" if name == "dtype" else name: value for name, value in arguments.items()}


class ReadAlike:
    """Mixin of pipelines, before `PushWithCard` and the class of diffusers: made alike under every version."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As the next class does; `ValueError` for a folder of which transformers 4 would read random weights.

        A repository of the Hub is not looked at.
        """
        source = pretrained_model_name_or_path
        if Path(source).is_dir():
            check_readable(source, "pretrained_model_name_or_path", variant=kwargs.get("variant"), given=kwargs)
        return super().from_pretrained(source, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As in diffusers, with `dtype` under every version."""
        return super().from_pipe(pipeline, **with_known_dtype(kwargs))


def write_for_transformers_4(folder: str | os.PathLike) -> None:
    """Give a saved pipeline the names that both major versions read; what has them already stays as it is."""
    folder = Path(folder)
    index = _read(folder / INDEX_NAME)
    for name in _tokenizers(_Folder(folder)):
        index[name] = [index[name][0], index[name][1] + _FAST]  # which 5 takes for the same class
    _write(folder / INDEX_NAME, index)
    for path in folder.glob("tokenizer*/tokenizer_config.json"):
        config = _read(path)
        if config.get("extra_special_tokens") == []:  # in 4 it is a mapping
            del config["extra_special_tokens"]
            _write(path, config)
    for encoder in (folder / name for name in _encoder_names(_Folder(folder))):
        for path in encoder.glob("*.safetensors"):
            tensors = load_file(path)
            if not all(name.startswith(_PREFIX) for name in tensors):
                written = path.with_suffix(".partial")
                save_file({_prefixed(name): value for name, value in tensors.items()}, written, {"format": "pt"})
                os.replace(written, path)
        for path in encoder.glob("*.safetensors.index.json"):
            shards = _read(path)
            shards["weight_map"] = {_prefixed(name): file for name, file in shards["weight_map"].items()}
            _write(path, shards)


def check_readable(
    source: str | os.PathLike,
    argument: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    given: Collection[str] = (),
    loaded: bool = False,
) -> bool:
    """Raise `ValueError` for a pipeline of which transformers 4, where that is installed, would read random weights.

    Of a repository on the Hub only small files and the headers of weights are fetched, as far as the cache lacks them.

    Args:
        given: names of components that are not loaded from there.
        loaded: a repository is judged by what lies in the cache, where it has just been loaded.

    Returns:
        Whether this is known; not where the Hub did not answer.
    """
    if int(transformers.__version__.split(".")[0]) > 4:
        return True
    try:
        place = _place(source, revision, loaded)
        found = [name for name in (*_encoders(place, variant), *_tokenizers(place)) if name not in given]
    # What is wrong, who loads the pipeline is told; in hub below 1.0, as transformers 4 needs, all these are OSErrors.
    except (OSError, HFValidationError, NotASafetensorsRepoError, SafetensorsParsingError):
        if Path(source).is_dir() or loaded:
            raise
        return False
    if found:
        raise ValueError(
            f"`{argument}` must be a model that transformers {transformers.__version__} reads, got {source}, whose "
            f"{', '.join(found)} transformers 5 has saved. Upgrade it: pip install 'transformers>=5'."
        )
    return True


def _place(source: str | os.PathLike, revision: str | None, loaded: bool) -> _Folder | _Repository:
    if Path(source).is_dir():
        return _Folder(Path(source))
    if loaded:
        return _Folder(Path(hf_hub_download(str(source), INDEX_NAME, revision=revision, local_files_only=True)).parent)
    return _Repository(str(source), revision)


class _Folder:
    """The files of a saved pipeline."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files = [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]
        self.files += [path.name for path in folder.glob("*.json")]

    def json(self, name: str) -> dict[str, Any]:
        return _read(self._folder / name)

    def tensors(self, name: str) -> Collection[str]:
        """Names in a file of weights."""
        with safe_open(self._folder / name, "pt") as handle:
            return list(handle.keys())


class _Repository:
    """The same of one on the Hub."""

    def __init__(self, repo_id: str, revision: str | None) -> None:
        found = HfApi().model_info(repo_id, revision=revision)
        self._at = {"repo_id": repo_id, "revision": found.sha}
        self.files = [sibling.rfilename for sibling in found.siblings or ()]

    def json(self, name: str) -> dict[str, Any]:
        return _read(Path(hf_hub_download(filename=name, **self._at)))

    def tensors(self, name: str) -> Collection[str]:
        cached = try_to_load_from_cache(filename=name, **self._at)
        if isinstance(cached, str):
            return _Folder(Path(cached).parent).tensors(Path(cached).name)
        return HfApi().parse_safetensors_file_metadata(filename=name, **self._at).tensors


def _encoders(place: _Folder | _Repository, variant: str | None) -> list[str]:
    """Text encoders of CLIP whose weights lack the names that transformers 4 knows."""
    found = []
    for name in _encoder_names(place):
        files = _weights([file for file in place.files if file.startswith(f"{name}/")], variant)
        if not all(tensor.startswith(_PREFIX) for file in files for tensor in place.tensors(file)):
            found.append(name)
    return found


def _encoder_names(place: _Folder | _Repository) -> list[str]:
    names = sorted(
        name.removesuffix("/config.json")
        for name in place.files
        if re.fullmatch(r"text_encoder[^/]*/config\.json", name)
    )
    return [name for name in names if place.json(f"{name}/config.json").get("architectures") == ["CLIPTextModel"]]


def _weights(files: Sequence[str], variant: str | None) -> list[str]:
    """The files that are loaded: those of the variant, or the usual ones where it has none."""
    for stem in (f"model.{variant}", "model") if variant else ("model",):
        pattern = re.compile(rf"[^/]+/{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors")
        if found := [file for file in files if pattern.fullmatch(file)]:
            return found
    return []


def _tokenizers(place: _Folder | _Repository) -> list[str]:
    """Names of the tokenizers that are one file, under the name of a class that reads several in transformers 4."""
    if INDEX_NAME not in place.files:
        return []
    return [
        name
        for name, value in place.json(INDEX_NAME).items()
        if name.startswith("tokenizer") and isinstance(value, list) and value[0] == "transformers"
        if not value[1].endswith(_FAST) and hasattr(transformers, value[1] + _FAST)
        if {file.removeprefix(f"{name}/") for file in place.files} & _VOCABULARIES == {"tokenizer.json"}
    ]


def _prefixed(name: str) -> str:
    return _PREFIX + name.removeprefix(_PREFIX)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
