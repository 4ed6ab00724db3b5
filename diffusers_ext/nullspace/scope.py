"""Which Linears of a joint-attention model train, and what of them is read from text alone.

In a UNet text enters by keys and values of cross-attention, all of which read the same embeddings. A joint transformer
changes its text from block to block, with the picture in sight. Before the blocks it reads text alone (`text_only`:
preserved prompts keep their outputs exactly); the keys and values of its text stream are where a subject is learnt
best (`text_stream`); the rest of the attention mostly costs what is known (`all`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.core.capture import capture, natural_key
from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.core.second_moment import SecondMoment
from diffusers_ext.families import Family, match_family
from diffusers_ext.nullspace.settings import SCOPES
from diffusers_ext.nullspace.text_only import TextReader, digest, smallest_call, text_only_linears

_PROMPT = "a photo of a cat"


class ScopedLinears(NamedTuple):
    """The Linears of a scope by how their inputs are measured."""

    text: dict[str, str]  # {dotted name: source}: of text alone, without a run
    runs: dict[str, str]  # {dotted name: key}: along denoising runs; those of one key read the same tensor

    @property
    def names(self) -> list[str]:
        """All of them, in natural order."""
        return sorted([*self.text, *self.runs], key=natural_key)


def settle_scope(denoiser: torch.nn.Module, scope: str | None) -> str | None:
    """The scope of a joint model, `text_stream` where none is given; `None` for a UNet, or features of its own.

    Raises:
        ValueError: a scope for a UNet, or an unknown one.
    """
    family = match_family(denoiser, "nullspace")
    if family is None or not family.flow_matching:
        if scope is not None:
            raise ValueError(
                f"`scope` must be left out for a {type(denoiser).__name__}, got {scope!r}: its text enters by "
                "cross-attention alone. Choose Linears by `features` and layers."
            )
        return None
    if scope is not None and scope not in SCOPES:
        raise ValueError(f"`scope` must be one of {list(SCOPES)}, got {scope!r}.")
    if scope is None and family.features is not Family.features:  # it names Linears of its own
        return None
    return scope or SCOPES[0]


def check_no_features(features: Sequence[str], layers: str | Sequence[int]) -> None:
    """Raise `ValueError` for a choice of a UNet's Linears, which a joint model has no names for."""
    for name, value, usual in (("features", tuple(features), ("k", "v")), ("layers", layers, "all")):
        if value != usual:
            raise ValueError(f"`{name}` must be left out for a joint-attention model, got {value!r}. Use `scope`.")


def scoped_linears(pipeline: DiffusionPipeline, scope: str) -> ScopedLinears:
    """The Linears of a joint model that a scope lets train.

    Linears that read pooled text are left alone: it is one vector a prompt, which moves every block.
    """
    denoiser, family = denoiser_of(pipeline), match_family(pipeline, "nullspace")
    inside = dict(denoiser.named_modules())
    sources = {name: source for name, source in text_only_linears(pipeline).items() if name in inside}
    reader = TextReader(pipeline, sources, 1, {})
    pooled = {source for source in reader.readers if next(reader.batches([_PROMPT], source)).shape[1] == 1}
    text = {name: source for name, source in sources.items() if source not in pooled}
    runs = [name for name in attention_linears(denoiser, family, scope) if name not in sources]
    return ScopedLinears(text, shared_reads(pipeline, runs))


def attention_linears(denoiser: torch.nn.Module, family: Family, scope: str) -> list[str]:
    """The Linears of joint attention that a scope names, in natural order."""
    ends = {"text_only": (), "text_stream": family.text_stream, "all": family.attention_linears}[scope]
    # A dot before each: `to_k` is no end of `add_to_k`.
    ends = tuple(f".{end}" for end in ends)
    linears = (name for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear))
    return sorted((name for name in linears if ends and name.endswith(ends)), key=natural_key)


def shared_reads(pipeline: DiffusionPipeline, linears: Sequence[str]) -> dict[str, str]:
    """`{dotted name: the first one that reads the same tensor}`, found by a call of the denoiser."""
    denoiser = denoiser_of(pipeline)
    targets = {name: denoiser.get_submodule(name) for name in linears}
    if not targets:
        return {}
    seen: dict[str, list[str]] = defaultdict(list)
    with quiet_run(pipeline), capture(denoiser, targets, lambda name, x: seen[name].append(digest(x))):
        pipeline(prompt=_PROMPT, generator=torch.Generator().manual_seed(0), **smallest_call(pipeline, {}))
    first: dict[tuple[str, ...], str] = {}
    # One that the call does not reach shares nothing.
    return {name: first.setdefault(tuple(seen[name]) or (name,), name) for name in linears}


@torch.no_grad()
def text_moments(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    guided: Sequence[str],
    times: int,
    *,
    sources: Mapping[str, str],
    batch_size: int,
    shard: tuple[int, int],
) -> dict[str, SecondMoment]:
    """Second moments, in float64, of what the text-only Linears read for prompts, by source.

    Args:
        guided: unconditional prompts, which guidance reads in every picture.
        times: as how many prompts each of them counts; 1 for a model that takes the guidance scale as an input.
        shard: as of `collect_statistics`.
    """
    family, moments = match_family(pipeline, "nullspace"), {}
    reader = TextReader(pipeline, sources, batch_size, {})
    times = 1 if family.embedded_guidance(denoiser_of(pipeline).config) else times
    # Whole batches, as one process has them: among others a row may round differently.
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    own = list(chain.from_iterable(batches[shard[0] :: shard[1]]))
    for source in dict.fromkeys(sources.values()):
        moments[source] = _moment(reader, own, source)
        if guided and shard[0] == 0:
            moments[source].merge(_moment(reader, guided, source).repeated(times))
    return moments


def _moment(reader: TextReader, prompts: Sequence[str], source: str) -> SecondMoment:
    moment = None
    for rows in reader.batches(prompts or [_PROMPT], source):
        moment = moment or SecondMoment(rows.shape[-1], rows.device, torch.float64)
        if prompts:  # a process without any still takes part in the all-reduce, with zeros
            moment.update(rows)
    moment.check_finite(source)
    return moment
