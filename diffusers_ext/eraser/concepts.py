"""Find a concept's words in prompts and among their tokens; put other words, or the best one, in their place."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SLOW_TO_FAST_CONVERTERS, convert_slow_tokenizer

from diffusers_ext.core.concept_words import concept_spans
from diffusers_ext.core.restored_state import module_eval_mode
from diffusers_ext.core.seeds import stream_generator
from diffusers_ext.eraser.adapter.outputs import frozen_teacher
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.eraser.teacher.trajectory import teacher_trajectory
from diffusers_ext.families.family import Velocity

logger = logging.getLogger(__name__)

_NO_OFFSETS = (
    "`tokenizer` must give offsets of its tokens, got {}, which does not. Load the one that is backed by the "
    "tokenizers library."
)
_WORDS = Path(__file__).parent / "words"
_FUNCTION_WORDS = {"a", "an", "and", "at", "by", "for", "in", "of", "on", "or", "the", "to", "with"}
# ending -> what an English base form has in its place
_ENDINGS = {
    "s": ("",),
    "es": ("",),
    "ies": ("y",),
    "ves": ("f", "fe"),
    "men": ("man",),
    "ing": ("", "e"),
    "ed": ("", "e"),
}
_IRREGULAR = {
    "men": "man",
    "children": "child",
    "people": "person",
    "feet": "foot",
    "teeth": "tooth",
    "geese": "goose",
    "mice": "mouse",
    "lice": "louse",
    "oxen": "ox",
    "dice": "die",
    "cacti": "cactus",
    "fungi": "fungus",
}


class Neighbour(NamedTuple):
    """A word near a concept."""

    word: str
    cosine: float  # of the centred embeddings, in [-1, 1]


def concrete_words(topic: str | None = None) -> list[str]:
    """The bundled English words for things that can be seen; of all files of `words`, or of one `topic`."""
    files = {path.stem: path for path in sorted(_WORDS.glob("*.txt"))}
    if topic is not None and topic not in files:
        raise ValueError(f"`topic` must be one of {list(files)}, got {topic!r}.")
    chosen = files.values() if topic is None else [files[topic]]
    words = [word for path in chosen for word in path.read_text(encoding="utf-8").split("\n")]
    return list(dict.fromkeys(word for word in words if word))


def base_forms(word: str) -> set[str]:
    """What an English word may be an inflected form of, itself among them."""
    word = re.sub(r"['’]s?$", "", word.lower())
    forms = {word, _IRREGULAR.get(word, word)}
    for ending, replacements in _ENDINGS.items():
        stem = word.removesuffix(ending)
        if stem == word or len(stem) < 2 or not re.search("[aeiouy]", stem):
            continue
        forms |= {stem + replacement for replacement in replacements}
        if ending in ("ing", "ed") and stem[-1] == stem[-2]:
            forms.add(stem[:-1])
    return forms


def share_a_word(first: str, second: str) -> bool:
    """Whether two names have a word in common, inflected or not ("cats", "black cat"); articles do not count."""
    names = [set(re.findall(r"[\w'’-]+", text.lower())) - _FUNCTION_WORDS for text in (first, second)]
    forms = [set().union(*map(base_forms, words)) for words in names]
    return not forms[0].isdisjoint(forms[1])


def centred_cosines(embeddings: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Cosines `(words,)` of embeddings `(words, dim)` to a query `(dim,)`, both centred.

    Encoders put all words into a narrow cone; without the mean of all embeddings the angles tell words apart (Mu and
    Viswanath, "All-but-the-Top", ICLR 2018, first step).
    """
    mean = embeddings.mean(dim=0)
    return F.cosine_similarity(embeddings - mean, (query - mean)[None], dim=1)


