from __future__ import annotations

import logging
import types

import pytest
import torch
from transformers import T5EncoderModel, T5TokenizerFast
from transformers.convert_slow_tokenizer import SLOW_TO_FAST_CONVERTERS, BertConverter

try:
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy as BertTokenizer
except ImportError:  # transformers 4
    from transformers import BertTokenizer

from diffusers_ext.eraser.concepts import (
    anchor_distances,
    base_forms,
    centred_cosines,
    check_concept,
    concept_token_mask,
    concrete_words,
    neighbouring_concepts,
    share_a_word,
    word_embeddings,
)
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.families.cogvideox import CogVideoXVelocity
from examples.digits.prompts import COLORS, DIGITS
from examples.moving_digits.check_model import MODEL_DIR
from examples.moving_digits.prompts import DIRECTIONS, NEUTRAL_COLOR, NEUTRAL_DIGIT, PROMPT_LENGTH, make_tokenizer
from tests.tiny_cogvideox import TEXT_WIDTH, tiny_video_pipeline
from tests.tiny_erasers import add_random_eraser

TOKENIZER = make_tokenizer()


def marked(prompt: str, concept: str, length: int = PROMPT_LENGTH) -> list[str]:
    """The tokens that the mask marks."""
    mask = concept_token_mask(TOKENIZER, [prompt], concept, length)[0]
    ids = TOKENIZER(prompt, padding="max_length", max_length=length, truncation=True).input_ids
    return [token for token, on in zip(TOKENIZER.convert_ids_to_tokens(ids), mask) if on]


def test_the_tokens_of_the_concept_are_marked(subtests):
    for prompt, concept, expected in [
        ("seven goes up", "seven", ["▁seven"]),
        ("a red seven goes up", "red seven", ["▁red", "▁seven"]),
        ("a seven a seven", "seven", ["▁seven", "▁seven"]),
        ("seven, up", "seven", ["▁seven"]),
        ("seven-up", "up", ["u", "p"]),  # other tokens than "up" alone
        ("a (cat)", "cat", ["c", "a", "t"]),
        ("sevens", "seven", []),  # begins with the token of "seven"
        ("a red eight", "seven", []),
        ("", "seven", []),
    ]:
        with subtests.test(prompt=prompt, concept=concept, expected=expected):
            assert marked(prompt, concept) == expected


def test_a_capital_letter_makes_other_tokens_of_the_same_word():
    assert marked("Seven goes up", "seven") == ["▁", "<unk>", "e", "v", "e", "n"]


def test_the_rows_of_a_batch_are_the_prompts():
    mask = concept_token_mask(TOKENIZER, ["", "a red seven", "seven up"], "seven", 6)
    assert mask.dtype == torch.bool
    assert mask.nonzero().tolist() == [[1, 2], [2, 0]]
    assert mask.shape == (3, 6)


def test_a_concept_behind_the_last_token(caplog):
    caplog.set_level(logging.WARNING)
    assert marked("a red seven", "seven", length=3) == []
    assert "'seven' lies behind the last token of 'a red seven'" in caplog.text


@pytest.mark.parametrize(
    ("concept", "message"),
    [
        ("日本", r"can spell, got '日本', which it reads as \['▁', '日本'\]"),
        ("Seven", "got 'Seven', .* Write it in the letters and the case"),
        ("", "`concept` must be words that the tokenizer can spell, got ''"),
    ],
)
def test_a_concept_out_of_the_tokenizers_reach(concept, message):
    with pytest.raises(ValueError, match=message):
        check_concept(TOKENIZER, concept)
    with pytest.raises(ValueError, match=message):
        concept_token_mask(TOKENIZER, ["a seven"], concept, PROMPT_LENGTH)


def test_a_tokenizer_without_offsets_and_one_string_for_prompts():
    with pytest.raises(TypeError, match="must give offsets of its tokens, got SimpleNamespace"):
        concept_token_mask(types.SimpleNamespace(is_fast=False), ["a seven"], "seven", 4)
    with pytest.raises(ValueError, match="must be a list of prompts, got the string 'a seven'"):
        concept_token_mask(TOKENIZER, "a seven", "seven", 4)


class SlowBert(BertTokenizer):
    """As transformers 4 loads the tokenizers of CogVideoX and others: without offsets."""


@pytest.fixture
def slow(tmp_path, monkeypatch):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "seven", "goes", "up", "##teen", ","]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    monkeypatch.setitem(SLOW_TO_FAST_CONVERTERS, "SlowBert", BertConverter)
    return SlowBert(str(tmp_path / "vocab.txt"))


def test_a_tokenizer_without_offsets_is_read_by_its_double(slow):
    assert not slow.is_fast
    mask = concept_token_mask(slow, ["a red seven, seventeen", "seven goes up"], "seven", 8)
    assert mask.nonzero().tolist() == [[0, 3], [1, 1]]  # behind [CLS], and no seventeen


