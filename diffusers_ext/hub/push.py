"""The one way to the Hub: a folder and its card, in a single commit."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import Module

from diffusers_ext.hub.card import Card, keep_owner_words
from diffusers_ext.hub.connection import RemoteEntryNotFoundError, validate_card
from diffusers_ext.hub.kinds import CACHED_FOLDERS, public_name
from diffusers_ext.hub.saved_pipelines import with_known_dtype, write_for_transformers_4

CONFIG_DIGEST = "config_sha256"
# Files in which the libraries and the training scripts note where something came from.
_ENDINGS = ("config.json", "model_index.json", "report.json")
# As diffusers and transformers name weights: whole, in shards, and the shards' index.
_WEIGHTS = re.compile(r"(?P<stem>[^.]+?)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.(?P<format>safetensors|bin)")
_INDEX = re.compile(r"(?P<stem>[^.]+)\.(?P<format>safetensors|bin)\.index(?:\.(?P<variant>\w+))?\.json")


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config's contents, however it is indented or ordered, without the digest itself."""
    kept = {key: value for key, value in config.items() if key != CONFIG_DIGEST}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def path_inside(folder: str | os.PathLike, name: str | os.PathLike) -> Path:
    """The path of a file by its name in a folder, which must lie there and not only be linked; else `ValueError`.

    Whoever made the folder chooses names and links; what is uploaded or shown because of them must be theirs. Links
    within the folder are followed, as are those of the cache of the Hub to its own files.
    """
    folder, name = Path(folder), Path(name)
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(
            f"{folder} must name files below itself, got {str(name)!r}, which is elsewhere. Nothing "
            "outside of a folder is uploaded with it."
        )
    path = folder / name
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(root) for root in _roots(folder)):
        raise ValueError(
            f"{path} must be a file below {folder}, got a link to {target}. Nothing outside of a "
            "folder is uploaded with it: put a copy of the file in its place, if it belongs there."
        )
    return path


def _roots(folder: Path) -> list[Path]:
    """The folder itself and, in the cache of the Hub, where its repository keeps the contents."""
    real = Path(os.path.realpath(folder))
    snapshots = [
        parent for parent in real.parents
        if parent.name == "snapshots" and parent.parent.name.startswith(CACHED_FOLDERS)
    ]  # fmt: skip
    return [real, *(parent.parent / "blobs" for parent in snapshots)]


def public_content(path: Path) -> bytes | None:
    """A JSON config or report as others may read it, where that differs from the file; `None` where it does not.

    Strings that are absolute paths of this machine become what `public_name` makes of them; of a component of a
    pipeline, the name of the pipeline. All other characters stay, but for the checksum of its own contents that a
    config may hold.
    """
    if not path.name.endswith(_ENDINGS):
        return None
    original = path.read_bytes()
    try:
        text = original.decode()
        content = json.loads(text)
        found = sorted({value for value in _strings(content) if _is_local_path(value)})
    except (ValueError, RecursionError):  # neither ours nor of a library
        return None
    if not found:
        return None
    for value in found:
        of_pipeline = Path(value).with_name("model_index.json").is_file()
        public = public_name(Path(value).parent if of_pipeline else value)
        for ascii_only in (True, False):
            written, shown = (json.dumps(x, ensure_ascii=ascii_only) for x in (value, public))
            text = text.replace(written, shown)
    digest = content.get(CONFIG_DIGEST) if isinstance(content, dict) else None
    if digest is not None and digest == config_digest(content):
        text = text.replace(f'"{digest}"', f'"{config_digest(json.loads(text))}"')
    return text.encode()


def _is_local_path(value: str) -> bool:
    """Whether a string is an absolute path; a prompt such as "/imagine a fox" is none."""
    path = Path(value)
    # The first folder must exist; the rest may be gone by now.
    return path.is_absolute() and len(path.parts) > 2 and os.path.isdir(Path(*path.parts[:2]))


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, (dict, list)):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _strings(item)


def stale_files(present: Iterable[str], new: Collection[str], delete_patterns: Sequence[str] = ()) -> list[str]:
    """Those files of a repository that a new upload takes the place of without overwriting them.

    These are shards, and indices of shards, of weights that come anew in other parts, for a loader prefers an old
    index to the new file, and what `delete_patterns` name. Another variant or format of the weights stays.
    """
    weights = {_weights(name) for name in new} - {None}
    return [
        name
        for name in present
        if name not in new and (_weights(name) in weights or any(fnmatchcase(name, one) for one in delete_patterns))
    ]