@torch.no_grad()
def word_embeddings(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    words: Sequence[str],
    max_sequence_length: int,
    *,
    batch_size: int = 64,
    masks_padding: bool = False,
) -> torch.Tensor:
    """What the video model reads at the tokens of each word, averaged over them: `(words, dim)` float32 on the CPU.

    A word is a prompt by itself, padded as the pipeline pads prompts. That of CogVideoX does not mask padding: a model
    that was trained this way reads something else with a mask. Neither padding nor the end of a sequence is averaged.
    """
    embeddings = []
    with module_eval_mode(text_encoder):
        for start in tqdm(range(0, len(words), batch_size), desc="encode words"):
            tokens = tokenizer(
                list(words[start : start + batch_size]),
                padding="max_length",
                max_length=max_sequence_length,
                truncation=True,
                return_special_tokens_mask=True,
                return_tensors="pt",
            ).to(text_encoder.device)
            mask = (tokens.attention_mask,) if masks_padding else ()
            hidden = text_encoder(tokens.input_ids, *mask)[0].float()
            own = (1 - tokens.special_tokens_mask).float()[..., None]
            embeddings.append(((hidden * own).sum(dim=1) / own.sum(dim=1)).cpu())
    joined = torch.cat(embeddings)
    if not joined.isfinite().all():
        raise ValueError(
            f"`text_encoder` must give finite embeddings, got others in {text_encoder.dtype}. Load it "
            "in bfloat16 or float32."
        )
    return joined


def _is_spelled_out(tokenizer: PreTrainedTokenizerBase, word: str) -> bool:
    """Whether one of a word's pieces is a single letter."""
    return any(len(piece.strip("▁")) == 1 for piece in tokenizer.tokenize(word))


def neighbouring_concepts(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    concept: str,
    count: int = 15,
    words: Sequence[str] | None = None,
    *,
    max_sequence_length: int,
    exclude: Sequence[str] = (),
    masks_padding: bool = False,
) -> list[Neighbour]:
    """The words that the text encoder places nearest to a concept, the nearest first.

    None shares a word, inflected or not, with the concept or with `exclude`, its further names. Candidates are
    `words`, by default those of `concrete_words()` of which the tokenizer need not spell a part in single letters: it
    hardly ever met the others. `max_sequence_length` is that of the pipeline's prompts, and `masks_padding` whether it
    hides their padding from the text encoder (CogVideoX does not, Wan does).
    """
    check_concept(tokenizer, concept)
    given = concrete_words() if words is None else list(dict.fromkeys(words))
    names = [concept, *exclude]
    candidates = [
        word for word in given if in_reach(tokenizer, word) and not any(share_a_word(word, name) for name in names)
    ]
    if words is None:
        candidates = [word for word in candidates if not _is_spelled_out(tokenizer, word)]
    if not 1 <= count <= len(candidates):
        raise ValueError(
            f"`count` must be from 1 to the number of candidates, {len(candidates)}, got {count}. "
            "Ask for fewer, or pass more `words` that the tokenizer knows."
        )
    logger.info(f"Comparing {concept!r} with {len(candidates)} of {len(given)} words.")
    words = [concept, *candidates]
    embeddings = word_embeddings(tokenizer, text_encoder, words, max_sequence_length, masks_padding=masks_padding)
    cosines = centred_cosines(embeddings[1:], embeddings[0])
    nearest = cosines.argsort(descending=True, stable=True)[:count].tolist()
    return [Neighbour(candidates[index], cosines[index].item()) for index in nearest]


def check_concept(tokenizer: PreTrainedTokenizerBase, concept: str) -> None:
    """Raise `ValueError` for a concept that the tokenizer cannot spell."""
    if not in_reach(tokenizer, concept):
        read = tokenizer.tokenize(concept)
        raise ValueError(
            f"`concept` must be words that the tokenizer can spell, got {concept!r}, which it reads "
            f"as {read}. Write it in the letters and the case of the model's prompts."
        )


