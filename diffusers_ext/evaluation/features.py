"""Feature extractors for images behind one interface: pixels, DINOv2 and CLIP."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from diffusers_ext.core.pictures import rgb_picture
from diffusers_ext.core.sources import check_download_arguments


logger = logging.getLogger(__name__)

ModelFeaturesType = TypeVar("ModelFeaturesType", bound="ModelFeatures")


class FeatureExtractor(Protocol):
    """Whatever turns pictures into vectors."""

    def extract(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Features `(n, dim)` of `n` pictures, float32 on the CPU."""
        ...


class PixelFeatures:
    """The pixels themselves as features; needs no weights.

    Args:
        size: resize to `size x size` first; `None` keeps the size, which all pictures must share.
    """

    def __init__(self, size: int | None = None) -> None:
        if size is not None and size < 1:
            raise ValueError(f"`size` must be at least 1, got {size}.")
        self.size = size

    def extract(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """RGB values in [0, 1], `(n, 3 * height * width)` float32; not normalised."""
        pictures = check_images(images)
        if self.size is not None:
            shape = (self.size, self.size)
            pictures = [p.resize(shape, Image.Resampling.BICUBIC) for p in pictures]
        sizes = {picture.size for picture in pictures}
        if len(sizes) > 1:
            raise ValueError(f"`images` must share one size, got {sorted(sizes)}. Pass `size=`.")
        pixels = np.stack([np.asarray(picture) for picture in pictures])
        return torch.from_numpy(pixels).flatten(1).float() / 255.0


class ModelFeatures:
    """Base of the extractors that run a transformers model, loaded once, frozen and in eval mode."""

    model_types: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: Any, image_processor: Any, *, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.model = model.requires_grad_(False).eval()
        self.image_processor, self.batch_size = image_processor, batch_size

    @classmethod
    def from_pretrained(
        cls: type[ModelFeaturesType],
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
        **download_arguments: Any,
    ) -> ModelFeaturesType:
        """Load model and preprocessing from a folder or from the Hub; safetensors only.

        Args:
            dtype: of the model; the features come back as float32.
            download_arguments: `revision`, `cache_dir`, `token`, `local_files_only`.
        """
        check_download_arguments(download_arguments, f"{cls.__name__}.from_pretrained")
        source = str(pretrained_model_name_or_path)
        config = AutoConfig.from_pretrained(source, **download_arguments)
        if config.model_type not in cls.model_types:
            raise ValueError(
                f"`pretrained_model_name_or_path` must be a model of type {cls.model_types}, got "
                f"{config.model_type!r} in {source}."
            )
        model = AutoModel.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, **download_arguments
        )
        # torchvision is not a dependency, so the PIL backend is asked for by name.
        parts = {
            "image_processor": AutoImageProcessor.from_pretrained(
                source, backend="pil", **download_arguments
            ),
            **cls._load_parts(source, **download_arguments),
        }
        return cls(model.to(device), **parts, batch_size=batch_size)

    @classmethod
    def _load_parts(cls, source: str, **download_arguments: Any) -> dict[str, Any]:
        """Further constructor arguments of a subclass."""
        return {}

    @torch.no_grad()
    def extract(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """L2-normalised features `(n, dim)`, float32 on the CPU."""
        pictures = check_images(images)
        batches = [
            pictures[start : start + self.batch_size]
            for start in range(0, len(pictures), self.batch_size)
        ]
        features = [self._embed(self._preprocess(batch)).float().cpu() for batch in batches]
        return F.normalize(torch.cat(features), dim=1)

    def _preprocess(self, pictures: list[Image.Image]) -> torch.Tensor:
        pixels = self.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)

    def _embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} must define `_embed`.")


class DINOv2Features(ModelFeatures):
    """The class token of DINOv2 after its final norm (arXiv 2304.07193), L2-normalised."""

    model_types = ("dinov2", "dinov2_with_registers")

    def _embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).pooler_output


class CLIPFeatures(ModelFeatures):
    """CLIP image embeddings (arXiv 2103.00020), and how well pictures fit their prompts."""

    model_types = ("clip",)

    def __init__(
        self, model: Any, image_processor: Any, tokenizer: Any, *, batch_size: int = 32
    ) -> None:
        super().__init__(model, image_processor, batch_size=batch_size)
        self.tokenizer = tokenizer

    @classmethod
    def _load_parts(cls, source: str, **download_arguments: Any) -> dict[str, Any]:
        return {"tokenizer": AutoTokenizer.from_pretrained(source, **download_arguments)}

    def _embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pooled = self.model.vision_model(pixel_values=pixel_values).pooler_output
        return self.model.visual_projection(pooled)

    @torch.no_grad()
    def text_similarity(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> torch.Tensor:
        """CLIP-T: cosine of each picture and its own prompt, `(n,)` float32 on the CPU.

        A prompt longer than CLIP reads is cut off, with a warning in the log.
        """
        if isinstance(prompts, str) or len(prompts) != len(images):
            raise ValueError(
                f"`prompts` must hold one prompt per image ({len(images)}), got {prompts!r:.80}."
            )
        distinct = list(dict.fromkeys(prompts))
        texts = torch.cat([self._embed_text(prompt) for prompt in distinct])
        texts = F.normalize(texts.float().cpu(), dim=1)
        rows = [distinct.index(prompt) for prompt in prompts]
        return (self.extract(images) * texts[rows]).sum(1)

    def _embed_text(self, prompt: str) -> torch.Tensor:
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompt, truncation=True, max_length=limit, return_tensors="pt")
        if len(self.tokenizer(prompt, verbose=False).input_ids) > limit:
            logger.warning("CLIP reads %d tokens; the rest of %r is cut off.", limit, prompt)
        pooled = self.model.text_model(**tokens.to(self.model.device)).pooler_output
        return self.model.text_projection(pooled)


def check_images(images: Sequence[Image.Image], name: str = "images") -> list[Image.Image]:
    """The pictures as a list of RGB images, as they look; raises where there is none or one is no PIL image."""
    pictures = list(images)
    wrong = [type(picture) for picture in pictures if not isinstance(picture, Image.Image)]
    if not pictures or wrong:
        raise ValueError(
            f"`{name}` must be a non-empty list of PIL images, got {wrong[:1] or 'none'}."
        )
    return [rgb_picture(picture) for picture in pictures]
