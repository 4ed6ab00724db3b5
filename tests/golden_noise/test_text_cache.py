from __future__ import annotations

import pytest
import torch

from diffusers_ext.golden_noise.text_cache import TextCache
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_pipelines import sdxl_pipeline


def test_each_prompt_is_encoded_once(monkeypatch):
    pipeline, seen = random_digits_pipeline(), []
    encode = pipeline.encode_prompt
    monkeypatch.setattr(
        pipeline, "encode_prompt", lambda prompt, **run: (seen.extend(prompt), encode(prompt, **run))[1]
    )  # fmt: skip
    cache = TextCache.encode(pipeline, ["a red seven", "a blue two", "a red seven"], batch_size=1)
    assert seen == ["a red seven", "a blue two"]
    assert cache.rows == {"a red seven": 0, "a blue two": 1}
    assert cache.text.prompt_embeds.dtype == torch.float16
    taken = cache.take(torch.tensor([1, 0, 1]), torch.device("cpu"))
    assert taken.prompt_embeds.dtype == torch.float32
    assert torch.equal(taken.prompt_embeds[0], taken.prompt_embeds[2])
    assert not torch.equal(taken.prompt_embeds[0], taken.prompt_embeds[1])
    assert (taken.attention_mask, taken.pooled_prompt_embeds) == (None, None)


def test_pooled_embeddings_are_kept_and_facts_tell_encoders_apart():
    first, second = (TextCache.encode(sdxl_pipeline(seed), ["a red seven"], dtype=torch.float32) for seed in (0, 1))
    assert first.text.pooled_prompt_embeds.shape == (1, 16)
    assert (first.facts["tokens"], first.facts["text_embed_dim"]) == (16, 80)
    assert first.facts != second.facts


def test_embeddings_must_fit_the_dtype():
    pipeline = random_digits_pipeline()
    with torch.no_grad():
        list(pipeline.text_encoder.parameters())[-1].fill_(1e6)
    TextCache.encode(pipeline, ["a red seven"], dtype=torch.float32)
    with pytest.raises(ValueError, match="must be finite in torch.float16, got .*cache_dtype fp32"):
        TextCache.encode(pipeline, ["a red seven"])


def test_files_hold_what_memory_holds_and_go_with_the_cache(tmp_path):
    prompts = ["a red seven", "a blue two", "a green one"]
    in_memory = TextCache.encode(sdxl_pipeline(0), prompts, batch_size=2)
    cache = TextCache.encode(sdxl_pipeline(0), prompts, batch_size=2, directory=tmp_path)
    assert len(list(tmp_path.glob("text-*/*"))) == 2
    rows = torch.tensor([2, 0])
    stored, expected = (kept.take(rows, "cpu").tensors() for kept in (cache, in_memory))
    assert stored.keys() == expected.keys() == {"prompt_embeds", "pooled_prompt_embeds"}
    assert all(torch.equal(stored[name], expected[name]) for name in stored)
    cache._scratch.cleanup()
    assert not list(tmp_path.iterdir())
