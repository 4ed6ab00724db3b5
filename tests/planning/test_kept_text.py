"""Planned sizes of kept text, beside the files that a training writes."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext.golden_noise import text_cache
from diffusers_ext.golden_noise.text_cache import TextCache
from diffusers_ext.planning.kept_text import kept_text_bytes
from diffusers_ext.planning.models import ImageShapes, read_base_model
from tests.golden_noise.golden_pipelines import FAMILIES

TEXTS = ("a red seven", "a blue six", "a green two", "a white one", "a red four")


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_as_large_as_planned(family, tmp_path, monkeypatch):
    monkeypatch.setattr(text_cache, "_PART_PROMPTS", 4)
    pipeline = FAMILIES[family].plain()
    if family.startswith("flux2"):  # shortened for other tests, which a plan cannot know
        pipeline.tokenizer.model_max_length = 512
    pipeline.save_pretrained(tmp_path / "model")
    shapes = ImageShapes(read_base_model(tmp_path / "model"), FAMILIES[family].pixels)
    cache = TextCache.encode(pipeline, TEXTS, batch_size=2, directory=tmp_path / "text")
    written = sum(path.stat().st_size for path in tmp_path.glob("text/*/*.safetensors"))
    tokens = None if shapes.family.pads_text else cache.facts["tokens"]
    planned = kept_text_bytes(shapes, len(TEXTS), torch.float16, batch_size=2, tokens=tokens)
    assert planned == pytest.approx(written, rel=0.15 if tokens else 0.001)
    assert kept_text_bytes(shapes, len(TEXTS), torch.float16, batch_size=2) >= planned
