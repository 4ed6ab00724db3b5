"""Artifacts to share: a folder of `config.json` and one safetensors file, on disk or on the Hub."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save
from torch.nn import Module

from diffusers_ext.core.sources import CONFIG_NAME, artifact_file, check_download_arguments
from diffusers_ext.core.tensor_files import (
    CONFIG_DIGEST,
    REMEDY,
    check_config_digest,
    check_format_version,
    check_regular_file,
    check_sha256,
    config_digest,
    read_tensors,
    with_digest,
)
from diffusers_ext.core.text_files import read_json
from diffusers_ext.hub.card import Card
from diffusers_ext.hub.push import push_folder, split_arguments

# Of safetensors, and of torch, which does not tell why a file could not be written.
_WORDS = ("No space left", "os error 28", "os error 122", "PytorchStreamWriter failed writing")
LOCK_NAME = ".run.lock"


@contextmanager
def full_disk_named(path: str | os.PathLike) -> Iterator[None]:
    """Turn what libraries raise on a full disk within the block into one `OSError` that names the place."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_full_disk(error):
            raise
        where = getattr(error, "filename", None) or path
        message = (
            f"No space is left for {Path(where)}: free some on this disk, or write to another one; what "
            "was complete before is intact"
        )
        raise OSError(errno.ENOSPC, message, str(where)) from error


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, or the one behind it, says that a disk or a quota is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if not isinstance(seen, OSError) and any(word in str(seen) for word in _WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def folder_lock(folder: str | os.PathLike, flag: str = "output_dir") -> Iterator[None]:
    """Hold a folder, which the command line calls `flag`, for this process while the block runs.

    The lock is the operating system's, on the file `.run.lock` in the folder: it ends with the process, and the file
    of a killed one is taken over. A folder that was made for it goes again, with its parents, when the block leaves it
    empty.
    """
    folder = Path(folder)
    made = _make(folder, flag)
    path = folder / LOCK_NAME
    record = _record(path)  # as it was before this process asks for it
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        try:
            lock.acquire()
        except Timeout as error:
            if record and not _record(path):
                path.write_text(record)  # whom filelock below 4.0 has emptied by asking
            raise ValueError(
                f"`{flag}` must be used by one run at a time, got {folder}, which {_owner(record)} is writing to. "
                "Wait for it or stop it, or choose another folder."
            ) from error
        try:
            path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            yield
        finally:
            with suppress(OSError):  # Windows removes no open file
                path.unlink()
            lock.release()
    finally:
        for parent in made:
            with suppress(OSError):  # not empty
                parent.rmdir()


def _make(folder: Path, flag: str) -> list[Path]:
    """Make a folder; returns it and the parents that were made, the innermost first."""
    made, parent = [], folder
    while not parent.exists() and not parent.is_symlink():
        made.append(parent)
        parent = parent.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"`{flag}` must be a folder, got {folder}.") from error
    return made


def _record(path: Path) -> str:
    """What the holder of a lock has written of itself; empty without one."""
    with suppress(OSError, ValueError):
        return path.read_text(encoding="utf-8")
    return ""


def _owner(record: str) -> str:
    """Who holds a lock, in words."""
    try:
        owner = json.loads(record)
        return f"process {int(owner['pid'])} on {str(owner['host'])[:80]}"
    except (ValueError, KeyError, TypeError):
        return "another process"


ArtifactType = TypeVar("ArtifactType", bound="Artifact")
_HEADER = ("_class_name", "format_version", "sha256")


