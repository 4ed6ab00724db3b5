"""HPSv2: the preferences of people who ranked pictures of many text-to-image models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from diffusers_ext.core.sources import check_download_arguments
from diffusers_ext.rewards.clip_reward import CLIPReward
from diffusers_ext.rewards.hpsv2_files import HPSV2_REPOSITORY, check_version, locate_checkpoint
from diffusers_ext.rewards.hpsv2_text import import_ftfy, token_ids
from diffusers_ext.rewards.letterbox import letterbox
from diffusers_ext.rewards.open_clip_weights import load_open_clip, vit_h_14_config


# The published checkpoints come without a tokenizer; this repository holds the one of their model.
TOKENIZER_REPOSITORY = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class HPSv2Reward(CLIPReward):
    """`cos(text, image)` of a CLIP trained on ranked pictures (arXiv 2306.09341).

    The number that `hpsv2.score` gives; the tables of its authors show it times 100. Needs the
    extra `rewards` (ftfy).

    Args:
        model: transformers' `CLIPModel` with the weights; it is frozen and set to eval mode.
        version: `"v2.0"` or `"v2.1"`. The attribute `version` also tells of `antialias=False`.
        antialias: smooth before shrinking, as torchvision does since 0.17; `False` gives the
            numbers of an older torchvision, which differ by up to 0.003 in the tests' tiny model.
    """

    name = "hpsv2"

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: Any,
        *,
        version: str = "v2.1",
        antialias: bool = True,
        batch_size: int = 16,
    ) -> None:
        import_ftfy()
        label = check_version(version) + ("" if antialias else "+no-antialias")
        super().__init__(model, tokenizer, version=label, batch_size=batch_size)
        self.antialias = antialias

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike = HPSV2_REPOSITORY,
        *,
        version: str = "v2.1",
        tokenizer: str | os.PathLike | None = None,
        config: CLIPConfig | None = None,
        antialias: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
        **download_arguments: Any,
    ) -> HPSv2Reward:
        """Load a published checkpoint from a file, a folder or the Hub.

        Args:
            pretrained_model_name_or_path: a checkpoint, a folder that holds the version's
                checkpoint under its published name, or `"user/name"`.
            version: `"v2.0"` (what `hpsv2.score` takes unless told otherwise) or `"v2.1"`.
            tokenizer: folder or repository of CLIP's tokenizer. When `None`, the folder of the
                checkpoint if it holds one, else `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`.
            config: structure of the checkpoint; ViT-H-14 when `None`, as published.
            download_arguments: `revision` (of the checkpoint), `cache_dir`, `token`,
                `local_files_only`.

        Raises:
            ValueError: no such version or file, or the weights are not the model's.
            ImportError: ftfy is not installed.
        """
        check_download_arguments(download_arguments, f"{cls.__name__}.from_pretrained")
        import_ftfy()  # before gigabytes are read
        path = locate_checkpoint(pretrained_model_name_or_path, version, download_arguments)
        if tokenizer is None:
            files = (path.with_name(name) for name in ("tokenizer.json", "vocab.json"))
            tokenizer = path.parent if any(map(Path.is_file, files)) else TOKENIZER_REPOSITORY
        where = {key: value for key, value in download_arguments.items() if key != "revision"}
        words = AutoTokenizer.from_pretrained(str(tokenizer), **where)
        model = load_open_clip(path, config or vit_h_14_config(), dtype).to(device)
        return cls(model, words, version=version, antialias=antialias, batch_size=batch_size)

    def _pixel_values(self, images: Sequence[Image.Image]) -> torch.Tensor:
        size = self.model.config.vision_config.image_size
        return torch.stack([letterbox(i, size, antialias=self.antialias) for i in images])

    def _tokens(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        length = self.model.config.text_config.max_position_embeddings
        return {"input_ids": token_ids(self.tokenizer, prompts, length)}

    def _from_cosines(self, cosines: torch.Tensor) -> torch.Tensor:
        return cosines
