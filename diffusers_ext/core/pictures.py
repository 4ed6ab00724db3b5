"""Pictures as a viewer shows them: every mode, depth, profile and orientation becomes plain 8-bit sRGB."""

from __future__ import annotations

import functools
import importlib.util
import io
import logging
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, features

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif",
    ".heic", ".heif", ".hif", ".jp2", ".ppm", ".pgm", ".tga",
)  # fmt: skip
# What systems leave in folders beside what people put there; names in lower case.
_SYSTEM_FILES = ("thumbs.db", "desktop.ini", "__macosx")
_WHITE = (255, 255, 255, 255)
# What Pillow raises for damaged files, depending on format and place of the damage.
_DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
_PHOTOMETRIC = 262  # TIFF 6.0, page 37: 0 is "white is zero"
_COLOUR_SPACES = {"RGB": "RGB", "CMYK": "CMYK", "GRAY": "L"}


@dataclass(frozen=True)
class FoundFiles:
    """What of a folder is read, and what is not."""

    folder: Path
    paths: tuple[Path, ...]
    passed_over: dict[str, str]
    kind: str = "pictures"

    def summary(self) -> str:
        """One line: how many are read of how many entries, which were passed over and why."""
        total = len(self.paths) + len(self.passed_over)
        line = f"Reading {len(self.paths)} {self.kind} of {total} entries of {self.folder}"
        if not self.passed_over:
            return f"{line}."
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.passed_over.items():
            by_reason.setdefault(reason, []).append(name)
        parts = [
            f"{len(names)} {reason} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
            for reason, names in by_reason.items()
        ]
        return f"{line}; passed over: {'; '.join(parts)}."


def find_pictures(folder: str | os.PathLike, name: str = "folder") -> FoundFiles:
    """The pictures of a folder, by the ends of their names, subfolders not included."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`{name}` must be a folder of pictures, got {folder}.")
    reasons = {path: why_no_picture(path) for path in sorted(folder.iterdir())}
    found = tuple(path for path, reason in reasons.items() if reason is None)
    pictures = FoundFiles(folder, found, {path.name: reason for path, reason in reasons.items() if reason is not None})
    if not found:
        raise ValueError(
            f"`{name}` must hold pictures ({', '.join(PICTURE_SUFFIXES)}), got none in {folder}. {pictures.summary()}"
        )
    return pictures


def read_pictures(folder: str | os.PathLike, name: str = "folder") -> list[Image.Image]:
    """All pictures of a folder; how many of how many, and what is passed over, goes into the log."""
    found = find_pictures(folder, name)
    logger.info(found.summary())
    return [read_picture(path) for path in found.paths]


def check_first_frames(folder: str | os.PathLike | None, asked: bool, needed: bool) -> None:
    """Raise `ValueError` unless `first_frames_dir` is a folder of pictures where a model asks for it, else `None`."""
    if folder is not None:
        if not asked:
            raise ValueError(
                f"`first_frames_dir` must be None for a model that draws clips from text alone, got {folder}."
            )
        find_pictures(folder, "first_frames_dir")
    elif asked and needed:
        raise ValueError(
            "`first_frames_dir` must be a folder of pictures for an image-to-video model, whose clips begin with one, "
            "got None."
        )


def read_first_frames(folder: str | os.PathLike, height: int, width: int) -> list[Image.Image]:
    """The pictures of `first_frames_dir`, scaled to cover a size and cropped around the centre."""
    pictures = read_pictures(folder, "first_frames_dir")
    return [ImageOps.fit(picture, (width, height), Image.BICUBIC) for picture in pictures]


def model_pixels(pictures: Sequence[Image.Image | np.ndarray]) -> torch.Tensor:
    """Pictures of one size as VAEs read them, `(pictures, 3, height, width)` float32 from -1 to 1."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1.0


def is_caption(name: str) -> bool:
    """Whether a file beside pictures holds captions by its name: `a.txt`, `metadata.jsonl` and the like."""
    return name.lower().endswith((".txt", ".caption")) or name.lower().startswith("metadata.")


def is_hidden(path: Path) -> bool:
    """Whether a system or a program made the file for itself, such as `._a.jpg` and `Thumbs.db`."""
    return path.name.startswith(".") or path.name.lower() in _SYSTEM_FILES


def why_no_picture(path: Path) -> str | None:
    """Why an entry of a folder is not read as a picture; `None` for one that is."""
    if is_hidden(path):
        return "hidden or of the system"
    if path.is_dir():
        return "folders"
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        return "of another format"
    return None if path.is_file() else "links to nothing or no plain files"


