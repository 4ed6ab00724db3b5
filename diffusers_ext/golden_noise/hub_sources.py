"""What is loaded from a folder or from the Hub, with errors that say what is wrong with the name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from diffusers_ext.core.artifacts import CONFIG_NAME
from diffusers_ext.core.hub_connection import not_found
from diffusers_ext.core.text_files import read_json


WHERE = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")


@contextmanager
def hub_names(
    argument: str,
    source: str | os.PathLike,
    kind: str,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Iterator[None]:
    """Turn the errors of a download that a wrong name explains into `ValueError`s.

    Others, such as a lost connection, stay as they are.

    Args:
        argument: the user's argument that holds the name.
        source: what it holds.
        kind: what is looked for, as in "a folder or Hub name of `kind`".
        revision, local_files_only: as the download was asked for.
    """
    wanted = f"`{argument}` must be a folder or Hub name of {kind}, got {source}"
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{wanted}: no such folder.") from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"`revision` must be a branch, tag or commit of {source}, got {revision!r}."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{wanted}: no such folder, and no such repository for this login. A private or gated "
            "one needs `token`."
        ) from error
    except RemoteEntryNotFoundError as error:
        raise ValueError(f"{wanted}: there is no {CONFIG_NAME} in it.") from error
    except LocalEntryNotFoundError as error:
        if not local_files_only:
            raise LocalEntryNotFoundError(not_found(argument, source, kind, error)) from error
        raise ValueError(
            f"{wanted}: with `local_files_only` it must have been downloaded whole before. Call it "
            "once without."
        ) from error


def read_network_config(source: str | os.PathLike, arguments: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` of a network, downloaded where `source` is no folder.

    Args:
        source: a local folder, or `"user/name"`.
        arguments: of `from_pretrained`; those that say where to look are read.

    Raises:
        ValueError: nothing of that name, no `config.json` there, or a broken one.
    """
    name, kind = "pretrained_model_name_or_path", "a golden-noise network"
    where = {key: arguments[key] for key in WHERE if arguments.get(key) is not None}
    if Path(source).is_dir():
        path = Path(source, where.get("subfolder", ""), CONFIG_NAME)
        if not path.is_file():
            raise ValueError(
                f"`{name}` must be a folder or Hub name of {kind}, got {source}: there is no "
                f"{path.relative_to(source)} in it."
            )
    else:
        offline = where.get("local_files_only", False)
        revision = where.get("revision")
        with hub_names(name, source, kind, revision=revision, local_files_only=offline):
            path = Path(hf_hub_download(str(source), CONFIG_NAME, **where))
    return read_json(path)