def _weights(name: str) -> tuple[str, ...] | None:
    """What whole file, shards and index of the same weights have in common."""
    path = PurePosixPath(name)
    found = _WEIGHTS.fullmatch(path.name) or _INDEX.fullmatch(path.name)
    if found is None:
        return None
    return (str(path.parent), found["stem"], found["variant"] or "", found["format"])


CARD_NAME = "README.md"
# Of `core.result_folder` and `core.folder_lock`: about a folder on this machine.
_LEFT_HERE = (".result.json", ".run.lock")
HUB_ARGUMENTS = ("private", "token", "revision", "create_pr", "commit_message", "subfolder")
_SAVE_ARGUMENTS = (
    "safe_serialization", "variant", "max_shard_size", "is_main_process", "save_function",
    "use_flashpack",
)  # fmt: skip


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    card: Callable[..., Card],
    *,
    repo_type: str = "model",
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    subfolder: str | None = None,
    ignore_patterns: Sequence[str] = (),
    delete_patterns: Sequence[str] = (),
    at_root: str | None = None,
) -> str:
    """Upload the files of a folder and their card in one commit; others see all of it or nothing.

    After an interruption the same call goes on: large files that have arrived are not sent again. What the owner wrote
    into a card that is already there stays, and so do all other files but those of `stale_files`. Paths of this
    machine in configs and reports become names. `ValueError` for what cannot be shared comes before anything reaches
    the Hub.

    Args:
        folder: what to upload. A `README.md` in it counts as the owner's where the Hub has none.
        repo_id: `"user/name"`, or `"name"` for the user who is logged in; made when absent, as is the branch
            `revision`.
        card: of `make_card`: gives the card from the full name of the repository, and from `subfolder=`.
        subfolder: where in the repository the files go; the card stays at the root.
        delete_patterns: names of files below `subfolder` that the same commit deletes where it does not write them.
        at_root: name of a folder in `folder` whose files lose that part of their names.

    Returns:
        Address of the commit, or of the pull request; of the latest commit where nothing has changed.
    """
    files = _files_of(Path(folder), ignore_patterns, at_root)
    api = HfApi(token=token)
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    new_card = card(repo_id, subfolder=subfolder) if subfolder else card(repo_id)
    secret = token or get_token()
    if secret and secret in str(new_card).replace("\\", ""):  # Markdown escapes its underscore
        raise ValueError("The card must not hold the token, got one that does.")
    check_card(new_card)
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    operations = [
        CommitOperationAdd(f"{prefix}{name}", public_content(path) or str(path)) for name, path in files.items()
    ]
    api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    is_branch = revision is not None and not revision.startswith("refs/")
    if is_branch and not create_pr:  # whoever proposes a change may not be allowed to make branches
        api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
    target = {"repo_id": repo_id, "repo_type": repo_type, "revision": revision}
    # Nobody sees these before the commit. The card is read afterwards, because the owner may
    # edit it during a long upload.
    api.preupload_lfs_files(additions=operations, create_pr=create_pr, free_memory=False, **target)
    new = {operation.path_in_repo for operation in operations}
    patterns = [glob.escape(prefix) + pattern for pattern in delete_patterns]
    stale = stale_files(api.list_repo_files(**target), new, patterns)
    text = str(keep_owner_words(new_card, _owner_text(api, Path(folder), target)))
    commit = api.create_commit(
        operations=[
            *operations,
            *(CommitOperationDelete(name) for name in stale),
            CommitOperationAdd(CARD_NAME, text.encode()),
        ],
        commit_message=commit_message or "Upload with diffusers_ext",
        create_pr=create_pr,
        **target,
    )
    return commit.pr_url or commit.commit_url  # no pull request where nothing has changed


def check_card(card: Card) -> None:
    """Let the Hub read a card; raises `ValueError` where it refuses the header."""
    try:
        validate_card(card)
    except ValueError as error:
        raise ValueError(
            f"The header of the card must be one that the Hub accepts, got: {error} A licence that is "
            'not on its list is given as `Licence("other", "its-name", "https://its.address")`.'
        ) from error


def make_repository(
    repo_id: str, *, repo_type: str = "model", private: bool | None = None, token: str | None = None
) -> str:
    """Make a repository where there is none, before a long run, so that a missing login stops it there; full name."""
    api = HfApi(token=token)
    return api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id