def read_picture(path: str | os.PathLike) -> Image.Image:
    """A picture file as RGB, turned as its camera was held; the first frame of an animation.

    `ValueError` where it is empty, damaged, no picture, of a format that no installed package reads, or has more
    pixels than Pillow takes for safe (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{path} must be a picture, got an empty file. Remove it or copy it anew.")
    _check_format(path)
    try:
        with Image.open(path) as file:
            frames = getattr(file, "n_frames", 1)
            if frames > 1 and file.format != "MPO":  # a camera's JPEG with a preview or a depth map
                _warn_once(f"{path} has {frames} frames: the first one is read.")
            return rgb_picture(ImageOps.exif_transpose(_black_is_zero(file)), str(path))
    except _DAMAGE as error:
        raise ValueError(
            f"{path} must be a picture, got a file that is none or cannot be read: {error}. Remove "
            "it, or save it anew as an 8-bit PNG."
        ) from error


def rgb_picture(image: Image.Image, name: str = "The picture") -> Image.Image:
    """A PIL image of any mode as RGB the way it looks: on white where it is transparent.

    16-bit and 32-bit whole numbers are rescaled from 0 ... 65535, floats from 0 ... 1. An embedded colour profile
    other than sRGB is applied. An RGB image with neither comes back as a plain copy.
    """
    image = _eight_bits(image)
    if not image.has_transparency_data:
        return _apply_profile(image, name)
    grey = image.mode in ("L", "LA", "La")
    image = image.convert("LA" if grey else "RGBA")
    picture = _apply_profile(image, name).convert("RGBA")
    picture.putalpha(image.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), picture).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep grey pictures as 8-bit ones; Pillow's own conversion cuts them off at 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    shares = values if image.mode == "F" else values / 65535
    if not (shares.min() >= 0 and shares.max() <= 1):  # NaN breaks both
        limit = "1" if image.mode == "F" else "65535"
        raise ValueError(
            f"values must lie in 0 ... {limit} for mode {image.mode}, got {values.min()} ... {values.max()}"
        )
    grey = Image.fromarray(np.round(shares * 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    if "icc_profile" in image.info:
        grey.info["icc_profile"] = image.info["icc_profile"]
    return grey


def _apply_profile(image: Image.Image, name: str) -> Image.Image:
    """The colours of an 8-bit picture as sRGB; its transparency is left out."""
    plain = image.convert({"L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB"))
    embedded = image.info.get("icc_profile")
    if not embedded:
        if plain.mode == "CMYK":
            _warn_once(f"{name} is CMYK without a colour profile: its colours are approximate.")
        return plain.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(embedded))
        described = ImageCms.getProfileDescription(profile).strip()
        space = profile.profile.xcolor_space.strip()
        if _COLOUR_SPACES.get(space) != plain.mode:
            raise ValueError(f"it is for {space}, the picture is {plain.mode}")
        if plain.mode == "RGB" and "srgb" in described.lower():
            return plain
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(plain, profile, srgb, outputMode="RGB")
    except (OSError, ValueError, ImageCms.PyCMSError) as error:
        _warn_once(f"The colour profile of {name} is passed over, as most viewers do: {error}.")
        return plain.convert("RGB")


def _check_format(path: Path) -> None:
    """Make Pillow read HEIC where its plug-in is installed; raise `ValueError` for what nothing reads."""
    with path.open("rb") as file:
        brand = file.read(12)[4:]
    if brand[:4] != b"ftyp":
        return
    lacking = None
    if brand[4:] in (b"avif", b"avis"):
        lacking = None if features.check("avif") else ("AVIF", "-U pillow")
    elif brand[4:8] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
        if importlib.util.find_spec("pillow_heif") is None:
            lacking = ("HEIC", "pillow-heif")
        else:
            from pillow_heif import register_heif_opener

            register_heif_opener()
    if lacking is not None:
        raise ValueError(
            f"{path} must be of a format that can be read here, got {lacking[0]}. Run `pip install {lacking[1]}`, or "
            "save it as PNG."
        )


def _black_is_zero(file: Image.Image) -> Image.Image:
    """TIFF may count from white; Pillow heeds that in 8-bit pictures, not in 16-bit ones."""
    tags = getattr(file, "tag_v2", {})
    if not file.mode.startswith("I;16") or tags.get(_PHOTOMETRIC) != 0:
        return file
    turned = Image.fromarray((65535 - np.asarray(file)).astype(np.uint16))
    turned.info.update(file.info)
    return turned


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
