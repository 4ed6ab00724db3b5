"""Tokenizers of a few words, made by transformers 4 and 5 alike: the one reads files, the other takes the words."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GemmaTokenizerFast, PreTrainedTokenizerBase, T5TokenizerFast

Merges = Sequence[tuple[str, str]]


def takes_words(kind: type[PreTrainedTokenizerBase]) -> bool:
    """Whether a class of tokenizers is one of transformers 5."""
    return "vocab" in inspect.signature(kind.__init__).parameters


def byte_pair_tokenizer(
    kind: type[PreTrainedTokenizerBase], vocabulary: Mapping[str, int], merges: Merges, **settings: Any
) -> Any:
    """A `CLIPTokenizer` or `Qwen2Tokenizer`; `settings` are those of its class."""
    if takes_words(kind):
        return kind(vocab=dict(vocabulary), merges=list(merges), **settings)
    with tempfile.TemporaryDirectory() as folder:
        words, pairs = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        words.write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        pairs.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return kind(str(words), str(pairs), **settings)


def t5_tokenizer(pieces: Sequence[tuple[str, float]], **settings: Any) -> Any:
    """A `T5Tokenizer` whose first pieces are `<pad>`, `</s>` and `<unk>`, without sentinels."""
    if takes_words(T5TokenizerFast):
        return T5TokenizerFast(vocab=list(pieces), extra_ids=0, **settings)
    # As transformers 5 makes it; transformers 4 itself reads them from a model of sentencepiece alone.
    tokenizer = Tokenizer(models.Unigram(list(pieces), unk_id=2, byte_fallback=False))
    marks = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**marks)]
    )
    tokenizer.decoder = decoders.Metaspace(**marks)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, **settings)


def gemma_tokenizer(vocabulary: Mapping[str, int], merges: Merges, **settings: Any) -> Any:
    """A `GemmaTokenizer` that begins with `<bos>`."""
    settings = {"add_bos_token": True, **settings}
    if takes_words(GemmaTokenizerFast):
        return GemmaTokenizerFast(vocab=dict(vocabulary), merges=list(merges), **settings)
    model = models.BPE(dict(vocabulary), list(merges), fuse_unk=True, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return GemmaTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **settings)
