from __future__ import annotations

import logging

import pytest
import torch

from diffusers_ext.golden_noise import text_cache
from diffusers_ext.golden_noise.text_cache import TextCache
from tests.tiny_current_pipelines import tiny_z_image_pipeline
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


PROMPTS = ("a red seven", "a blue two", "a green one", "the number nine in white", "three")
EVERY = torch.tensor([4, 0, 3, 1, 2, 0])


def assert_same_text(cache: TextCache, expected: TextCache) -> None:
    assert (cache.rows, cache.facts) == (expected.rows, expected.facts)
    found, wanted = (kept.take(EVERY, "cpu").tensors() for kept in (cache, expected))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture
def small_files(monkeypatch):
    """Two prompts a file."""
    monkeypatch.setattr(text_cache, "_PART_PROMPTS", 2)


@pytest.mark.parametrize("build", [lambda: sdxl_pipeline(0), tiny_z_image_pipeline], ids=["padded", "z_image"])
def test_files_hold_what_memory_holds(build, small_files, tmp_path):
    pipeline = build()
    in_memory = TextCache.encode(pipeline, PROMPTS, batch_size=2)
    cache = TextCache.encode(pipeline, PROMPTS, batch_size=2, directory=tmp_path)
    assert len(list(tmp_path.glob("text-*/*.safetensors"))) == 3
    assert_same_text(cache, in_memory)


def test_processes_encode_a_share_each_and_read_all(small_files, tmp_path, monkeypatch):
    pipeline, seen = random_digits_pipeline(), []
    encode = text_cache.encode_prompts
    monkeypatch.setattr(text_cache, "encode_prompts", lambda pipe, batch: (seen.append(batch), encode(pipe, batch))[1])
    expected = TextCache.encode(pipeline, PROMPTS, batch_size=1)
    seen.clear()

    def other() -> None:
        TextCache.encode(pipeline, PROMPTS, batch_size=1, directory=tmp_path, process=(0, 2))

    with pytest.raises(ValueError, match="must be a folder that all processes share, got .* without 00001.safet"):
        other()  # the second one has made nothing
    assert [batch[0] for batch in seen] == ["a red seven", "a blue two", "three"]
    seen.clear()
    options = {"batch_size": 1, "directory": tmp_path, "process": (1, 2)}
    cache = TextCache.encode(pipeline, PROMPTS, **options, wait_for_everyone=other)
    assert [batch[0] for batch in seen] == ["a green one", "the number nine in white"]
    assert_same_text(cache, expected)


def test_what_a_killed_run_has_encoded_is_not_encoded_again(small_files, tmp_path, monkeypatch, caplog):
    pipeline, seen = random_digits_pipeline(), []
    options = {"batch_size": 2, "directory": tmp_path}
    encode = text_cache.encode_prompts

    def killed(pipe, batch):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(batch)
        return encode(pipe, batch)

    monkeypatch.setattr(text_cache, "encode_prompts", killed)
    with pytest.raises(KeyboardInterrupt):
        TextCache.encode(pipeline, PROMPTS, **options)
    monkeypatch.setattr(text_cache, "encode_prompts", lambda pipe, batch: (seen.append(batch), encode(pipe, batch))[1])
    caplog.set_level(logging.INFO)
    cache = TextCache.encode(pipeline, PROMPTS, **options)
    assert seen[2:] == [list(PROMPTS[4:])]
    assert "Embeddings in 2 of 3 files" in caplog.text
    assert_same_text(cache, TextCache.encode(pipeline, PROMPTS, batch_size=2))
    # Others have a folder of their own.
    for changed in ({"batch_size": 3}, {"dtype": torch.float32}, {}):
        TextCache.encode(pipeline if changed else random_digits_pipeline(1), PROMPTS, **{**options, **changed})
    TextCache.encode(pipeline, PROMPTS[1:], **options)
    assert len(list(tmp_path.iterdir())) == 5


def test_broken_files_are_named(small_files, tmp_path):
    pipeline = random_digits_pipeline()
    TextCache.encode(pipeline, PROMPTS, batch_size=2, directory=tmp_path)
    first, second, third = sorted(tmp_path.glob("*/*.safetensors"))
    whole = first.read_bytes()
    for content, message in ((whole[:90], "must be"), (third.read_bytes(), "must hold 2 prompts in torch.float16")):
        first.write_bytes(content)
        with pytest.raises(ValueError, match=f"00000.safetensors {message}.* Remove it, and the run makes it again"):
            TextCache.encode(pipeline, PROMPTS, batch_size=2, directory=tmp_path)
    first.unlink()
    TextCache.encode(pipeline, PROMPTS, batch_size=2, directory=tmp_path)
    assert first.read_bytes() == whole


def test_processes_need_a_folder():
    with pytest.raises(ValueError, match="`directory` must be given where processes share the prompts, got None"):
        TextCache.encode(random_digits_pipeline(), PROMPTS, process=(0, 2))
