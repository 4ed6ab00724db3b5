"""The licence of an artifact: the one given, else the one that its base model's card names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, metadata_load
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError, RepositoryNotFoundError

from diffusers_ext.hub.safe_markdown import code, link

_CARD_NAME = "README.md"
# Begin the name of a repository's folder in the cache of the Hub, whose files are links to `blobs`.
CACHED_FOLDERS = ("models--", "datasets--")


@dataclass(frozen=True)
class Licence:
    """A licence by the Hub's three header keys.

    Args:
        license: identifier of the Hub's list, as `"apache-2.0"`; `"other"` for any further one.
        license_name: identifier of a licence that is not on the list.
        license_link: its address, or a file of the repository.

    Raises:
        ValueError: no licence, or another one without its name.
    """

    license: str
    license_name: str | None = None
    license_link: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.license, str) or not self.license.strip():
            raise ValueError(f"`license` must name a licence, got {self.license!r}.")
        if self.license == "other" and not self.license_name:
            raise ValueError(
                "`license_name` must be given with the license 'other', got "
                f'{self.license_name!r}. Pass `Licence("other", "its-name", "https://its.address")`, '
                "or none where the base model is on the Hub and its card tells."
            )

    @property
    def sentence(self) -> str:
        """What a card's text says about it."""
        name = code(self.license_name or self.license)
        return f"These files are shared under {link(name, self.license_link)}."


def public_name(source: str | os.PathLike) -> str:
    """A name on the Hub; of a folder the last part, as its path means nothing to others.

    Args:
        source: Hub name, or folder; one in the cache of the Hub has the name of its repository.
    """
    path = Path(source)
    cached = next((part for part in path.parts if part.startswith(CACHED_FOLDERS)), None)
    if cached is not None:
        return cached.partition("--")[2].replace("--", "/")
    is_path = path.exists() or path.is_absolute() or len(path.parts) > 2 or ".." in path.parts
    return path.resolve().name if is_path else str(source)


def named_licence(license: str | None, license_name: str | None, license_link: str | None) -> str | Licence | None:
    """A licence as a command line tells it, in three flags; `None` leaves it to the base model's card.

    Raises:
        ValueError: `"other"` without a name, or a name or address without a licence.
    """
    if license is None and (license_name or license_link):
        raise ValueError(
            f"`license` must be given with `license_name` {license_name!r} and `license_link` "
            f'{license_link!r}, got None. Give "other" for a licence that the Hub does not list.'
        )
    return Licence(license, license_name, license_link) if license_name or license_link else license


def find_licence(
    base: str | os.PathLike, licence: str | Licence | None = None, *, token: str | None = None
) -> Licence:
    """The licence of what is derived from a base model: the one given, else the base model's own.

    Args:
        base: Hub name or folder of the base model, whose card is read when nothing is given.
        licence: a licence, or one of the Hub's names for it, such as `"apache-2.0"`.
        token: to read the card of a private or gated model.

    Raises:
        ValueError: none is given and the base model's card names none.
    """
    if isinstance(licence, Licence):
        return licence
    if licence is not None:
        return Licence(licence)
    path = Path(base, _CARD_NAME) if Path(base).is_dir() else None
    if path is None or not path.is_file():
        name = public_name(base)
        path = find_on_hub(name, _CARD_NAME, token) if "/" in name else None
    data = (metadata_load(path) if path is not None else None) or {}
    name, label, link = (data.get(key) for key in ("license", "license_name", "license_link"))
    if not isinstance(name, str) or (name == "other" and not label):
        raise ValueError(
            f"`license` must be given, got None, and the card of the base model {base} names none. "
            'Look it up there and pass its name on the Hub, such as "apache-2.0".'
        )
    if link and "://" not in link:  # a file of the base model
        name_on_hub = public_name(base)
        link = f"{constants.ENDPOINT}/{name_on_hub}/blob/main/{link}" if "/" in name_on_hub else None
    return Licence(name, label, link)


def find_on_hub(repo_id: str, name: str, token: str | None) -> Path | None:
    """A file of a repository; `None` where there is no such repository or no such file in it."""
    try:
        return Path(hf_hub_download(repo_id, name, token=token))
    except (HFValidationError, RepositoryNotFoundError, RemoteEntryNotFoundError):
        return None
