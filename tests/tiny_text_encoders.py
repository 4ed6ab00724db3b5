"""Tiny random text encoders of today's families, with tokenizers of a few words."""

from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    UMT5Config,
    UMT5EncoderModel,
)

from examples.digits.prompts import COLORS, DIGITS
from examples.digits.small_tokenizers import byte_pair_tokenizer
from examples.digits.small_tokenizers import gemma_tokenizer as small_gemma_tokenizer

_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Of prompts, and of the template of Qwen-Image, which so has the 34 tokens that the pipeline drops.
_WORDS = (
    "a", "the", "of", "photo", "image", "by", "detailing", "color", "shape", "size", "texture", "quantity", "text",
    "spatial", "relationships", "objects", "and", "background",
)  # fmt: skip


def qwen_tokenizer() -> Qwen2Tokenizer:
    """With Qwen's chat marks; a word of the digits' prompts is one token, other words are spelled in bytes."""
    words = (*_WORDS, *COLORS, *DIGITS)
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    # Byte-pair merges build each word letter by letter.
    for word in ("user", "assistant", "system", "Describe", *(f"Ġ{word}" for word in words)):
        for end in range(1, len(word)):
            merge = (word[:end], word[end])
            if merge not in merges:
                merges.append(merge)
            vocabulary.setdefault(word[: end + 1], len(vocabulary))
    for mark in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        vocabulary[mark] = len(vocabulary)
    return byte_pair_tokenizer(
        Qwen2Tokenizer,
        vocabulary,
        merges,
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


def qwen_vl(tokenizer: Qwen2Tokenizer, width: int) -> Qwen2_5_VLForConditionalGeneration:
    """Two layers of two heads of 8; its eyes are as small as they can be."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [width // 16, width // 16, width // 8],
        },
    }
    if "rope_parameters" not in Qwen2_5_VLConfig().text_config.to_dict():  # transformers 4
        text["rope_scaling"] = {"type": "default", "mrope_section": text["rope_parameters"]["mrope_section"]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def mistral3(tokenizer: Qwen2Tokenizer, width: int, num_layers: int) -> Mistral3ForConditionalGeneration:
    """Two heads of 8; its eyes are as small as they can be."""
    text = {
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision = {
        "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "head_dim": 8, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=len(tokenizer) - 1)
    return Mistral3ForConditionalGeneration(config).eval()


def umt5(tokenizer: CLIPTokenizer, width: int) -> UMT5EncoderModel:
    """One layer of two heads of 4."""
    config = UMT5Config(vocab_size=len(tokenizer), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return UMT5EncoderModel(config).eval()


def gemma_tokenizer() -> GemmaTokenizer:
    """A word of the digits' prompts is one token, with the mark of the space before it or without; no other words."""
    words = [start + word for word in ("a", "the", "of", "photo", *COLORS, *DIGITS) for start in ("", "▁")]
    vocabulary = {mark: index for index, mark in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"))}
    merges: list[tuple[str, str]] = []
    # Longer words first, because a merge of a short one ("r e" of "red") would cut a longer one ("three") in two.
    for word in sorted(words, key=lambda word: (-len(word), word)):
        for end in range(len(word)):
            for token in (word[end], word[: end + 1]):
                vocabulary.setdefault(token, len(vocabulary))
            if end and (word[:end], word[end]) not in merges:
                merges.append((word[:end], word[end]))
    return small_gemma_tokenizer(vocabulary, merges, model_max_length=1024)


def gemma(tokenizer: GemmaTokenizer, width: int) -> Gemma3ForConditionalGeneration:
    """Two layers of two heads of 8; its eyes are as small as they can be."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 32,
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    return Gemma3ForConditionalGeneration(config).eval()
