"""Statistics that more than one test module reads: of few prompts, which leave a true null space."""

from __future__ import annotations

import pytest
from diffusers import StableDiffusionPipeline

from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.statistics import FeatureStatistics
from tests.tiny_digits import random_digits_pipeline

FEW_PROMPTS = ["a red seven", "a blue one"]


@pytest.fixture(scope="package")
def few_statistics() -> FeatureStatistics:
    """Of three prompts of 16 tokens in 128 dimensions, for K and V of `random_digits_pipeline`."""
    return collect_statistics(random_digits_pipeline(), FEW_PROMPTS, expand_sub_phrases=False)


@pytest.fixture
def digits() -> StableDiffusionPipeline:
    """The pipeline that `few_statistics` are of."""
    return random_digits_pipeline()
