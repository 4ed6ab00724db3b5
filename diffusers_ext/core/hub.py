"""The one way to the Hub: a folder and its card, in a single commit."""

from __future__ import annotations

import glob
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    HfApi,
    ModelCard,
    get_token,
)
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

from diffusers_ext.core.base_model import find_licence, public_name
from diffusers_ext.core.inside_folder import path_inside
from diffusers_ext.core.local_paths import public_content
from diffusers_ext.core.stale_files import stale_files
from hub_cards import Licence, Measured, artifact_card, keep_owner_words


CARD_NAME = "README.md"
# Of `core.result_folder` and `core.folder_lock`: about a folder on this machine.
_LEFT_HERE = (".result.json", ".run.lock")
HUB_ARGUMENTS = (
    "private", "token", "revision", "create_pr", "commit_message", "subfolder",
)  # fmt: skip
Card = ModelCard | DatasetCard


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

    After an interruption the same call goes on: large files that have arrived are not sent again.
    What the owner wrote into a card that is already there stays, and so do all other files but
    those of `stale_files`. Paths of this machine in configs and reports become names.

    Args:
        folder: what to upload. A `README.md` in it counts as the owner's where the Hub has none.
        repo_id: `"user/name"`, or `"name"` for the user who is logged in; made when absent.
        card: gives the card from the full name of the repository, and from `subfolder=` where
            there is one; as of `make_card`.
        repo_type: `"model"` or `"dataset"`.
        private: of a repository that is made; the Hub's default for the user when `None`.
        token: taken from the login when `None`.
        revision: branch, made when absent; `main` when `None`.
        create_pr: propose the commit as a pull request in place of making it.
        commit_message: "Upload with diffusers_ext" when `None`.
        subfolder: where in the repository the files go; the card stays at the root.
        ignore_patterns: files to leave out, as in `huggingface_hub`.
        delete_patterns: names of files below `subfolder` that the same commit deletes, if there are
            any that it does not write.
        at_root: name of a folder in `folder` whose files lose that part of their names.

    Returns:
        Address of the commit, or of the pull request; of the latest commit where nothing has changed.

    Raises:
        ValueError: no such folder, nothing in it, a link out of it, or a card that cannot be rendered, that the Hub
            refuses, or that holds the token. Nothing has reached the Hub then.
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
    operations = [_addition(f"{prefix}{name}", path) for name, path in files.items()]
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
        card.validate()
    except ValueError as error:
        raise ValueError(
            f"The header of the card must be one that the Hub accepts, got: {error} A licence that is "
            'not on its list is given as `Licence("other", "its-name", "https://its.address")`.'
        ) from error


def make_repository(
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Make a repository where there is none; returns its full name.

    For a long run before it begins: a missing login stops it here, not at its end.
    """
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
    files = {
        name: path_inside(folder, name)
        for name in filter_repo_objects(names, ignore_patterns=ignored)
    }
    if not files:
        raise ValueError(f"`folder` must hold files to upload, got none in {folder}.")
    if at_root is None:
        return files
    return {name.removeprefix(f"{at_root}/"): path for name, path in files.items()}


def _addition(name: str, path: Path) -> CommitOperationAdd:
    content = public_content(path)
    return CommitOperationAdd(name, str(path) if content is None else content)


def _owner_text(api: HfApi, folder: Path, target: dict[str, Any]) -> str | None:
    with tempfile.TemporaryDirectory() as download:
        try:
            path = Path(api.hf_hub_download(filename=CARD_NAME, local_dir=download, **target))
        except RemoteEntryNotFoundError:
            path = folder / CARD_NAME
        return path.read_text(encoding="utf-8") if path.is_file() else None


def make_card(
    kind: str,
    *,
    base_model: str | None,
    license: str | Licence | None,
    trained_on: str | None,
    settings: Mapping[str, Any] | None = None,
    results: Sequence[Measured] = (),
    widget: Sequence[tuple[str, str]] = (),
    token: str | None = None,
    **facts: Any,
) -> Callable[..., Card]:
    """A card but for the name of its repository, as `push_folder` takes it.

    Args:
        kind: one of `hub_cards.KINDS`.
        base_model: Hub name or folder of the model that the artifact is for; of a folder the card
            names only the last part.
        license: as in `find_licence`.
        trained_on: what it was trained on or made from.
        settings: those that matter for what came out.
        results: what was measured.
        widget: (prompt, file of the folder to upload) of pictures or clips to show.
        token: to read the base model's card.
        facts: those of the kind; `None` stands for a fact that is not known.

    Raises:
        ValueError: a fact is not known or no fact of this kind, or no licence is found.
    """
    known = {"base_model": base_model, "trained_on": trained_on, **facts}
    missing = sorted(name for name, value in known.items() if value is None)
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        raise ValueError(
            f"{names} must be given for the card, got None. An upload of kind {kind!r} tells what it "
            "is and where it comes from: pass these facts with the other arguments."
        )
    given = {"kind": kind, "base": public_name(base_model), "trained_on": trained_on, **facts}
    given["licence"] = find_licence(base_model, license, token=token)
    given |= {"settings": dict(settings or {}), "results": tuple(results)}
    given["version"] = sys.modules["diffusers_ext"].__version__  # whole by now, unlike at import

    def card(repo_id: str, subfolder: str | None = None) -> Card:
        prefix = f"{subfolder.strip('/')}/" if subfolder else ""
        shown = [(prompt, f"{prefix}{file}") for prompt, file in widget]
        return artifact_card(repo_id=repo_id, widget=shown, subfolder=subfolder, **given)

    card("user/name")  # what is wrong with the facts stops here, before anything is written
    return card


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of an upload: those of `push_folder`, and the facts for the card."""
    hub = {name: value for name, value in arguments.items() if name in HUB_ARGUMENTS}
    return hub, {name: value for name, value in arguments.items() if name not in hub}
