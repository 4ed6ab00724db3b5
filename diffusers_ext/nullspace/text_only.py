"""Which Linears of a model read text alone: found by running it, not by names.

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
from torch.nn import functional

from diffusers_ext.core.capture import capture
from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.families import match_family
from diffusers_ext.nullspace.statistics import TEXT

_PROMPTS = ("a photo of a cat", "two red boats on a lake")
# The tokens of the text, under the names that denoisers of diffusers give them.
TOKENS = "encoder_hidden_states"
_KEPT_BYTES = 2**30  # of texts that a reader keeps in the host's memory


class _Read(Exception):
    """Ends a run that has told all that is asked."""


def text_readers(pipeline: DiffusionPipeline) -> torch.nn.Module:
    """What may read text alone: the denoiser, and by their names what stands between it and the text encoder.

    Where there is such a component (LTX-2's connectors), it is one more child beside those of the denoiser.
    """
    denoiser, family = denoiser_of(pipeline), match_family(pipeline)
    names = family.text_components if family else ()
    if not names:
        return denoiser
    root = torch.nn.Module()
    for name, module in [*((name, getattr(pipeline, name)) for name in names), *denoiser.named_children()]:
        root.add_module(name, module)
    return root


def lora_name(pipeline: DiffusionPipeline, name: str) -> str:
    """The name in a LoRA file of a module of `text_readers`: with its component before it."""
    family, denoiser = match_family(pipeline), denoiser_of(pipeline)
    if family and name.partition(".")[0] in family.text_components:
        return name
    return f"{next(part for part, module in pipeline.components.items() if module is denoiser)}.{name}"


def text_only_linears(
    pipeline: DiffusionPipeline, *, prompts: Sequence[str] = _PROMPTS, **call_arguments: Any
) -> dict[str, str]:
    """`{dotted name: source}` of the Linears that read text alone, in the order in which they run.

    The pipeline is run three times for two steps: for one prompt with two seeds and two sizes, and for another prompt.
    Linears whose inputs are equal to the bit in all four calls for the first prompt, and other ones for the second,
    read text alone. Linears of one source read the same tensor, and so share one statistic. A source is `"text"` for
    the token embeddings, the name of the denoiser's argument for what else it is handed (pooled text), and otherwise
    the name of the first Linear that reads it. Names are those in the denoiser; those of a component before it begin
    with its name (`text_readers`).

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
    tensors = {name: value for name, value in handed.items() if isinstance(value, torch.Tensor)}
    sources = {digest(tensor): TEXT if name == TOKENS else name for name, tensor in tensors.items()}
    found: dict[str, str] = {}
    for name in first:
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
    """Digests of what every Linear reads in a run of two steps, call by call, in the order of the first ones."""
    root = text_readers(pipeline)
    linears = {name: module for name, module in root.named_modules() if isinstance(module, torch.nn.Linear)}
    seen: dict[str, list[str]] = defaultdict(list)
    run = {**arguments, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(seed)}
    with quiet_run(pipeline), capture(root, linears, lambda name, x: seen[name].append(digest(x))):
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
    family = match_family(pipeline)
    return {
        **{name: value for name, value in usual.items() if name in known},
        **({**family.smallest_call, **family.text_call(pipeline)} if family else {}),
        **call_arguments,
    }


def _run_until_read(pipeline: DiffusionPipeline, prompts: Sequence[str], call_arguments: Mapping[str, Any]) -> None:
    """Call a pipeline whose hooks raise `_Read` once they have read."""
    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    with quiet_run(pipeline):
        try:
            pipeline(prompt=list(prompts), generator=generators, **smallest_call(pipeline, call_arguments))
        except _Read:
            pipeline.maybe_free_model_hooks()


def denoiser_arguments(
    pipeline: DiffusionPipeline, prompts: Sequence[str], **call_arguments: Any
) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """The tensors, and lists of them, that the pipeline hands its denoiser in its first call for a batch of prompts.

    It is the pipeline itself that encodes the prompts; the denoiser is not run.
    """
    handed: dict[str, torch.Tensor | list[torch.Tensor]] = {}
    denoiser = denoiser_of(pipeline)
    signature = inspect.signature(denoiser.forward)

    def read(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for name, value in signature.bind_partial(*args, **kwargs).arguments.items():
            if isinstance(value, torch.Tensor):
                handed[name] = value.detach()
            elif isinstance(value, list) and value and all(isinstance(x, torch.Tensor) for x in value):
                handed[name] = [x.detach() for x in value]
        raise _Read

    hook = denoiser.register_forward_pre_hook(read, with_kwargs=True)
    try:
        _run_until_read(pipeline, prompts, call_arguments)
    finally:
        hook.remove()
    return handed


class TextReader:
    """What the text-only Linears of a pipeline read for prompts.

    Where texts are as long as their prompts (Qwen-Image, Z-Image), prompts are read one by one.

    Args:
        sources: as of `text_only_linears`.
        call_arguments: for the pipeline's call.

    Attributes:
        readers: the first Linear of every source.
        varies: texts are as long as their prompts.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, sources: Mapping[str, str], batch_size: int, call_arguments: Any
    ) -> None:
        self.pipeline, self.call_arguments = pipeline, call_arguments
        self._kept: dict[tuple[str, str], torch.Tensor] = {}
        # Updates of what stands before the denoiser change what that is handed.
        self._room = _KEPT_BYTES if text_readers(pipeline) is denoiser_of(pipeline) else 0
        self.readers: dict[str, str] = {}
        for name, source in sources.items():
            self.readers.setdefault(source, name)
        self.handed = {source for source in self.readers if source not in sources}
        self.varies = self._shapes("") != self._shapes(_PROMPTS[1])
        self.batch_size = 1 if self.varies else batch_size

    def _shapes(self, prompt: str) -> dict[str, list[torch.Size]]:
        handed = denoiser_arguments(self.pipeline, [prompt], **self.call_arguments)
        return {n: [x.shape for x in v] if isinstance(v, list) else [v.shape] for n, v in handed.items()}

    def batches(self, prompts: Sequence[str], source: str) -> Iterator[torch.Tensor]:
        """`(batch, tokens, width)` float64, batch by batch; pooled text has one token."""
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            read = self._read(batch, source)
            yield _from_its_begin(read.reshape(len(batch), -1, read.shape[-1]).double())

    def all(self, prompts: Sequence[str], source: str) -> torch.Tensor:
        """`(prompts, tokens, width)` float64; shorter texts end in zeros."""
        read = list(self.batches(prompts, source))
        longest = max(x.shape[1] for x in read)
        return torch.cat([functional.pad(x, (0, 0, 0, longest - x.shape[1])) for x in read])

    def _handed(self, prompts: Sequence[str], source: str) -> torch.Tensor:
        """What the denoiser is handed: a prompt is encoded once, while there is room."""
        missing = list(dict.fromkeys(prompt for prompt in prompts if (prompt, source) not in self._kept))
        found: dict[tuple[str, str], torch.Tensor] = {}
        if missing:
            handed = denoiser_arguments(self.pipeline, missing, **self.call_arguments)
            for name in self.handed:
                rows = handed[TOKENS if name == TEXT else name]
                self._device = rows.device
                found |= {(prompt, name): row for prompt, row in zip(missing, rows.cpu(), strict=True)}
            self._room -= sum(row.nbytes for row in found.values())
            if self._room >= 0:
                self._kept |= found
        rows = [found[key] if (key := (prompt, source)) in found else self._kept[key] for prompt in prompts]
        return torch.stack(rows).to(self._device)

    def _read(self, prompts: Sequence[str], source: str) -> torch.Tensor:
        if source in self.handed:
            return self._handed(prompts, source)
        found: list[torch.Tensor] = []

        def take(_: str, features: torch.Tensor) -> None:
            found.append(features)
            raise _Read

        root = text_readers(self.pipeline)
        with capture(root, {source: root.get_submodule(self.readers[source])}, take):
            _run_until_read(self.pipeline, prompts, self.call_arguments)
        return found[0]


def _from_its_begin(texts: torch.Tensor) -> torch.Tensor:
    """Zeros that a text begins with, which is padding on the left (LTX-2), at its end."""
    filled = texts.any(-1)
    places = torch.arange(texts.shape[1], device=texts.device) + filled.int().argmax(1)[:, None]
    return texts.gather(1, (places % texts.shape[1])[..., None].expand_as(texts))


def digest(tensor: torch.Tensor) -> str:
    """Of the dtype and every bit, in whatever shape."""
    # A copy, because views of one element may have a stride of 0.
    tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return hashlib.blake2b(
        str(tensor.dtype).encode() + tensor.flatten().view(torch.uint8).numpy().tobytes()
    ).hexdigest()