def _files_of(folder: Path, ignore_patterns: Sequence[str], at_root: str | None) -> dict[str, Path]:
    """The files to upload by their names in the repository; the card comes separately."""
    if not folder.is_dir():
        raise ValueError(f"`folder` must be a folder, got {folder}: no such folder.")
    # Links to folders are not entered; those to files must stay inside.
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in found)
    path_inside(folder, CARD_NAME)  # read later, as the owner's words
    ignored = [CARD_NAME, *_LEFT_HERE, *ignore_patterns, *DEFAULT_IGNORE_PATTERNS]
    files = {name: path_inside(folder, name) for name in filter_repo_objects(names, ignore_patterns=ignored)}
    if not files:
        raise ValueError(f"`folder` must hold files to upload, got none in {folder}.")
    if at_root is None:
        return files
    return {name.removeprefix(f"{at_root}/"): path for name, path in files.items()}


def _owner_text(api: HfApi, folder: Path, target: dict[str, Any]) -> str | None:
    with tempfile.TemporaryDirectory() as download:
        try:
            path = Path(api.hf_hub_download(filename=CARD_NAME, local_dir=download, **target))
        except LocalEntryNotFoundError:
            raise
        except RemoteEntryNotFoundError:
            path = folder / CARD_NAME
        return path.read_text(encoding="utf-8") if path.is_file() else None


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of an upload: those of `push_folder`, and the facts for the card."""
    hub = {name: value for name, value in arguments.items() if name in HUB_ARGUMENTS}
    return hub, {name: value for name, value in arguments.items() if name not in hub}


def check_no_adapters(pipeline: Any) -> None:
    """Raise `ValueError` for a pipeline with LoRAs loaded: its weights would be written under PEFT's names.

    diffusers writes them all the same, and what it then loads has neither the LoRA nor the weights beneath it.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        return
    for name, component in pipeline.components.items():
        parts = component.modules() if isinstance(component, Module) else ()
        if any(isinstance(part, BaseTunerLayer) for part in parts):
            adapters = sorted(getattr(component, "peft_config", {}))
            raise ValueError(
                f"A pipeline must hold no adapters when it is saved, got {adapters} in its `{name}`, "
                "which would be lost. Save them by themselves (LoRAs with `save_lora` or "
                "`push_lora`, erasers with `save_eraser`), then call `unload_lora_weights()` on the "
                "pipeline; or make LoRAs part of the weights by `fuse_lora()` before that call."
            )


class PushWithCard:
    """Mixin, before the class of diffusers: uploads go in one commit, with the model card that `_card` makes."""

    def _card(self, *, token: str | None, **facts: Any) -> Callable[..., Card]:
        """The card but for the repository's name; raises `ValueError` if a fact is missing."""
        raise TypeError(f"{type(self).__name__} must define `_card`.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As in diffusers, and with `dtype` where that says `torch_dtype`."""
        return super().from_pretrained(pretrained_model_name_or_path, **with_known_dtype(kwargs))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **arguments: Any,
    ) -> None:
        """As in diffusers; with `push_to_hub=True` also upload it, and nothing else of that folder.

        `arguments` are those of diffusers, and of the method `push_to_hub`. A missing fact of the card, or a pipeline
        with adapters loaded, which would be lost, is a `ValueError` before anything is written.
        """
        check_no_adapters(self)
        saving = {"safe_serialization": safe_serialization, "variant": variant}
        if max_shard_size is not None:
            saving["max_shard_size"] = max_shard_size
        if not push_to_hub:
            self._save(save_directory, **saving, **arguments)
            return
        saving |= {name: arguments.pop(name) for name in _SAVE_ARGUMENTS if name in arguments}
        hub, facts = split_arguments(arguments)
        card = self._card(token=hub.get("token"), **facts)
        self._save(save_directory, **saving)
        self._push(card, repo_id or Path(save_directory).resolve().name, saving, hub)

    def push_to_hub(self, repo_id: str, **arguments: Any) -> str:
        """Upload to a model repository, made when absent, with a model card; returns the address of the commit.

        Args:
            arguments: as of `Artifact.push_to_hub`, and `safe_serialization`, `variant` and others of saving.
        """
        check_no_adapters(self)
        saving = {n: arguments.pop(n) for n in _SAVE_ARGUMENTS if n in arguments}
        hub, facts = split_arguments(arguments)
        return self._push(self._card(token=hub.get("token"), **facts), repo_id, saving, hub)

    def _push(self, card: Callable[..., Card], repo_id: str, saving: dict[str, Any], hub: dict[str, Any]) -> str:
        with tempfile.TemporaryDirectory() as folder:
            self._save(folder, **saving)
            return push_folder(folder, repo_id, card, **hub)

    def _save(self, folder: str | os.PathLike, **saving: Any) -> None:
        super().save_pretrained(folder, **saving)
        if isinstance(self, DiffusionPipeline):
            write_for_transformers_4(folder)
