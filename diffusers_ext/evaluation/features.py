"""Features of pictures, and how far apart two sets of them are: Frechet distance, MMD, coverage, 1-NNA, JSD."""

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
from diffusers_ext.evaluation.rendering import check_counts

logger = logging.getLogger(__name__)

ModelFeaturesType = TypeVar("ModelFeaturesType", bound="ModelFeatures")


class FeatureExtractor(Protocol):
    """Whatever turns pictures into vectors."""

    def extract(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Features `(n, dim)` of `n` pictures, float32 on the CPU."""
        ...


class PixelFeatures:
    """The pixels themselves, resized to `size x size` first where it is given; needs no weights."""

    def __init__(self, size: int | None = None) -> None:
        check_counts(size=size)
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
        check_counts(batch_size=batch_size)
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

        `download_arguments` are `revision`, `cache_dir`, `token`, `local_files_only`.
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
        processor = AutoImageProcessor.from_pretrained(source, backend="pil", **download_arguments)
        further = cls._load_further(source, **download_arguments)
        return cls(model.to(device), processor, *further, batch_size=batch_size)

    @classmethod
    def _load_further(cls, source: str, **download_arguments: Any) -> list[Any]:
        """Further constructor arguments of a subclass."""
        return []

    @torch.no_grad()
    def extract(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """L2-normalised features `(n, dim)`, float32 on the CPU."""
        pictures = check_images(images)
        batches = [pictures[start : start + self.batch_size] for start in range(0, len(pictures), self.batch_size)]
        features = []
        for batch in batches:
            pixels = self.image_processor(images=batch, return_tensors="pt")["pixel_values"]
            features.append(self._embed(pixels.to(self.model.device, self.model.dtype)).float().cpu())
        return F.normalize(torch.cat(features), dim=1)

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

    def __init__(self, model: Any, image_processor: Any, tokenizer: Any, *, batch_size: int = 32) -> None:
        super().__init__(model, image_processor, batch_size=batch_size)
        self.tokenizer = tokenizer

    @classmethod
    def _load_further(cls, source: str, **download_arguments: Any) -> list[Any]:
        return [AutoTokenizer.from_pretrained(source, **download_arguments)]

    def _embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pooled = self.model.vision_model(pixel_values=pixel_values).pooler_output
        return self.model.visual_projection(pooled)

    @torch.no_grad()
    def text_similarity(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """CLIP-T: cosine of each picture and its own prompt, `(n,)` float32 on the CPU.

        A prompt longer than CLIP reads is cut off, with a warning in the log.
        """
        if isinstance(prompts, str) or len(prompts) != len(images):
            raise ValueError(f"`prompts` must hold one prompt per image ({len(images)}), got {prompts!r:.80}.")
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
        raise ValueError(f"`{name}` must be a non-empty list of PIL images, got {wrong[:1] or 'none'}.")
    return [rgb_picture(picture) for picture in pictures]


def extract_features(features: FeatureExtractor, images: list[Image.Image]) -> torch.Tensor:
    """Features `(n, dim)`; raises `ValueError` for a wrong shape or values that are not finite."""
    found = features.extract(images)
    if found.ndim != 2 or found.shape[0] != len(images) or not torch.isfinite(found).all():
        raise ValueError(
            f"`features` must give finite features (images, dim) for {len(images)} images, got "
            f"{tuple(found.shape)}{'' if torch.isfinite(found).all() else ' with NaN'}."
        )
    return found


def pixel_drift(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of pictures `(n, 3, height, width)` in [0, 1]; returns `(n,)`."""
    if base.shape != tuned.shape:
        raise ValueError(
            f"`base` and `tuned` must draw pictures of one size, got {tuple(base.shape[1:])} and "
            f"{tuple(tuned.shape[1:])}. Pass `height` and `width`."
        )
    return (base.double() - tuned.double()).abs().flatten(1).mean(1)


def feature_drift(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """`(1 - cos) / 2` of features `(n, dim)`, row by row, as in PEFT's image generation benchmark.

    It is computed as `|u - v|^2 / 4` of the unit vectors, which is exactly 0 for equal rows.
    """
    base, tuned = (F.normalize(x.double(), dim=-1) for x in (base, tuned))
    return (base - tuned).square().sum(-1) / 4


def diversity(features: torch.Tensor) -> float:
    """Mean `(1 - cos) / 2` over all pairs of rows of `(n, dim)`; the scale of `feature_drift`."""
    rows, columns = torch.triu_indices(features.shape[0], features.shape[0], 1)
    return feature_drift(features[rows], features[columns]).mean().item()


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Squared Frechet distance of Gaussians fitted to two sets ("FID", arXiv 1706.08500, eq. 6).

    `|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2})` with means `m` and covariances `S`. With centred rows `S = X^T
    X` the last trace is the sum of the singular values of `X_a X_b^T`, so no matrix root is taken and sets smaller
    than `dim` lose no digits.

    It is biased upwards by about `1/n`: two samples of one distribution are not at 0 unless `n` is far above `dim`.
    Compare only sets of the same size, at least two rows, and with their floor.
    """
    a, b = _check(a, b, rows=2)
    factors = [(x - x.mean(0)) / (x.shape[0] - 1) ** 0.5 for x in (a, b)]
    # The triangular factor has the same `X^T X` with at most `dim` rows.
    factors = [torch.linalg.qr(x, mode="r").R if x.shape[0] > x.shape[1] else x for x in factors]
    cross = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    traces = sum(factor.square().sum() for factor in factors)
    distance = (a.mean(0) - b.mean(0)).square().sum() + traces - 2 * cross
    return distance.clamp_min(0).item()


def median_bandwidth(features: torch.Tensor) -> float:
    """Median distance between the L2-normalised features `(n, dim)`, over all pairs of rows."""
    features = F.normalize(_finite(features, "features"), dim=1)
    count = features.shape[0]
    distances = _distances(features, features)
    rows, columns = torch.triu_indices(count, count, 1)
    median = distances[rows, columns].median().item()
    if not median > 0:
        raise ValueError(
            "`features` must differ from one another, got at least half of all pairs equal. Are "
            "the images blank? Otherwise pass a `bandwidth`."
        )
    return median


def mmd(a: torch.Tensor, b: torch.Tensor, *, bandwidth: float | None = None) -> float:
    """Squared maximum mean discrepancy of L2-normalised features, unbiased; two rows at least.

    The U-statistic of Gretton et al. 2012 ("A Kernel Two-Sample Test", eq. 3) with the Gaussian kernel `k(x, y) =
    exp(-|x - y|^2 / (2 s^2))`, where the bandwidth `s` is the median distance of all pairs of the pooled set when
    `None`. Its mean is 0 for equal distributions, so there it is often negative.
    """
    a, b = (F.normalize(x, dim=1) for x in _check(a, b, rows=2))
    scale = median_bandwidth(torch.cat([a, b])) if bandwidth is None else bandwidth
    if not scale > 0:
        raise ValueError(f"`bandwidth` must be positive, got {bandwidth}.")

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.exp(_distances(x, y).square() / (-2 * scale**2))

    def within(x: torch.Tensor) -> torch.Tensor:
        count = x.shape[0]
        return (kernel(x, x).sum() - count) / (count * (count - 1))

    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()


def coverage(real: torch.Tensor, fake: torch.Tensor, k: int = 5) -> float:
    """Share of real points that have a fake one in their neighbourhood (Naeem et al. 2020, arXiv 2002.09797).

    That is the closed ball up to the k-th nearest other real point. About `1 - 2^-k` for equal distributions and as
    many fake as real points.
    """
    real, fake = _check(real, fake, rows=1)
    if not 1 <= k < real.shape[0]:
        raise ValueError(
            f"`k` must be from 1 to the number of real rows less one ({real.shape[0] - 1}), got "
            f"{k}. Take more images or fewer neighbours."
        )
    radii = _distances(real, real).fill_diagonal_(torch.inf).kthvalue(k, dim=1).values
    return (_distances(real, fake).min(dim=1).values <= radii).double().mean().item()


def one_nearest_neighbour_accuracy(a: torch.Tensor, b: torch.Tensor) -> float:
    """Leave-one-out accuracy of a nearest neighbour that tells two sets apart (1-NNA), in [0, 1].

    Lopez-Paz and Oquab 2017 (arXiv 1610.06545). About 0.5 for independent samples of one distribution and size, 1 for
    sets that are far apart, and towards 0 where every point has a twin in the other set: images of the same seeds must
    not be compared this way. Among several neighbours at one distance each counts in part.
    """
    a, b = _check(a, b, rows=1)
    points = torch.cat([a, b])
    labels = torch.arange(points.shape[0], device=points.device) < a.shape[0]
    distances = _distances(points, points).fill_diagonal_(torch.inf)
    nearest = distances == distances.min(dim=1, keepdim=True).values
    same = nearest & (labels[:, None] == labels[None])
    return (same.sum(1) / nearest.sum(1)).double().mean().item()


def jensen_shannon(a: torch.Tensor, b: torch.Tensor, bins: int = 20) -> float:
    """Jensen-Shannon divergence of each dimension's histogram, in bits, averaged over dimensions.

    The equal bins of a dimension span the range of both sets; a constant one counts 0. It sees marginals only and is
    biased upwards for few rows, as empty bins are.
    """
    a, b = _check(a, b, rows=1)
    if bins < 2:
        raise ValueError(f"`bins` must be at least 2, got {bins}.")
    both = torch.cat([a, b])
    low = both.amin(0)
    width = (both.amax(0) - low) / bins
    width = torch.where(width > 0, width, torch.ones_like(width))
    p, q = (_histograms(x, low, width, bins) for x in (a, b))
    middle = (p + q) / 2
    divergence = (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2
    return divergence.mean().item()


def distribution_metrics(
    a: torch.Tensor, b: torch.Tensor, *, k: int = 5, bandwidth: float | None = None
) -> dict[str, float]:
    """All figures of this module for a reference set `a` and a set `b`, features `(n, dim)`."""
    return {
        "frechet_distance": frechet_distance(a, b),
        "mmd": mmd(a, b, bandwidth=bandwidth),
        "coverage": coverage(a, b, k),
        "one_nearest_neighbour_accuracy": one_nearest_neighbour_accuracy(a, b),
        "jensen_shannon": jensen_shannon(a, b),
    }


def with_floor(
    base_a: torch.Tensor, base_b: torch.Tensor, tuned: torch.Tensor, *, k: int = 5
) -> dict[str, dict[str, float]]:
    """Every figure of base against tuned, next to that of base against itself: `{metric: {"tuned", "floor"}}`.

    The reference is `base_b`. `tuned` must come from the seeds of `base_a` and never from those of `base_b`: then a
    tuned model that draws what the base model draws scores exactly the floor. The MMD bandwidth comes from the base
    model alone, so both of its figures share one kernel. Sets drawn from the same prompts are more alike than
    independent samples, so the floor of 1-NNA may be below 0.5.
    """
    if not base_a.shape == base_b.shape == tuned.shape:
        raise ValueError(
            f"`base_a`, `base_b` and `tuned` must have one shape, got {tuple(base_a.shape)}, "
            f"{tuple(base_b.shape)} and {tuple(tuned.shape)}: the figures depend on the row count."
        )
    bandwidth = median_bandwidth(torch.cat([base_a, base_b]))
    floor = distribution_metrics(base_b, base_a, k=k, bandwidth=bandwidth)
    found = distribution_metrics(base_b, tuned, k=k, bandwidth=bandwidth)
    return {name: {"tuned": found[name], "floor": floor[name]} for name in floor}


def _finite(features: torch.Tensor, name: str) -> torch.Tensor:
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        found = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features)
        raise ValueError(f"`{name}` must be a tensor (n, dim), got {found}.")
    if not torch.isfinite(features).all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinite values.")
    return features.detach().double()


def _check(a: torch.Tensor, b: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = _finite(a, "a"), _finite(b, "b")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"`a` and `b` must have one width, got {a.shape[1]} and {b.shape[1]}.")
    if min(a.shape[0], b.shape[0]) < rows:
        raise ValueError(f"`a` and `b` must have {rows} rows or more, got {len(a)} and {len(b)}.")
    return a, b


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclidean distances `(n, m)` from differences, so that equal rows are at exactly 0."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _histograms(x: torch.Tensor, low: torch.Tensor, width: torch.Tensor, bins: int) -> torch.Tensor:
    indices = ((x - low) / width).long().clamp_max(bins - 1)
    counts = x.new_zeros(bins, x.shape[1])
    return counts.scatter_add_(0, indices, torch.ones_like(x)) / x.shape[0]


def _relative_entropy(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.where(p > 0, p * torch.log2(p / q), 0.0).sum(0)
