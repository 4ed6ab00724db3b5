"""The bundled digits model: its prompts, its pictures, its judge, its weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline

from examples.digits.check_model import MODEL_DIR, draw, load_pipeline
from examples.digits.judge import DigitsJudge
from examples.digits.pictures import GLYPHS, draw_glyphs, read_ink, real_digits, tint
from examples.digits.prompts import (
    COLORS,
    DIGITS,
    HELD_OUT_PAIRS,
    HELD_OUT_TEMPLATE,
    RARE_TOKENS,
    TEMPLATES,
    TRAINING_PAIRS,
    make_tokenizer,
    prompt_pairs,
    read_prompt,
)
from examples.digits.subjects import held_out_prompts, knowledge_prompts, write_subject
from examples.digits.train_model import TintedDigits, write_prompts


@pytest.fixture(scope="module")
def judge():
    return DigitsJudge(glyphs=True)


def test_every_word_is_one_token_and_other_words_are_spelled():
    tokenizer = make_tokenizer()
    for word in (*DIGITS, *COLORS, *RARE_TOKENS):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
    assert len(tokenizer("quartz", add_special_tokens=False).input_ids) == 6
    assert tokenizer.decode(tokenizer("a red three").input_ids[1:-1]).strip() == "a red three"


def test_bundled_tokenizer_is_the_one_the_code_makes():
    bundled = StableDiffusionPipeline.from_pretrained(MODEL_DIR).tokenizer
    assert bundled.get_vocab() == make_tokenizer().get_vocab()


def test_held_out_pairs_and_template_are_never_trained_on():
    assert len(set(HELD_OUT_PAIRS)) == 10
    assert not set(HELD_OUT_PAIRS) & set(TRAINING_PAIRS)
    assert len(TRAINING_PAIRS) == 40
    assert HELD_OUT_TEMPLATE not in TEMPLATES
    digits = TintedDigits()
    seen = {(list(COLORS)[c], DIGITS[digits.labels[i]]) for i, c in digits.entries}
    assert seen == set(TRAINING_PAIRS)
    assert not set(held_out_prompts()) & set(knowledge_prompts())


def test_training_prompts_name_what_the_picture_shows():
    import torch

    digits = TintedDigits()
    entries = torch.tensor(digits.entries[:300])
    prompts = write_prompts(entries, digits, torch.Generator().manual_seed(0))
    for (ink, color), prompt in zip(entries.tolist(), prompts):
        read = read_prompt(prompt)
        assert read[1] in (None, DIGITS[digits.labels[ink]])
        assert read[0] in (None, list(COLORS)[color])
        assert not set(prompt.split()) & set(RARE_TOKENS)
    assert 10 < prompts.count("") < 60


def test_ink_survives_tinting_and_reading():
    ink, _ = real_digits()
    seen = read_ink(np.stack([tint(one, "white") for one in ink[:100]]))
    assert np.abs(seen - ink[:100]).mean() < 0.06


def test_judge_reads_real_digits_glyphs_and_colours(judge):
    ink, labels = real_digits()
    colors = [list(COLORS)[i % len(COLORS)] for i in range(200)]
    reading = judge.read(np.stack([tint(one, c) for one, c in zip(ink, colors)]))
    assert reading.colors == colors
    right = [DIGITS[label] == name for label, name in zip(labels, reading.names)]
    assert np.mean(right) > 0.98
    for glyph in GLYPHS:
        drawn = np.stack([tint(one, "white") for one in draw_glyphs(glyph, 50, seed=99)])
        assert np.mean([name == glyph for name in judge.read(drawn).names]) == 1.0


def test_judge_refuses_other_sizes(judge):
    with pytest.raises(ValueError, match="`pictures` must be 32x32 RGB of 8 bits, got"):
        judge.read(np.zeros((1, 16, 16, 3), np.uint8))


def test_unknown_glyph_is_an_error():
    with pytest.raises(ValueError, match="`name` must be one of .* got 'star'"):
        draw_glyphs("star", 1, 0)


def test_subject_pictures_depend_on_the_seed_alone(tmp_path):
    first = write_subject(tmp_path / "a", "cross", seed=3)
    again = write_subject(tmp_path / "b", "cross", seed=3)
    other = write_subject(tmp_path / "c", "cross", seed=4)
    read = lambda folder: [path.read_bytes() for path in sorted(Path(folder).iterdir())]
    assert read(first) == read(again) != read(other)
    assert len(read(first)) == 6


def test_bundled_model_is_small_and_its_log_is_kept():
    files = [path for path in MODEL_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    log = json.loads((MODEL_DIR.parent / "train_log.json").read_text())
    assert log["seconds"]["all"] <= 30 * 60
    assert log["denoiser"][-1]["step"] == 3500


def test_bundled_model_draws_what_it_is_asked_for():
    prompts = prompt_pairs(TEMPLATES[1], (*TRAINING_PAIRS, *HELD_OUT_PAIRS))
    images = draw(load_pipeline(), prompts, seed=123)
    assert DigitsJudge().correct(images, prompts).mean() >= 0.96


def test_pictures_do_not_depend_on_the_batch():
    prompts = prompt_pairs(TEMPLATES[0], TRAINING_PAIRS[:4])
    pipeline = load_pipeline()
    together = draw(pipeline, prompts, seed=5, num_inference_steps=3)
    alone = draw(pipeline, prompts, seed=5, num_inference_steps=3, batch_size=1)
    for a, b in zip(together, alone):
        assert np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 1
