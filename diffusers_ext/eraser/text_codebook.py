"""Text rounded to tokens of kept prompts before the denoiser reads it, so that no learned embedding says anything new.

A trained eraser learns what to do about the text it was shown, and embeddings that are learned afterwards are other
text: they bring the concept back. Behind a codebook of pairs `(k, v)` each text token is

    q(x) = v of argmin_k |x - k|,

the vector quantisation of van den Oord et al. 2017 (https://arxiv.org/abs/1711.00937), and the denoiser reads nothing
else, whatever is put into the prompt. For tokens that kept prompts are made of `v = k`; tokens of prompts that name
the concept stand for those of the anchor's in the same place, which are kept ones too. The gradient is that of the
identity, as theirs: without one an attack that follows gradients would fail for want of them, which is no protection
(Athalye et al. 2018, https://arxiv.org/abs/1802.00420). Tokens of zeros are padding and stay.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.nn import functional

from diffusers_ext.eraser.adapter.layer import EraserLayer
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.eraser.teacher.runs import EraserText
from diffusers_ext.families.token_alignment import token_alignment

_ROUNDS = 12  # of Lloyd's algorithm; the bundled models' codebooks stand still before
_TEXT = "encoder_hidden_states"


def learn_text_codebook(
    prompt_embeds: torch.Tensor, empty_embeds: torch.Tensor, size: int, *, seed: int = 0
) -> torch.Tensor:
    """At most `size` tokens `(tokens, dim)` float32 on the CPU that stand for those of kept prompts.

    The tokens of the empty prompt are among them as they are, for guidance reads them in every step. The others are
    means of near tokens, by k-means from spread ones (Arthur and Vassilvitskii 2007, k-means++); all tokens as they
    are where there are no more.

    Args:
        prompt_embeds: of the kept prompts, `(prompts, text, dim)`, in which the concept is not named.
        empty_embeds: of the empty prompt, `(text, dim)`.
    """
    empty, tokens = (_distinct(embeds) for embeds in (empty_embeds, prompt_embeds))
    room = size - len(empty)
    if room < 1:
        raise ValueError(
            f"`text_codebook_size` must be above the {len(empty)} tokens of the empty prompt, which it keeps, got "
            f"{size}."
        )
    if len(tokens) > room:
        tokens = _means(tokens, room, torch.Generator().manual_seed(seed))
    return torch.cat([empty, tokens]).contiguous()


def replace_concept(
    codebook: torch.Tensor,
    target_embeds: torch.Tensor,
    anchor_embeds: torch.Tensor,
    places: torch.Tensor,
    *,
    size: int | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """A codebook in which tokens of prompts that name the concept stand for tokens of their anchors.

    `(tokens, 2, dim)` float32 on the CPU: what is looked up, and what is read for it. Of tokens that are alike one
    stands for all.

    Args:
        codebook: of kept tokens, `(tokens, dim)`.
        target_embeds: of the prompts, `(prompts, text, dim)`.
        anchor_embeds: of the same with the anchor in the concept's place.
        places: `token_alignment` of both, `(prompts, text)`.
        size: most tokens that are added; all of them when `None`.
    """
    keys, anchors = (embeds.detach().to("cpu", torch.float32) for embeds in (target_embeds, anchor_embeds))
    read = anchors.gather(1, places[..., None].expand_as(keys))
    keys, read = keys.flatten(0, 1), read.flatten(0, 1)
    said = keys.ne(0).any(dim=1) & read.ne(0).any(dim=1)
    keys, read = keys[said], read[said]
    chosen, group = keys.unique(dim=0, return_inverse=True)
    if size is not None and len(chosen) > size:
        chosen = _means(chosen, size, torch.Generator().manual_seed(seed))
        group = None
    # The first that is one of a group, or the nearest to a mean: a pair that some prompt really has.
    first = torch.cdist(chosen, keys).argmin(dim=1) if group is None else _first(group, len(chosen))
    added = torch.stack([keys[first], read[first]], dim=1)
    return torch.cat([torch.stack([codebook, codebook], dim=1), added])


def _first(group: torch.Tensor, count: int) -> torch.Tensor:
    """Index of the first member of each group."""
    return torch.full((count,), len(group)).scatter_reduce(0, group, torch.arange(len(group)), "amin")


def codebook_of_recipe(
    pipeline: DiffusionPipeline,
    target_prompts: Sequence[str],
    anchor_prompts: Sequence[str],
    text: EraserText,
    recipe: EraserTraining,
) -> torch.Tensor | None:
    """The codebook that a recipe asks for, `(tokens, 2, dim)`; `None` where it asks for none.

    At most `text_codebook_size` tokens of its preserved prompts, and as many of what its target prompts become. It is
    to be attached once the eraser has learned what to do about text as it is.

    Args:
        pipeline: whose tokenizers align the prompts.
        text: of all prompts.
    """
    size = recipe.text_codebook_size
    if size is None:
        return None
    if not isinstance(text.preserved, torch.Tensor):
        raise ValueError(
            f"`text_codebook_size` must be None for a model whose text is more than one tensor of tokens, got {size}."
        )
    if text.preserved.eq(text.empty).all():
        raise ValueError(
            "The preserved prompts must say something where `text_codebook_size` is given, got the empty prompt "
            "alone: every prompt would become it."
        )
    kept = learn_text_codebook(text.preserved, text.empty, size, seed=recipe.seed)
    places = token_alignment(pipeline, target_prompts, anchor_prompts, text.target.shape[1])
    return replace_concept(kept, text.target, text.anchor, places, size=size, seed=recipe.seed)


def _distinct(embeds: torch.Tensor) -> torch.Tensor:
    tokens = embeds.detach().to("cpu", torch.float32).flatten(0, -2)
    return tokens[tokens.ne(0).any(dim=1)].unique(dim=0)


def _means(tokens: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Of `count` groups of near tokens, which are begun at tokens far from each other."""
    first = tokens[torch.randint(len(tokens), (1,), generator=generator)]
    chosen, distance = [first], torch.cdist(tokens, first)[:, 0]
    while len(chosen) < count:
        # Squares: the chance of k-means++. None are left where fewer tokens differ at this precision.
        weights = distance.square() if distance.any() else torch.ones_like(distance)
        chosen.append(tokens[torch.multinomial(weights, 1, generator=generator)])
        distance = torch.minimum(distance, torch.cdist(tokens, chosen[-1])[:, 0])
    means = torch.cat(chosen)
    for _ in range(_ROUNDS):
        group = torch.cdist(tokens, means).argmin(dim=1)
        members = torch.bincount(group, minlength=count)[:, None]
        sums = torch.zeros_like(means).index_add_(0, group, tokens)
        means = torch.where(members > 0, sums / members.clamp_min(1), means)
    return means


