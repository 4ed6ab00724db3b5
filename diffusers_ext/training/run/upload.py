"""The upload of what a run makes: what is asked before it begins, and what goes up at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from diffusers_ext.core.settings import RunSettings, Settings, named_values
from diffusers_ext.hub.card import Card
from diffusers_ext.hub.kinds import find_licence, named_licence, public_name
from diffusers_ext.hub.push import check_card, make_repository, push_folder


def card_arguments(settings: RunSettings) -> dict[str, Any]:
    """What every card needs and the command line says; `ValueError` where no licence is known."""
    base = settings.hub_base_model or settings.pretrained_model_name_or_path
    try:
        given = named_licence(settings.hub_license, settings.hub_license_name, settings.hub_license_link)
        licence = find_licence(base, given, token=settings.hub_token)
    except ValueError as error:
        raise ValueError(f"{error} The flag is `--hub_license`.") from error
    return {"base_model": base, "license": licence, "token": settings.hub_token}


def check_login(settings: RunSettings) -> None:
    """Raise `ValueError` where nobody is logged in: before the run, not after it."""
    try:
        HfApi(token=settings.hub_token).whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError(
            "`hub_token` must be given with `push_to_hub` where nobody is logged in, got None. Run `hf auth login`."
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise ValueError(
            "`hub_token` must be a token of the Hub, got one that it refuses. Make a new one there."
        ) from error


def repository_name(settings: RunSettings) -> str:
    """The repository of `--hub_model_id`, or one with the name of the output folder."""
    return settings.hub_model_id or Path(settings.output_dir).resolve().name


def upload_arguments(settings: RunSettings) -> dict[str, Any]:
    """What the command line says about the upload itself."""
    return {"private": settings.hub_private_repo or None, "token": settings.hub_token}


def reported_arguments(settings: Settings) -> dict[str, Any]:
    """What a report keeps of the command line: all but the token."""
    return {name: value for name, value in named_values(settings).items() if name != "hub_token"}


logger = get_logger(__name__)


def prepare_upload(settings: RunSettings, card: Callable[..., Card]) -> None:
    """Make the repository and let the Hub read a card before a run: at its end it would be too late.

    The card has what is known by now. Raises `ValueError` where the Hub refuses it.
    """
    check_card(card("user/name"))
    make_repository(repository_name(settings), **upload_arguments(settings))


def push_output(
    settings: RunSettings, card: Callable[..., Card], ignored: Sequence[str] = (), at_root: str | None = None
) -> str:
    """Upload the output folder but for files of `ignored` patterns; returns the address of the commit.

    `at_root` is a folder in it whose files come to the root of the repository.
    """
    commit = push_folder(
        settings.output_dir,
        repository_name(settings),
        card,
        commit_message="Upload results of the training scripts",
        ignore_patterns=ignored,
        at_root=at_root,
        **upload_arguments(settings),
    )
    logger.info(f"Uploaded to {commit}")
    return commit


def card_record(settings: RunSettings, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a report keeps for a later upload by `push_artifact`: facts of the card, JSON-able."""
    base = settings.hub_base_model or public_name(settings.pretrained_model_name_or_path)
    # One that the Hub does not list is more than a word, and is to be given again.
    licence = None if settings.hub_license_name else settings.hub_license
    return {"base_model": base, "license": licence, **facts}


def widget_of(settings: RunSettings, prompts: Sequence[str], files: Sequence[Path]) -> list[tuple[str, str]]:
    """Prompts with their pictures or clips below the output folder, as a card names them."""
    return [(p, path.relative_to(settings.output_dir).as_posix()) for p, path in zip(prompts, files)]


def left_here(settings: RunSettings, *inputs: str | None) -> list[str]:
    """Patterns for what an upload of the output folder leaves out: checkpoints, logs and the folders of `inputs`."""
    root = Path(settings.output_dir).resolve()
    folders = [Path(folder).resolve() for folder in inputs if folder is not None]
    folders.append(Path(settings.output_dir, settings.logging_dir).resolve())
    below = [f.relative_to(root).as_posix() for f in folders if f.is_relative_to(root)]
    # The names of TensorBoard's files hold that of the machine.
    return ["checkpoint-*", ".partial-*", "*tfevents*", *(f"{folder}/*" for folder in below)]