def sealed(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file with a digest of its contents: of equal tensors and metadata equal bytes."""
    return with_sorted_metadata(save(dict(tensors), metadata=with_digest(tensors, metadata)))


def with_sorted_metadata(content: bytes) -> bytes:
    """The bytes of a safetensors file with its metadata in order of name; the library's order differs from run to run.

    A file is the length of its header in 8 bytes, the header as JSON, padded with spaces, and the tensors
    (https://github.com/huggingface/safetensors, "Format").
    """
    start = tensors_offset(content)
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[start:]


def tensors_offset(content: bytes) -> int:
    """Where in the bytes of a safetensors file the tensors begin."""
    return 8 + int.from_bytes(content[:8], "little")


def write_atomically(path: str | os.PathLike, content: bytes | str) -> None:
    """Write a file that is either the old one or the whole new one, also if the machine stops."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    with full_disk_named(path):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


class Artifact:
    """Base of what is saved as `config.json` and safetensors.

    A subclass names its tensor file and format, converts itself in `_to_artifact` and `_from_artifact`, and describes
    itself in `_card`. The config records the SHA-256 of the tensor file and of its own contents, so a truncated or
    altered folder is refused.
    """

    weights_name: ClassVar[str] = "model.safetensors"
    format_version: ClassVar[int] = 1

    def _to_artifact(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The JSON-able config and the tensors that make up this object."""
        raise TypeError(f"{type(self).__name__} must define `_to_artifact`.")

    @classmethod
    def _from_artifact(
        cls: type[ArtifactType], config: dict[str, Any], tensors: dict[str, torch.Tensor]
    ) -> ArtifactType:
        """Rebuild the object from what `_to_artifact` gave."""
        raise TypeError(f"{cls.__name__} must define `_from_artifact`.")

    def _card(self, *, token: str | None, **facts: Any) -> Callable[..., Card]:
        """The model card but for the repository's name; raises `ValueError` if a fact is missing."""
        raise TypeError(f"{type(self).__name__} must define `_card`.")

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **hub_arguments: Any,
    ) -> None:
        """Write the folder; with `push_to_hub=True` also upload what was written."""
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"`save_directory` must be a folder, got the file {folder}.")
        if hub_arguments and not push_to_hub:
            raise TypeError(f"{sorted(hub_arguments)} must come with `push_to_hub=True`, got them without.")
        folder.mkdir(parents=True, exist_ok=True)
        config, tensors = self._to_artifact()
        weights = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        header = {
            "_class_name": type(self).__name__,
            "format_version": self.format_version,
            "sha256": hashlib.sha256(weights).hexdigest(),
        }
        # Through JSON, as it is read back: tuples become lists, and numbers as keys strings.
        config = json.loads(json.dumps({**header, **config}, allow_nan=False))
        config[CONFIG_DIGEST] = config_digest(config)
        write_atomically(folder / self.weights_name, weights)
        write_atomically(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
        if push_to_hub:
            self.push_to_hub(repo_id or folder.resolve().name, **hub_arguments)

    def push_to_hub(self, repo_id: str, **hub_arguments: Any) -> str:
        """Upload to a model repository, made when absent, with a model card; returns the address of the commit.

        Args:
            hub_arguments: `private`, `token`, `revision`, `create_pr`, `commit_message`, `subfolder`; and for the
                card, where the object does not know them, `base_model`, `license`, `trained_on`, `settings`, `results`
                and the facts of its kind. A missing one is a `ValueError` before anything is uploaded.
        """
        hub, facts = split_arguments(hub_arguments)
        card = self._card(token=hub.get("token"), **facts)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(folder, repo_id, card, **hub)

    @classmethod
    def from_pretrained(
        cls: type[ArtifactType],
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        subfolder: str | None = None,
        **download_arguments: Any,
    ) -> ArtifactType:
        """Load from a folder or from the Hub, where `download_arguments` are those of `hf_hub_download`.

        Raises:
            ValueError: the folder is incomplete, altered, of another class or of a newer format.
            TypeError: another keyword, also for a local folder.
        """
        check_download_arguments(download_arguments, f"{cls.__name__}.from_pretrained")
        paths = [
            artifact_file(pretrained_model_name_or_path, name, subfolder, download_arguments)
            for name in (CONFIG_NAME, cls.weights_name)
        ]
        return cls._read(*paths)

    @classmethod
    def _read(cls: type[ArtifactType], config_path: Path, weights_path: Path) -> ArtifactType:
        config = read_json(config_path)
        if config.get("_class_name") != cls.__name__:
            raise ValueError(f"{config_path} must describe a {cls.__name__}, got {config.get('_class_name')!r}.")
        # What every config must say of its own files; a checksum cannot be left out.
        missing = [key for key in _HEADER if key not in config]
        if missing:
            raise ValueError(f"{config_path} must hold {missing}, got only {sorted(config)}.")
        check_format_version(config, config_path, cls.format_version)
        check_sha256(config, "sha256", config_path)
        check_config_digest(config, config_path)
        found = file_sha256(check_regular_file(weights_path))
        if found != config["sha256"]:
            raise ValueError(
                f"{weights_path} must have SHA-256 {config['sha256'][:12]}..., got "
                f"{found[:12]}...: it is truncated or was altered. {REMEDY}"
            )
        tensors, _ = read_tensors(weights_path)
        own = {k: v for k, v in config.items() if k not in (*_HEADER, CONFIG_DIGEST)}
        try:
            return cls._from_artifact(own, tensors)
        except ValueError as error:
            raise ValueError(f"{config_path.parent} holds no {cls.__name__}: {error}") from error


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, read block by block."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(module: Module, samples: int = 256) -> dict[str, Any]:
    """Facts that tell one model from another, without adapters: `{"architecture": hex, "probe": [float, ...]}`.

    The first is a hash of names and shapes, the second are sampled weights, which survive a change of dtype. Both are
    the same under all versions of transformers.
    """
    adapters = ("lora_", "eraser_")
    parameters = [(n, p) for n, p in module.named_parameters() if not any(part in n for part in adapters)]
    names = _names_of_every_version([name.replace(".base_layer", "") for name, _ in parameters])
    shapes = [f"{name}:{tuple(p.shape)}" for name, (_, p) in zip(names, parameters, strict=True)]
    probe = []
    for index in range(samples):
        _, parameter = parameters[index * len(parameters) // samples]
        position = (index * 2654435761) % parameter.numel()
        # Eight digits are more than float32 holds, and keep the JSON readable.
        probe.append(float(f"{parameter.detach().reshape(-1)[position].float().item():.8g}"))
    return {"architecture": hashlib.sha256("\n".join(shapes).encode()).hexdigest(), "probe": probe}


def _names_of_every_version(names: list[str]) -> list[str]:
    """Names of parameters as transformers 5 has them, which leaves out what wraps CLIP's and SigLIP's encoders."""
    if all(name.startswith("text_model.") for name in names):
        names = [name.removeprefix("text_model.") for name in names]
    return [name.replace("vision_tower.vision_model.", "vision_tower.") for name in names]


def same_fingerprint(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two fingerprints are of one model, up to the rounding of bfloat16 (2^-8 relative)."""
    if first["architecture"] != second["architecture"]:
        return False
    a, b = torch.tensor(first["probe"]), torch.tensor(second["probe"])
    return bool(((a - b).abs() <= 2.0**-8 * a.abs() + 1e-6).all())