def test_a_double_that_reads_otherwise_is_refused(slow, monkeypatch):
    monkeypatch.setattr(SlowBert, "_tokenize", lambda self, text, **options: text.split()[::-1])
    with pytest.raises(TypeError, match="must give offsets of its tokens, got SlowBert"):
        concept_token_mask(slow, ["a red seven"], "seven", 6)


@pytest.fixture(scope="module")
def text() -> tuple:
    """Tokenizer and text encoder; the encoder adds nothing to the token embeddings but their norm."""
    pipeline = tiny_video_pipeline()
    for name, parameter in pipeline.text_encoder.named_parameters():
        if name.endswith(("SelfAttention.o.weight", "DenseReluDense.wo.weight")):
            parameter.data.zero_()
    return pipeline.tokenizer, pipeline.text_encoder


@pytest.fixture
def place(text):
    """Puts words into planted directions of the embedding space; undone afterwards."""
    tokenizer, encoder = text
    weight = encoder.shared.weight.data
    before = weight.clone()

    def put(directions: dict[str, list[float]]) -> None:
        weight.zero_()
        for word, direction in directions.items():
            (row,) = tokenizer(word, add_special_tokens=False).input_ids
            weight[row, : len(direction)] = torch.tensor(direction)

    yield put
    weight.copy_(before)


def test_the_bundled_words():
    words = concrete_words()
    assert len(words) > 2000
    assert len(set(words)) == len(words)
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)
    assert {"cat", "car", "guitar", "seven", "red"} <= set(words)
    animals = concrete_words("animals")
    assert "cat" in animals
    assert "car" not in animals
    with pytest.raises(ValueError, match=r"`topic` must be one of \['animal_parts', .* got 'x'"):
        concrete_words("x")


def test_forms_of_one_word(subtests):
    for first, second in [
        ("cat", "Cats"),
        ("black cats", "cat"),
        ("a cat's paw", "cats"),
        ("box", "boxes"),
        ("berries", "berry"),
        ("wolf", "wolves"),
        ("knives", "knife"),
        ("firemen", "fireman"),
        ("person", "people"),
        ("running", "run"),
        ("dance", "dancing"),
        ("painted", "paint"),
        ("glasses", "glass"),
        ("bus", "buses"),
    ]:
        with subtests.test(first=first, second=second):
            assert share_a_word(first, second)
            assert share_a_word(second, first)


def test_words_that_only_look_alike(subtests):
    for first, second in [
        ("car", "scarf"),
        ("car", "carpet"),
        ("car", "cartoon style"),
        ("face", "surface texture"),
        ("king", "k"),
        ("ring", "r"),
        ("dress", "dre"),
        ("bird of prey", "statue of liberty"),
        ("the cat", "the dog"),
    ]:
        with subtests.test(first=first, second=second):
            assert not share_a_word(first, second)
            assert not share_a_word(second, first)


def test_every_word_is_a_form_of_itself():
    assert all(word in base_forms(word) for word in concrete_words())


