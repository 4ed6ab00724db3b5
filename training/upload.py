"""What the scripts do around `--push_to_hub`: facts for the card, a check before the run, the upload."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from diffusers_ext.core.base_model import find_licence
from diffusers_ext.core.hub import Card, push_folder


logger = get_logger(__name__)


def card_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What every card needs and the command line says; `ValueError` where no licence is known."""
    base = args.hub_base_model or args.pretrained_model_name_or_path
    try:
        licence = find_licence(base, args.hub_license, token=args.hub_token)
    except ValueError as error:
        raise ValueError(f"{error} The flag is `--hub_license`.") from error
    return {"base_model": base, "license": licence, "token": args.hub_token}


def check_login(args: argparse.Namespace) -> None:
    """Raise `ValueError` where nobody is logged in: before the run, not after it."""
    try:
        HfApi(token=args.hub_token).whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError(
            "`hub_token` must be given with `push_to_hub` where nobody is logged in, got None. Run "
            "`hf auth login`."
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise ValueError(
            "`hub_token` must be a token of the Hub, got one that it refuses. Make a new one there."
        ) from error


def upload_folder(
    args: argparse.Namespace, card: Callable[..., Card], ignore_patterns: Sequence[str] = ()
) -> str:
    """Upload the output folder but for some patterns; returns the address of the commit.

    Args:
        args: of the script.
        card: as of `make_card`.
        ignore_patterns: files that stay here.
    """
    commit = push_folder(
        args.output_dir,
        repository_name(args),
        card,
        ignore_patterns=ignore_patterns,
        **upload_arguments(args),
    )
    logger.info(f"Uploaded to {commit}")
    return commit


def repository_name(args: argparse.Namespace) -> str:
    """The repository of `--hub_model_id`, or one with the name of the output folder."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def upload_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says about the upload itself."""
    return {"private": args.hub_private_repo or None, "token": args.hub_token}
