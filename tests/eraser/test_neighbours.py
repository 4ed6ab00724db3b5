from __future__ import annotations

import pytest
import torch
from transformers import T5EncoderModel, T5Tokenizer

from diffusers_ext.eraser.concepts import (
    base_forms,
    centred_cosines,
    concrete_words,
    neighbouring_concepts,
    share_a_word,
    word_embeddings,
)
from examples.digits.prompts import COLORS, DIGITS
from examples.moving_digits.check_model import MODEL_DIR
from examples.moving_digits.prompts import DIRECTIONS, NEUTRAL_COLOR, NEUTRAL_DIGIT, PROMPT_LENGTH
from tests.tiny_cogvideox import tiny_video_pipeline


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
    tokenizer = T5Tokenizer.from_pretrained(MODEL_DIR, subfolder="tokenizer")
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
