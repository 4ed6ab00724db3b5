"""Words that a text encoder places near a concept: what an erasure is most likely to damage."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffusers_ext.core.restored_state import module_eval_mode
from diffusers_ext.eraser.concepts import check_concept, in_reach

logger = logging.getLogger(__name__)

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
    """The bundled English words for things that can be seen, each once.

    `topic` names one file of `words`, such as `"animals"`; all of them when `None`.
    """
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
    """Whether two names have a word in common, inflected or not; articles and the like do not count.

    "cats" and "black cat" do, "scarf" and "car" do not.
    """
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
) -> torch.Tensor:
    """What the video model reads at the tokens of each word, averaged over them: `(words, dim)` float32 on the CPU.

    A word is a prompt by itself, padded as `CogVideoXPipeline` pads prompts, whose padding is not masked: an encoder
    that was trained this way says something else without it. Neither padding nor the end of the sequence is averaged.
    The text encoder runs in eval mode and keeps its own.

    Raises:
        ValueError: embeddings that are not finite.
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
            hidden = text_encoder(tokens.input_ids)[0].float()
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
) -> list[Neighbour]:
    """The words that the text encoder places nearest to a concept, the nearest first.

    None shares a word, inflected or not, with the concept or with `exclude`.

    Args:
        tokenizer, text_encoder: of the pipeline.
        words: candidates; when `None`, those of `concrete_words()` of which the tokenizer need not spell a part in
            single letters: it hardly ever met the others.
        max_sequence_length: tokens of a padded prompt, the transformer's `max_text_seq_length`.
        exclude: further names of the concept, such as synonyms, which must not be preserved.

    Raises:
        ValueError: a concept that the tokenizer cannot spell, or fewer candidates than `count`.
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
    embeddings = word_embeddings(tokenizer, text_encoder, [concept, *candidates], max_sequence_length)
    cosines = centred_cosines(embeddings[1:], embeddings[0])
    nearest = cosines.argsort(descending=True, stable=True)[:count].tolist()
    return [Neighbour(candidates[index], cosines[index].item()) for index in nearest]
