from __future__ import annotations

import pytest
import torch

from diffusers_ext.eraser.neighbours import (
    base_forms,
    centred_cosines,
    concrete_words,
    neighbouring_concepts,
    share_a_word,
    word_embeddings,
)
from examples.digits.prompts import COLORS, DIGITS
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


@pytest.mark.parametrize(
    ("first", "second"),
    [
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
    ],
)
def test_forms_of_one_word(first, second):
    assert share_a_word(first, second)
    assert share_a_word(second, first)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("car", "scarf"),
        ("car", "carpet"),
        ("car", "cartoon style"),
        ("face", "surface texture"),
        ("king", "k"),
        ("ring", "r"),
        ("dress", "dre"),
        ("bird of prey", "statue of liberty"),
        ("the cat", "the dog"),
    ],
)
def test_words_that_only_look_alike(first, second):
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


def test_embeddings_do_not_depend_on_the_batch(text):
    words = ["seven", "cat", "red seven", "a"]
    together = word_embeddings(*text, words)
    alone = torch.cat([word_embeddings(*text, [word]) for word in words])
    torch.testing.assert_close(together, alone)
    assert together.dtype == torch.float32
    # "red seven" is the mean of its two tokens, and of nothing else
    red = word_embeddings(*text, ["red"])[0]
    torch.testing.assert_close(together[2], (together[0] + red) / 2, rtol=1e-4, atol=1e-5)


def test_the_nearest_come_first_from_the_bundled_words(text, place):
    space = {digit: [1.0, 0.02 * index] for index, digit in enumerate(DIGITS)}
    space |= {color: [-1.0, 0.3 * index] for index, color in enumerate(COLORS)}
    place({**space, "right": [-1.0, 1.0]})
    found = neighbouring_concepts(*text, "seven", 4)
    assert [word for word, _ in found] == ["eight", "six", "nine", "five"]
    cosines = [cosine for _, cosine in found]
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[-1] > 0.8


def test_the_count_cuts_the_farthest_and_not_the_end_of_the_alphabet(text, place):
    place({"zero": [1.0, 0.0], "seven": [1.0, 0.1], "blue": [-1.0, 0.0], "eight": [-1.0, 0.2]})
    words = ["blue", "eight", "zero"]
    (nearest,) = neighbouring_concepts(*text, "seven", 1, words)
    assert nearest.word == "zero"


def test_own_forms_and_named_synonyms_are_left_out(text):
    words = ["Seven", "sevens", "lucky seven", "number", "six", "six", "日本", "red", "eight"]
    found = neighbouring_concepts(*text, "seven", 3, words, exclude=["numbers"])
    assert {word for word, _ in found} == {"six", "red", "eight"}


def test_default_candidates_are_words_that_the_tokenizer_holds(text):
    vocabulary = set(text[0].get_vocab())
    found = [word for word, _ in neighbouring_concepts(*text, "seven", 15)]
    assert all("▁" + word in vocabulary for word in found)
    assert "cat" in [word for word, _ in neighbouring_concepts(*text, "seven", 1, ["cat"])]


def test_embeddings_that_are_not_finite(text, place):
    place({"two": [float("inf")]})
    with pytest.raises(
        ValueError, match="must give finite embeddings, got others in torch.float32"
    ):
        neighbouring_concepts(*text, "seven", 1, ["one", "two"])


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
        neighbouring_concepts(*text, concept, count, ["one", "two", "sevens"])
