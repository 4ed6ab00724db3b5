"""What the command line says about an upload and its card, and whether somebody is logged in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from diffusers_ext.core.run_settings import HubSettings
from diffusers_ext.core.settings import Settings, named_values
from diffusers_ext.hub.licence import find_licence, named_licence


def card_arguments(args: HubSettings) -> dict[str, Any]:
    """What every card needs and the command line says; `ValueError` where no licence is known."""
    base = args.hub_base_model or args.pretrained_model_name_or_path
    try:
        given = named_licence(args.hub_license, args.hub_license_name, args.hub_license_link)
        licence = find_licence(base, given, token=args.hub_token)
    except ValueError as error:
        raise ValueError(f"{error} The flag is `--hub_license`.") from error
    return {"base_model": base, "license": licence, "token": args.hub_token}


def check_login(args: HubSettings) -> None:
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


def repository_name(args: HubSettings) -> str:
    """The repository of `--hub_model_id`, or one with the name of the output folder."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def upload_arguments(args: HubSettings) -> dict[str, Any]:
    """What the command line says about the upload itself."""
    return {"private": args.hub_private_repo or None, "token": args.hub_token}


def reported_arguments(args: Settings) -> dict[str, Any]:
    """What a report keeps of the command line: all but the token."""
    return {name: value for name, value in named_values(args).items() if name != "hub_token"}
