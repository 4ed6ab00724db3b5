"""Encoded prompts of a batch, as any family has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch


# Tensors have no truth value, so two of these are compared by identity.
@dataclass(frozen=True, eq=False)
class TextConditioning:
    """Encoded prompts of a batch; what a family does not have is `None`.

    Negative ones, which guidance leads away from, have the shapes of the others; `ValueError` where they do not.
    """

    prompt_embeds: torch.Tensor  # (batch, tokens, dim)
    negative_prompt_embeds: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None  # (batch, tokens), nonzero where a token is read (Hunyuan-DiT)
    negative_attention_mask: torch.Tensor | None = None
    pooled_prompt_embeds: torch.Tensor | None = None  # (batch, pooled_dim) (SDXL, SD3, Flux)
    negative_pooled_prompt_embeds: torch.Tensor | None = None
    prompt_embeds_2: torch.Tensor | None = None  # (batch, tokens_2, dim_2), the second encoder's (Hunyuan-DiT's T5)
    negative_prompt_embeds_2: torch.Tensor | None = None
    attention_mask_2: torch.Tensor | None = None  # (batch, tokens_2)
    negative_attention_mask_2: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.prompt_embeds.ndim != 3:
            raise ValueError(f"`prompt_embeds` must be (batch, tokens, dim), got {tuple(self.prompt_embeds.shape)}.")
        for name, tensor in self.tensors().items():
            if len(tensor) != len(self):
                raise ValueError(
                    f"`{name}` must be a batch of {len(self)} like `prompt_embeds`, got {tuple(tensor.shape)}."
                )
            self._check_shape(name, tensor)

    def _check_shape(self, name: str, tensor: torch.Tensor) -> None:
        wanted_like, shape = name.removeprefix("negative_"), tensor.shape
        if name.startswith("attention_mask"):
            wanted_like = name.replace("attention_mask", "prompt_embeds")
        like = getattr(self, wanted_like)
        wanted = None if like is None else like.shape[: 2 if "mask" in name else None]
        if shape != wanted:
            raise ValueError(f"`{name}` must be {wanted and tuple(wanted)} like `{wanted_like}`, got {tuple(shape)}.")

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields that are there, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, index: slice | Sequence[int] | torch.Tensor) -> TextConditioning:
        if isinstance(index, int):
            raise TypeError(
                f"`index` must be a slice or a list of indices, got {index}. Use [{index}] in a "
                "list: a conditioning is always a batch."
            )
        if not isinstance(index, (slice, torch.Tensor)):
            index = list(index)
        return TextConditioning(**{name: x[index] for name, x in self.tensors().items()})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextConditioning:
        """The same on another device, and with embeddings of another dtype; masks keep theirs."""
        found = self.tensors().items()
        return TextConditioning(**{name: x.to(device, None if "mask" in name else dtype) for name, x in found})

    def positive(self) -> TextConditioning:
        """The same without negative prompts."""
        return TextConditioning(**{name: x for name, x in self.tensors().items() if not name.startswith("negative_")})

    def expand(self, count: int) -> TextConditioning:
        """One prompt as that of each of `count` samples, without a copy."""
        return TextConditioning(**{name: x.expand(count, *x.shape[1:]) for name, x in self.tensors().items()})


# Prompts of a batch as a denoiser reads them: `(batch, tokens, dim)` where that is all of it.
Text = torch.Tensor | TextConditioning


def token_embeds(text: Text) -> torch.Tensor:
    """The token embeddings `(batch, tokens, dim)` of a text."""
    return text if isinstance(text, torch.Tensor) else text.prompt_embeds


def join_texts(texts: Sequence[Text]) -> Text:
    """Several texts of one kind as one batch; see `stack_texts`."""
    if isinstance(texts[0], torch.Tensor):
        return torch.cat(list(texts))
    return stack_texts(texts)


def repeat_text(text: Text, count: int) -> Text:
    """The text of one prompt, of which a tensor may lack the batch, for `count` samples, without a copy."""
    if isinstance(text, torch.Tensor):
        return text.expand(count, *text.shape[-2:])
    return text.expand(count)


def same_text(first: Text, second: Text) -> bool:
    """Whether two texts of one kind are equal."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    pairs = zip(first.tensors().values(), second.tensors().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def replace_rows(text: Text, chosen: torch.Tensor, other: Text) -> Text:
    """A text with another one's rows, or its only one, where `chosen`, `(batch,)` bool."""
    if isinstance(text, torch.Tensor):
        return torch.where(chosen[:, None, None], other, text)
    both = {name: (x, other.tensors()[name]) for name, x in text.tensors().items()}
    return TextConditioning(
        **{name: torch.where(chosen.view(-1, *[1] * (x.ndim - 1)), y, x) for name, (x, y) in both.items()}
    )


def stack_texts(texts: Sequence[TextConditioning]) -> TextConditioning:
    """Several as one batch; shorter ones are padded with zeros, which their masks tell from tokens.

    Raises:
        ValueError: lengths that differ, without masks.
    """
    joined: dict[str, torch.Tensor] = {}
    for name in texts[0].tensors():
        parts = [text.tensors()[name] for text in texts]
        longest = max(part.shape[1] for part in parts)
        if any(part.shape[1] < longest for part in parts) and "mask" not in name:
            mask = name.replace("prompt_embeds", "attention_mask")
            if mask not in texts[0].tensors():
                lengths = sorted({part.shape[1] for part in parts})
                raise ValueError(f"`texts` must be of one length or have masks, got `{name}` of lengths {lengths}.")
        joined[name] = torch.cat([_padded(part, longest) for part in parts])
    return TextConditioning(**joined)


def with_negatives(positive: TextConditioning, negative: TextConditioning) -> TextConditioning:
    """Two texts as one with negative prompts, padded as by `stack_texts`."""
    both, count = stack_texts([positive, negative]).tensors(), len(positive)
    return TextConditioning(
        **{name: x[:count] for name, x in both.items()}, **{f"negative_{name}": x[count:] for name, x in both.items()}
    )


def _padded(tensor: torch.Tensor, length: int) -> torch.Tensor:
    padding = tensor.new_zeros(len(tensor), length - tensor.shape[1], *tensor.shape[2:])
    return torch.cat([tensor, padding], dim=1)


def refuse_negative_prompts(negatives: list[str] | None) -> None:
    """Raise `ValueError` where a model that takes the guidance scale as an input gets some."""
    if negatives is not None:
        raise ValueError(
            "`negative_prompt` must be None for a model that takes the guidance scale as an "
            f"input, got {negatives[0]!r}."
        )
