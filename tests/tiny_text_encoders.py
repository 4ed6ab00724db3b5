"""Tiny random text encoders of today's families, with tokenizers of a few words."""

from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config

from examples.digits.prompts import COLORS, DIGITS

_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """With Qwen's chat marks; a word of the digits' prompts is one token, other words are spelled in bytes."""
    words = ("a", "the", "of", "photo", *COLORS, *DIGITS)
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    # Byte-pair merges build each word letter by letter.
    for word in ("user", "assistant", "system", *(f"Ġ{word}" for word in words)):
        for end in range(1, len(word)):
            merge = (word[:end], word[end])
            if merge not in merges:
                merges.append(merge)
            vocabulary.setdefault(word[: end + 1], len(vocabulary))
    for mark in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        vocabulary[mark] = len(vocabulary)
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        model_max_length=512,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=_CHAT,
    )


def qwen3_config(tokenizer: Qwen2Tokenizer, width: int, num_layers: int) -> Qwen3Config:
    """Two heads of 8."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
    )