def test_cosines_without_the_common_part():
    common = torch.tensor([100.0, 0.0, 0.0])
    embeddings = common + torch.tensor([[0.0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    found = centred_cosines(embeddings, common + torch.tensor([0.0, 2.0, 2.0]))
    half = 0.5**0.5
    torch.testing.assert_close(found, torch.tensor([half, -half, half, -half]))


def neighbours(text, concept: str, count: int, words=None, **options) -> list[str]:
    options = {"max_sequence_length": PROMPT_LENGTH, **options}
    return [word for word, _ in neighbouring_concepts(*text, concept, count, words, **options)]


def test_an_embedding_is_what_the_pipeline_reads_at_the_words_tokens():
    pipeline = tiny_video_pipeline()
    parts = (pipeline.tokenizer, pipeline.text_encoder)
    words = ["seven", "cat", "red seven"]
    prompts, _ = pipeline.encode_prompt(words, do_classifier_free_guidance=False, max_sequence_length=PROMPT_LENGTH)
    expected = [prompts[row, :length].mean(dim=0) for row, length in enumerate((1, 4, 2))]
    found = word_embeddings(*parts, words, PROMPT_LENGTH, batch_size=2)
    torch.testing.assert_close(found, torch.stack(expected))
    assert not found.requires_grad
    # the padding is read
    assert not torch.allclose(found, word_embeddings(*parts, words, 6), atol=1e-4)


def test_the_modes_of_the_encoder_come_back(text):
    encoder = text[1]
    block = encoder.encoder.block[0].train()
    try:
        word_embeddings(*text, ["seven"], PROMPT_LENGTH)
        assert block.training
        assert not encoder.training
    finally:
        block.eval()


def test_the_nearest_come_first_from_the_bundled_words(text, place):
    space = {digit: [1.0, 0.02 * index] for index, digit in enumerate(DIGITS)}
    space |= {color: [-1.0, 0.3 * index] for index, color in enumerate(COLORS)}
    place({**space, "right": [-1.0, 1.0]})
    found = neighbouring_concepts(*text, "seven", 4, max_sequence_length=PROMPT_LENGTH)
    assert [word for word, _ in found] == ["eight", "six", "nine", "five"]
    cosines = [cosine for _, cosine in found]
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[-1] > 0.8


def test_the_count_cuts_the_farthest_and_not_the_end_of_the_alphabet(text, place):
    place({"zero": [1.0, 0.0], "seven": [1.0, 0.1], "blue": [-1.0, 0.0], "eight": [-1.0, 0.2]})
    words = ["blue", "eight", "zero"]
    assert neighbours(text, "seven", 1, words) == ["zero"]


def test_own_forms_and_named_synonyms_are_left_out(text):
    words = ["Seven", "sevens", "lucky seven", "number", "six", "six", "日本", "red", "eight"]
    found = neighbours(text, "seven", 3, words, exclude=["numbers"])
    assert set(found) == {"six", "red", "eight"}


def test_default_candidates_are_words_that_the_tokenizer_holds(text):
    vocabulary = set(text[0].get_vocab())
    assert all("▁" + word in vocabulary for word in neighbours(text, "seven", 15))
    assert neighbours(text, "seven", 1, ["cat"]) == ["cat"]


def test_the_bundled_model_has_neighbours_among_its_own_words():
    # Which ones says little: this encoder learned to tell digits apart, not to group them.
    tokenizer = T5TokenizerFast.from_pretrained(MODEL_DIR, subfolder="tokenizer")
    encoder = T5EncoderModel.from_pretrained(MODEL_DIR, subfolder="text_encoder", dtype=torch.float32)
    found = neighbours((tokenizer, encoder), "seven", 12)
    known = {*DIGITS, *COLORS, *DIRECTIONS, NEUTRAL_DIGIT, NEUTRAL_COLOR, "number", "moving"}
    assert len(set(found)) == 12
    assert "seven" not in found
    assert len(known & set(found)) >= 10


def test_embeddings_that_are_not_finite(text, place):
    place({"two": [float("inf")]})
    with pytest.raises(ValueError, match="must give finite embeddings, got others in torch.float32"):
        neighbours(text, "seven", 1, ["one", "two"])


@pytest.mark.parametrize(
    ("concept", "count", "message"),
    [
        ("seven", 3, "from 1 to the number of candidates, 2, got 3. Ask for fewer"),
        ("seven", 0, "number of candidates, 2, got 0"),
        ("日本", 1, "can spell, got '日本'"),
    ],
)
def test_bad_input(text, concept, count, message):
    with pytest.raises(ValueError, match=message):
        neighbours(text, concept, count, ["one", "two", "sevens"])


SHAPE = (3, 4, 4, 4)


def embeds(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, 12, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def distances(pipeline, target, candidates, **settings):
    return anchor_distances(
        CogVideoXVelocity.from_pipeline(pipeline, 9, 16, 16),
        pipeline.scheduler,
        target,
        candidates,
        torch.zeros(12, TEXT_WIDTH),
        EraserTraining(num_inference_steps=3, sampling_guidance_scale=2.0, **settings),
        SHAPE,
    )


def test_the_nearer_candidate_is_nearer_and_the_concept_itself_at_zero():
    target, away = embeds(2, seed=0), embeds(2, seed=1)
    candidates = torch.stack([target, target + 0.05 * away, target + away])
    found = distances(tiny_video_pipeline(), target, candidates)
    assert found[0] < 1e-10 < found[1] < found[2]


def test_erasers_play_no_part_and_come_back():
    target, candidates = embeds(2, seed=0), embeds(3, 2, seed=1)
    plain, erased = tiny_video_pipeline(), tiny_video_pipeline()
    add_random_eraser(erased.transformer, "seven", 3)
    erased.transformer.train()
    before = {name: value.clone() for name, value in erased.transformer.state_dict().items()}
    assert torch.equal(distances(erased, target, candidates), distances(plain, target, candidates))
    assert all(torch.equal(before[n], v) for n, v in erased.transformer.state_dict().items())
    assert erased.transformer.training


def test_the_seed_decides_the_runs():
    target, candidates = embeds(1, seed=0), embeds(2, 1, seed=1)
    pipeline = tiny_video_pipeline()
    first, again, other = (distances(pipeline, target, candidates, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("shape", [(0, 2), (3, 1)])
def test_candidates_that_do_not_correspond(shape):
    with pytest.raises(ValueError, match=r"`candidate_embeds` must be \(candidates, 2, 12, 16\)"):
        distances(tiny_video_pipeline(), embeds(2, seed=0), embeds(*shape, seed=1))
