"""The `hpsv2` package behind the interface of the rewards."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import warnings
from collections.abc import Sequence
from types import ModuleType

import torch
from PIL import Image

from diffusers_ext.core.pictures import rgb_picture
from diffusers_ext.rewards.hpsv2_files import check_version
from diffusers_ext.rewards.reward import check_pairs, check_scores


logger = logging.getLogger(__name__)


class HPSv2PackageReward:
    """Scores by the installed `hpsv2` package (https://github.com/tgxs002/HPSv2).

    Its `score` reads the checkpoint of 986 million parameters anew at every call and takes one
    prompt, so every distinct prompt costs one reading, and pictures are not batched:
    `HPSv2Reward` gives the same numbers from one reading. The package also downloads the weights
    of open_clip's ViT-H-14 at its first call, sets `NO_PROXY`, uses float16 on a GPU, and fails
    on an alpha channel, so pictures become RGB here.

    Args:
        version: `"v2.0"` or `"v2.1"`. The attribute `version` also names the package's release.
        checkpoint: the version's file; the package downloads it when `None`.
        device: where the caller expects it to run; the package takes the first GPU if there is
            one. `None` accepts either.

    Raises:
        ImportError: the package is absent, or broken.
        ValueError: it runs on another device.
    """

    name = "hpsv2"

    def __init__(
        self,
        *,
        version: str = "v2.1",
        checkpoint: str | os.PathLike | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._hps_version = check_version(version)
        self.checkpoint = checkpoint
        self._package = _import_package()
        runs_on = torch.device(self._package.device).type
        if device is not None and torch.device(device).type != runs_on:
            raise ValueError(
                f"`device` must be {runs_on!r} with `backend='hpsv2'`, which that package chose, "
                f"got {str(device)!r}."
            )
        self.version = f"{version}+hpsv2-{importlib.metadata.version('hpsv2')}"
        logger.warning(
            "The package hpsv2 reads its checkpoint anew for every distinct prompt of every call; "
            "backend='transformers' reads it once."
        )

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """How well each picture fits its own prompt; as `HPSv2Reward.score`."""
        pictures, texts = check_pairs(images, prompts)
        scores = torch.empty(len(texts))
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        for prompt in dict.fromkeys(texts):
            rows = [row for row, text in enumerate(texts) if text == prompt]
            found = self._package.score(
                [rgb_picture(pictures[row]) for row in rows],
                prompt,
                cp=checkpoint,
                hps_version=self._hps_version,
            )
            scores[rows] = torch.tensor([float(value) for value in found])
        return check_scores(scores, texts, self.name)


def _import_package() -> ModuleType:
    try:
        with warnings.catch_warnings():  # the package silences all user warnings when imported
            return importlib.import_module("hpsv2.img_score")
    except (ImportError, OSError, AttributeError) as error:
        raise ImportError(
            f"`backend='hpsv2'` needs a working package hpsv2, got {type(error).__name__}: "
            f"{error}. Release 1.2.0 on PyPI lacks a vocabulary file; install it from "
            "https://github.com/tgxs002/HPSv2, or use backend='transformers'."
        ) from error
