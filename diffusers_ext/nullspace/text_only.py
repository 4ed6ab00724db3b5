"""Which Linears of a denoiser read text alone: found by running it, not by names.

A Linear whose input is the same whatever the latents, the timestep and the size keeps its outputs for a prompt if and
only if its update is zero on what it reads for that prompt, `(W + D) x = W x  <=>  D x = 0`. By induction over depth
the denoiser then keeps its output for that prompt at any latent, timestep, size and sampler, as long as no other
Linear changes: what the later ones read is what they read before.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.core.capture import capture, natural_key
from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.nullspace.statistics import TEXT

_PROMPTS = ("a photo of a cat", "two red boats on a lake")
# The tokens of the text, under the names that denoisers of diffusers give them.
TOKENS = "encoder_hidden_states"


class _Read(Exception):
    """Ends a run whose first denoiser call has told all that is asked."""


def text_only_linears(
    pipeline: DiffusionPipeline, *, prompts: Sequence[str] = _PROMPTS, **call_arguments: Any
) -> dict[str, str]:
    """`{dotted name: source}` of the denoiser's Linears that read text alone.

    The pipeline is run three times for two steps: for one prompt with two seeds and two sizes, and for another prompt.
    Linears whose inputs are equal to the bit in all four calls for the first prompt, and other ones for the second,
    read text alone. Linears of one source read the same tensor, and so share one statistic. A source is `"text"` for
    the token embeddings, the name of the denoiser's argument for what else it is handed (pooled text), and otherwise
    the name of the first Linear that reads it.

    Args:
        pipeline: text to image or to video; it is left as it was.
        prompts: two different ones.
        call_arguments: for the pipeline's call. `height` and `width` are the smaller size, by default 16 latent pixels
            a side; the other one is twice as wide.

    Raises:
        ValueError: prompts that are not two, or that the model cannot tell apart.
    """
    if len(prompts) != 2:
        raise ValueError(f"`prompts` must be two different ones, got {list(prompts)}.")
    small = smallest_call(pipeline, call_arguments)
    first = _inputs_of_linears(pipeline, prompts[0], 0, small)
    second = _inputs_of_linears(pipeline, prompts[0], 1, {**small, "width": 2 * small["width"]})
    other = _inputs_of_linears(pipeline, prompts[1], 0, small)
    handed = denoiser_arguments(pipeline, prompts[:1], **call_arguments)
    sources = {digest(tensor): TEXT if name == TOKENS else name for name, tensor in handed.items()}
    found: dict[str, str] = {}
    for name in sorted(first, key=natural_key):
        read = set(first[name]) | set(second.get(name, ()))
        if len(read) == 1 and not read & set(other.get(name, ())):
            found[name] = sources.setdefault(read.pop(), name)
    if not found:
        raise ValueError(
            f"`prompts` must be different to the model, and {type(denoiser_of(pipeline)).__name__} must have a Linear "
            f"that reads text alone, got none for {list(prompts)}."
        )
    return found


def _inputs_of_linears(
    pipeline: DiffusionPipeline, prompt: str, seed: int, arguments: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Digests of what every Linear reads in a run of two steps, call by call."""
    denoiser = denoiser_of(pipeline)
    linears = {name: module for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    seen: dict[str, list[str]] = defaultdict(list)
    run = {**arguments, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(seed)}
    with quiet_run(pipeline), capture(denoiser, linears, lambda name, x: seen[name].append(digest(x))):
        pipeline(prompt=prompt, **run)
    return seen


def smallest_call(pipeline: DiffusionPipeline, call_arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the cheapest call of a pipeline that still reads its prompt."""
    factor = getattr(pipeline, "vae_scale_factor", None) or getattr(pipeline, "vae_scale_factor_spatial", 8)
    known = inspect.signature(type(pipeline).__call__).parameters
    usual = {
        "height": 16 * factor,
        "width": 16 * factor,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "output_type": "latent",
    }
    return {**{name: value for name, value in usual.items() if name in known}, **call_arguments}


def _call_once(pipeline: DiffusionPipeline, prompts: Sequence[str], call_arguments: Mapping[str, Any]) -> None:
    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    with quiet_run(pipeline):
        pipeline(prompt=list(prompts), generator=generators, **smallest_call(pipeline, call_arguments))


def denoiser_arguments(
    pipeline: DiffusionPipeline, prompts: Sequence[str], **call_arguments: Any
) -> dict[str, torch.Tensor]:
    """The tensors that the pipeline hands its denoiser by name in its first call for a batch of prompts.

    It is the pipeline itself that encodes the prompts; the denoiser is not run.
    """
    handed: dict[str, torch.Tensor] = {}

    def read(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        handed.update({name: value.detach() for name, value in kwargs.items() if isinstance(value, torch.Tensor)})
        raise _Read

    hook = denoiser_of(pipeline).register_forward_pre_hook(read, with_kwargs=True)
    try:
        _call_once(pipeline, prompts, call_arguments)
    except _Read:
        pipeline.maybe_free_model_hooks()
    finally:
        hook.remove()
    return handed


class TextReader:
    """What the text-only Linears of a pipeline read for prompts.

    Args:
        sources: as of `text_only_linears`.
        call_arguments: for the pipeline's call.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, sources: Mapping[str, str], batch_size: int, call_arguments: Any
    ) -> None:
        self.pipeline, self.batch_size, self.call_arguments = pipeline, batch_size, call_arguments
        self.readers = {source: name for name, source in reversed(sources.items())}
        self.handed = {source for source in self.readers if source not in sources}

    def batches(self, prompts: Sequence[str], source: str) -> Iterator[torch.Tensor]:
        """`(batch, tokens, width)` float64, batch by batch; pooled text has one token."""
        for start in range(0, len(prompts), self.batch_size):
            read = self._read(prompts[start : start + self.batch_size], source)
            yield (read[:, None] if read.ndim == 2 else read).double()

    def all(self, prompts: Sequence[str], source: str) -> torch.Tensor:
        """`(prompts, tokens, width)` float64."""
        return torch.cat(list(self.batches(prompts, source)))

    def _read(self, prompts: Sequence[str], source: str) -> torch.Tensor:
        if source in self.handed:
            handed = denoiser_arguments(self.pipeline, prompts, **self.call_arguments)
            return handed[TOKENS if source == TEXT else source]
        found: dict[str, torch.Tensor] = {}
        denoiser = denoiser_of(self.pipeline)
        targets = {source: denoiser.get_submodule(self.readers[source])}
        with capture(denoiser, targets, found.__setitem__):
            _call_once(self.pipeline, prompts, self.call_arguments)
        return found[source]


def digest(tensor: torch.Tensor) -> str:
    """Of the dtype and every bit, in whatever shape."""
    # A copy, because views of one element may have a stride of 0.
    tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return hashlib.blake2b(
        str(tensor.dtype).encode() + tensor.flatten().view(torch.uint8).numpy().tobytes()
    ).hexdigest()