def round_text(prompt_embeds: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """What a codebook has for each token of `(batch, text, dim)`; zeros stay.

    It is `(tokens, dim)`, or `(tokens, 2, dim)` where what is looked up and what is read for it differ. Distances are
    float32, the result of the text's dtype; the gradient is the identity's.
    """
    with torch.no_grad():
        values, known = prompt_embeds.float(), codebook.to(prompt_embeds.device, torch.float32)
        keys, read = (known, known) if known.ndim == 2 else known.unbind(dim=1)
        # |x - k|^2 but for |x|^2: one product, whatever the length of the text.
        nearest = (keys.square().sum(dim=1) - 2 * functional.linear(values, keys)).argmin(dim=2)
        padding = values.eq(0).all(dim=2, keepdim=True)
        rounded = torch.where(padding, values, read[nearest]).to(prompt_embeds.dtype)
    return rounded + (prompt_embeds - prompt_embeds.detach())


class TextRounding:
    """A hook that rounds what a denoiser reads, wherever its eraser `adapter_name` is at work.

    It asks the eraser's layers: one that is inactive, of scale 0, disabled, switched off for this thread, taken off or
    replaced by another of its name rounds nothing.
    """

    def __init__(self, adapter_name: str, codebook: torch.Tensor, arguments: Sequence[str]) -> None:
        self.adapter_name, self.codebook = adapter_name, codebook
        self.place = list(arguments).index(_TEXT) - 1  # among arguments without a name; the first is the model
        self._moved: dict[torch.device, torch.Tensor] = {}

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = _layer_of(model, self.adapter_name)
        if layer is None or not _at_work(layer, model, self.adapter_name):
            return None
        text = kwargs[_TEXT] if _TEXT in kwargs else args[self.place]
        rounded = round_text(text, self._on(text.device))
        if torch.compiler.is_compiling():
            rounded = torch.where(layer.gate.openness.to(text.device) > 0, rounded, text)
        if _TEXT in kwargs:
            return args, {**kwargs, _TEXT: rounded}
        return (*args[: self.place], rounded, *args[self.place + 1 :]), kwargs

    def _on(self, device: torch.device) -> torch.Tensor:
        if device not in self._moved:
            self._moved = {device: self.codebook.to(device)}
        return self._moved[device]


def _layer_of(model: nn.Module, adapter_name: str) -> EraserLayer | None:
    return next(
        (part for part in model.modules() if isinstance(part, EraserLayer) and adapter_name in part.eraser_down), None
    )


def _at_work(layer: EraserLayer, model: nn.Module, adapter_name: str) -> bool:
    config = getattr(model, "peft_config", {}).get(adapter_name)
    return (
        getattr(config, "text_codebook_size", None) is not None
        and adapter_name in layer.active_adapters
        and layer.scaling[adapter_name] != 0
        and not layer.disable_adapters
        and not layer.bypassed
    )


def attach_text_codebook(transformer: nn.Module, adapter_name: str, codebook: torch.Tensor) -> None:
    """Round the text of a transformer from now on while its eraser `adapter_name` is at work."""
    arguments = tuple(inspect.signature(type(transformer).forward).parameters)
    if _TEXT not in arguments:
        raise ValueError(
            f"`transformer` must read `{_TEXT}` to get a text codebook, got a {type(transformer).__name__}. Train its "
            "eraser without `text_codebook_size`."
        )
    layer = _layer_of(transformer, adapter_name)
    if layer is None:
        raise ValueError(f"`adapter_name` must name an eraser of the transformer, got {adapter_name!r}.")
    pairs = codebook.ndim == 3 and codebook.shape[1] == 2
    if not (codebook.ndim == 2 or pairs) or not len(codebook) or not codebook.isfinite().all():
        raise ValueError(
            f"`codebook` must be finite tokens (tokens, dim), or pairs of them (tokens, 2, dim), got "
            f"{tuple(codebook.shape)}."
        )
    detach_text_codebook(transformer, adapter_name)
    transformer.peft_config[adapter_name].text_codebook_size = len(codebook)
    hook = TextRounding(adapter_name, codebook.detach().float(), arguments)
    transformer.register_forward_pre_hook(hook, with_kwargs=True)


def attached_codebook(transformer: nn.Module, adapter_name: str) -> torch.Tensor | None:
    """The codebook of an eraser, as it was attached, float32; `None` where it has none."""
    config = getattr(transformer, "peft_config", {}).get(adapter_name)
    if getattr(config, "text_codebook_size", None) is None:
        return None
    return next((hook.codebook for _, hook in _hooks(transformer, adapter_name)), None)


def detach_text_codebook(transformer: nn.Module, adapter_name: str) -> None:
    """Round no more for an eraser, whether it is still there or not."""
    for key, _ in _hooks(transformer, adapter_name):
        del transformer._forward_pre_hooks[key]
        transformer._forward_pre_hooks_with_kwargs.pop(key, None)
    config = getattr(transformer, "peft_config", {}).get(adapter_name)
    if getattr(config, "text_codebook_size", None) is not None:
        config.text_codebook_size = None


def _hooks(transformer: nn.Module, adapter_name: str) -> list[tuple[int, TextRounding]]:
    found = list(transformer._forward_pre_hooks.items())
    return [(key, hook) for key, hook in found if isinstance(hook, TextRounding) and hook.adapter_name == adapter_name]
