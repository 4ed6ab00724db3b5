"""Rewards that compare a picture and its prompt in the embedding space of a CLIP model: CLIPScore, PickScore."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

from diffusers_ext.core.pictures import rgb_picture
from diffusers_ext.core.sources import check_download_arguments
from diffusers_ext.rewards.reward import check_pairs, check_scores

CLIPRewardType = TypeVar("CLIPRewardType", bound="CLIPReward")
ProcessorRewardType = TypeVar("ProcessorRewardType", bound="ProcessorReward")
# What transformers takes for "the largest id": https://github.com/huggingface/transformers/pull/24773
_LEGACY_EOS = 2


def projected_features(given: Any) -> torch.Tensor:
    """What `get_image_features` and `get_text_features` give, `(n, dim)`: transformers 4 has no fields around it."""
    return given if isinstance(given, torch.Tensor) else given.pooler_output


class CLIPReward:
    """Base: the model is loaded once, every distinct prompt is read once a call, all in batches."""

    name: ClassVar[str]

    def __init__(self, model: CLIPModel, tokenizer: Any, *, version: str, batch_size: int = 16) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        config = model.config.text_config
        wanted, found = config.eos_token_id, tokenizer.eos_token_id
        # The text feature is read at the end token; without it CLIP silently reads the first one.
        if found >= config.vocab_size or wanted not in (found, _LEGACY_EOS):
            raise ValueError(
                f"`tokenizer` must be the one of the model, with {wanted} as the end token of "
                f"{config.vocab_size}, got {found}."
            )
        self.model = model.requires_grad_(False).eval()
        self.tokenizer, self.version, self.batch_size = tokenizer, version, batch_size

    def to(self: CLIPRewardType, device: torch.device | str) -> CLIPRewardType:
        """Move the model; returns the reward itself."""
        self.model.to(device)
        return self

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """How well each picture fits its own prompt: `(n,)` float32 on the CPU.

        Pictures are read as `rgb_picture` does, on white where transparent; prompts are cut off where the model stops
        reading (77 tokens).
        """
        pictures, texts = check_pairs(images, prompts)
        distinct = list(dict.fromkeys(texts))
        rows = [distinct.index(text) for text in texts]
        cosines = (self.image_features(pictures) * self.text_features(distinct)[rows]).sum(1)
        return check_scores(self._from_cosines(cosines), texts, self.name)

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """As `score`, of pictures `(n, 3, height, width)` in [0, 1], with a gradient; on their device, float32.

        Pictures are resized as tensors, which rounds no pixel to a whole level as the reading of files does.
        """
        distinct = list(dict.fromkeys(prompts))
        text = self.text_features(distinct)[[distinct.index(prompt) for prompt in prompts]].to(pixels.device)
        values = self._tensor_values(pixels.float()).to(self.model.device, self.model.dtype)
        features = projected_features(self.model.get_image_features(pixel_values=values)).float().to(pixels.device)
        return self._from_cosines((F.normalize(features, dim=1) * text).sum(1))

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """L2-normalised embeddings `(n, dim)` of `n` pictures, float32 on the CPU."""

        def embed(batch: Sequence[Image.Image]) -> Any:
            pixels = self._pixel_values(batch).to(self.model.device, self.model.dtype)
            return self.model.get_image_features(pixel_values=pixels)

        return self._features(embed, images)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        """L2-normalised embeddings `(n, dim)` of `n` prompts, float32 on the CPU."""

        def embed(batch: Sequence[str]) -> Any:
            tokens = {key: ids.to(self.model.device) for key, ids in self._tokens(batch).items()}
            return self.model.get_text_features(**tokens)

        return self._features(embed, prompts)

    def _features(self, embed: Callable[[Any], Any], items: Sequence[Any]) -> torch.Tensor:
        starts = range(0, len(items), self.batch_size)
        batches = [embed(items[start : start + self.batch_size]) for start in starts]
        features = torch.cat([projected_features(batch).float().cpu() for batch in batches])
        return features / features.norm(dim=1, keepdim=True)

    def _pixel_values(self, images: Sequence[Image.Image]) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} must define `_pixel_values`.")

    def _tensor_values(self, pixels: torch.Tensor) -> torch.Tensor:
        """`_pixel_values` of pictures `(n, 3, height, width)` in [0, 1], float32, with a gradient."""
        raise TypeError(f"{type(self).__name__} must define `_tensor_values`.")

    def _tokens(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        raise TypeError(f"{type(self).__name__} must define `_tokens`.")

    def _from_cosines(self, cosines: torch.Tensor) -> torch.Tensor:
        """The metric of cosines `(n,)`."""
        return cosines


class ProcessorReward(CLIPReward):
    """Base of the rewards that use a CLIP model's own transformers preprocessing."""

    default_model: ClassVar[str]
    default_processor: ClassVar[str | None] = None  # the model's own repository when `None`
    default_version: ClassVar[str | None] = None  # the last part of the model's name when `None`

    def __init__(
        self, model: CLIPModel, image_processor: Any, tokenizer: Any, *, version: str, batch_size: int = 16
    ) -> None:
        super().__init__(model, tokenizer, version=version, batch_size=batch_size)
        self.image_processor = image_processor

    @classmethod
    def from_pretrained(
        cls: type[ProcessorRewardType],
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        *,
        processor: str | os.PathLike | None = None,
        version: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
        **download_arguments: Any,
    ) -> ProcessorRewardType:
        """Load the model and its preprocessing from a folder or from the Hub; the published ones when `None`.

        Args:
            processor: folder or repository of tokenizer and image preprocessing; a local model's own when `None`.
            version: what results call this model; the metric's own when `None`.
            download_arguments: `revision` (of the model), `cache_dir`, `token`, `local_files_only`.
        """
        check_download_arguments(download_arguments, f"{cls.__name__}.from_pretrained")
        source = str(pretrained_model_name_or_path or cls.default_model)
        if processor is None:
            processor = source if Path(source).is_dir() else cls.default_processor or source
        config = AutoConfig.from_pretrained(source, **download_arguments)
        if config.model_type != "clip":
            raise ValueError(
                "`pretrained_model_name_or_path` must be a model of type 'clip', got "
                f"{config.model_type!r} in {source}."
            )
        model, loading = CLIPModel.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, **download_arguments
        )
        if loading["missing_keys"]:
            missing = sorted(loading["missing_keys"])
            raise ValueError(
                f"{source} must hold all weights of a CLIP model, got none for {len(missing)} of "
                f"them, the first {missing[0]}."
            )
        if str(processor) != source:
            download_arguments.pop("revision", None)
        # torchvision is not a dependency, so the PIL backend is asked for by name.
        image_processor = AutoImageProcessor.from_pretrained(str(processor), backend="pil", **download_arguments)
        tokenizer = AutoTokenizer.from_pretrained(str(processor), **download_arguments)
        version = version or cls.default_version or Path(source).name
        return cls(model.to(device), image_processor, tokenizer, version=version, batch_size=batch_size)

    def _pixel_values(self, images: Sequence[Image.Image]) -> torch.Tensor:
        pictures = [rgb_picture(image) for image in images]
        return self.image_processor(images=pictures, return_tensors="pt")["pixel_values"]

    def _tensor_values(self, pixels: torch.Tensor) -> torch.Tensor:
        processor = self.image_processor
        shortest = processor.size.get("shortest_edge")
        height, width = processor.size.get("height"), processor.size.get("width")
        if shortest is not None:
            short = min(pixels.shape[-2:])
            height, width = (int(side * shortest / short) for side in pixels.shape[-2:])
        pixels = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)
        if processor.do_center_crop:
            top, left = ((have - processor.crop_size[name]) // 2 for have, name in
                         zip(pixels.shape[-2:], ("height", "width"), strict=True))  # fmt: skip
            pixels = pixels[..., top : top + processor.crop_size["height"], left : left + processor.crop_size["width"]]
        return standardised(pixels, processor.image_mean, processor.image_std)

    def _tokens(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return {key: tokens[key] for key in ("input_ids", "attention_mask")}


def standardised(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Channels less their mean, over their deviation; of pictures `(..., 3, height, width)`."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (mean, std))
    return (pixels - mean) / std


class CLIPScoreReward(ProcessorReward):
    """`max(100 * cos(text, image), 0)`, between 0 and 100.

    The scale is that of torchmetrics and of diffusers' evaluation guide. The paper (Hessel et al., arXiv 2104.08718)
    has the factor 2.5 and puts "A photo depicts" before each caption; neither is done here. Numbers compare only
    within one CLIP model, which is the `version`: the last part of its repository or folder, unless another is given.
    """

    name = "clip_score"
    default_model = "openai/clip-vit-large-patch14"

    def _from_cosines(self, cosines: torch.Tensor) -> torch.Tensor:
        return (100.0 * cosines).clamp(min=0.0)


class PickScoreReward(ProcessorReward):
    """`exp(logit_scale) * cos(text, image)`, the scale trained with the model (arXiv 2305.01569).

    Scores of one prompt's pictures compare; their softmax is the probability that people pick each. Scores of
    different prompts do not.
    """

    name = "pickscore"
    default_model = "yuvalkirstain/PickScore_v1"
    default_processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    default_version = "v1"

    def _from_cosines(self, cosines: torch.Tensor) -> torch.Tensor:
        scale = self.model.logit_scale.detach().float().exp()
        return cosines * scale.to(cosines.device)