def in_reach(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a tokenizer spells a text with at least one token and without the unknown one."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return bool(ids) and (tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids)


def _with_offsets(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or one of the tokenizers library made of it: transformers 4 loads T5's without offsets."""
    if tokenizer.is_fast:
        return tokenizer
    if type(tokenizer).__name__ not in SLOW_TO_FAST_CONVERTERS:
        raise TypeError(_NO_OFFSETS.format(type(tokenizer).__name__))
    sides = {"padding_side": tokenizer.padding_side, "truncation_side": tokenizer.truncation_side}
    made = convert_slow_tokenizer(tokenizer)
    return PreTrainedTokenizerFast(tokenizer_object=made, **tokenizer.special_tokens_map, **sides)


def concept_token_mask(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], concept: str, max_sequence_length: int
) -> torch.Tensor:
    """Which tokens of each prompt spell the concept, `(batch, max_sequence_length)` bool.

    The words are looked up in the text and followed to their tokens, since the same word is other tokens with a
    capital letter or behind a bracket, and a word's tokens may begin a longer word. Every occurrence counts; a row
    without `True` does not name the concept. Neither padding nor the end-of-sequence token is ever marked.
    """
    if isinstance(prompts, str):
        raise ValueError(f"`prompts` must be a list of prompts, got the string {prompts!r}.")
    finder = _with_offsets(tokenizer)
    check_concept(tokenizer, concept)
    read = {"padding": "max_length", "max_length": max_sequence_length, "truncation": True}
    found = finder(list(prompts), **read, return_offsets_mapping=True)
    if finder is not tokenizer and found.input_ids != tokenizer(list(prompts), **read).input_ids:
        raise TypeError(_NO_OFFSETS.format(type(tokenizer).__name__))
    offsets = found.offset_mapping
    mask = torch.zeros(len(prompts), max_sequence_length, dtype=torch.bool)
    for row, (prompt, tokens) in enumerate(zip(prompts, offsets, strict=True)):
        spans = concept_spans(prompt, concept)
        for column, (first, last) in enumerate(tokens):
            mask[row, column] = any(first < end and last > start for start, end in spans)
        if spans and not mask[row].any():
            logger.warning(f"{concept!r} lies behind the last token of {prompt!r}.")
    return mask


@torch.no_grad()
def anchor_distances(
    velocity: Velocity,
    scheduler: SchedulerMixin,
    target_embeds: torch.Tensor,
    candidate_embeds: torch.Tensor,
    empty_embed: torch.Tensor,
    recipe: EraserTraining,
    latent_shape: Sequence[int],
) -> torch.Tensor:
    """How far each candidate's velocities lie from the concept's, along runs towards the concept.

    `mean over runs and steps of ||v(x_t, candidate) - v(x_t, concept)||^2 / ||v(x_t, concept)||^2`. A neutral word is
    no safe anchor: what the model draws for it may be the very concept that is erased, and guidance cannot sharpen a
    word that fits everything. Of target prompts `(prompts, text, dim)`, one run each, the same with each candidate in
    the place of the concept, `(candidates, prompts, text, dim)`, and the empty prompt `(text, dim)` of the guidance.
    Returns `(candidates,)` float32 on the CPU.
    """
    if not len(candidate_embeds) or candidate_embeds.shape[1:] != target_embeds.shape:
        raise ValueError(
            f"`candidate_embeds` must be (candidates, {', '.join(map(str, target_embeds.shape))}) with "
            f"at least one candidate, got {tuple(candidate_embeds.shape)}."
        )
    generators = [stream_generator(recipe.seed, "anchor", index) for index in range(len(target_embeds))]
    noises = [torch.randn(*latent_shape, generator=generator) for generator in generators]
    points = teacher_trajectory(
        velocity,
        scheduler,
        torch.stack(noises).to(target_embeds.device, velocity.latents_dtype or target_embeds.dtype),
        target_embeds,
        empty_embed.expand_as(target_embeds),
        num_inference_steps=recipe.num_inference_steps,
        guidance_scale=recipe.sampling_guidance_scale,
        generators=generators,
    )
    total, steps = torch.zeros(len(candidate_embeds)), 0
    for point in points:
        concept, steps = point.velocity.float(), steps + 1
        norms = concept.flatten(1).square().sum(1)
        for index, embeds in enumerate(candidate_embeds):
            with frozen_teacher(*velocity.models):
                other = velocity(point.x_t, point.t, embeds)
            distances = (other - concept).flatten(1).square().sum(1)
            total[index] += (distances / norms).mean().cpu()
    return total / steps
