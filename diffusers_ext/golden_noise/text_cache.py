"""Prompt embeddings for networks that read text: every different prompt encoded once, then kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save
from torch.nn.functional import pad
from tqdm.auto import tqdm

from diffusers_ext.core.artifacts import fingerprint, write_atomically
from diffusers_ext.core.tensor_files import open_tensors
from diffusers_ext.families import find_family
from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.redenoise import TOOL, encode_prompts

logger = logging.getLogger(__name__)

CACHE_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
# What networks are told of a prompt.
_READ = ("prompt_embeds", "attention_mask", "pooled_prompt_embeds")
_PART_PROMPTS = 1024  # of a file at most: what a kill costs, and 0.3 GiB of SDXL
_REMEDY = "Remove it, and the run makes it again."


class TextCache:
    """Embeddings `text` of different prompts on the CPU, and in `rows` which is whose."""

    def __init__(self, prompts: Sequence[str], text: TextConditioning | StoredText) -> None:
        self.rows = {prompt: row for row, prompt in enumerate(prompts)}
        self.text = text

    @classmethod
    @torch.no_grad()
    def encode(
        cls,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        *,
        batch_size: int = 32,
        dtype: torch.dtype = torch.float16,
        directory: str | os.PathLike | None = None,
        process: tuple[int, int] = (0, 1),
        wait_for_everyone: Callable[[], None] | None = None,
    ) -> TextCache:
        """Encode each different prompt once, without its negative prompt; `ValueError` if not finite in `dtype`.

        (100,000 prompts of SDXL take 30 GiB in float16.)

        Args:
            directory: keep them in memory-mapped files there, one folder for each set of prompts and text encoder.
                They stay: what is there, also of a killed run, is not encoded again, and processes of one machine
                share the memory.
            process: `(index, count)` of the processes that share a `directory`, each of which encodes its share;
                `wait_for_everyone` is called when this one has.
        """
        unique = list(dict.fromkeys(prompts))
        if not find_family(pipeline, TOOL).pads_text:  # room for the longest is made at once, mostly
            unique.sort(key=len, reverse=True)
        if directory is not None:
            stored = StoredText(directory, pipeline, unique, batch_size, dtype)
            stored.encode(pipeline, process)
            if wait_for_everyone is not None:
                wait_for_everyone()
            return cls(unique, stored.open())
        if process != (0, 1):
            raise ValueError("`directory` must be given where processes share the prompts, got None.")
        with tqdm(total=len(unique), desc="encode prompts") as bar:
            text = _encoded(pipeline, unique, batch_size, dtype, bar)
        size = sum(tensor.nbytes for tensor in text.tensors().values())
        logger.info(f"Embeddings of {len(unique)} prompts take {size / 2**30:.2f} GiB.")
        return cls(unique, text)

    def take(self, rows: torch.Tensor, device: torch.device) -> TextConditioning:
        """The text of some rows in float32, the mask as it is, on `device`."""
        return self.text[rows].to(device, torch.float32)

    @property
    def facts(self) -> dict[str, Any]:
        """Widths, and sums that tell one text encoder from another; JSON-able."""
        first = self.text[torch.tensor([0])]
        pooled = first.pooled_prompt_embeds
        return {
            "tokens": first.prompt_embeds.shape[1],
            "text_embed_dim": first.prompt_embeds.shape[2],
            "pooled_dim": None if pooled is None else pooled.shape[1],
            # As many digits as do not depend on the number of threads.
            "probe": f"{first.prompt_embeds.float().norm().item():.3g}",
        }


def _encoded(
    pipeline: DiffusionPipeline, prompts: Sequence[str], batch_size: int, dtype: torch.dtype, bar: tqdm
) -> TextConditioning:
    """What is kept of the prompts, as long as the longest of them."""
    padded, whole = find_family(pipeline, TOOL).pads_text, {}
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        text = encode_prompts(pipeline, batch)
        for name, rows in _kept(text if padded else _trimmed(text), dtype).items():
            if name not in whole:
                whole[name] = rows.new_zeros(len(prompts), *rows.shape[1:])
            elif rows.shape[1] > whole[name].shape[1]:
                whole[name] = _lengthened(whole[name], rows.shape[1])
            whole[name][start : start + len(batch), : rows.shape[1]] = rows
        bar.update(len(batch))
    return TextConditioning(**whole)


def rows_of_a_file(batch_size: int) -> int:
    """Prompts of a file: whole batches of the text encoder, which round as they always do."""
    return batch_size * max(1, _PART_PROMPTS // batch_size)


class StoredText:
    """The text of prompts in files of a folder, each whole or not there, `[rows]` of which it gives.

    The folder is named by all that decides about them: class and text encoders of the pipeline, prompts and their
    order, batch size and dtype.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        batch_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.prompts, self.batch_size, self.dtype = prompts, batch_size, dtype
        self.size = rows_of_a_file(batch_size)
        encoders = {
            name: fingerprint(component)
            for name, component in sorted(pipeline.components.items())
            if name.startswith("text_encoder") and isinstance(component, torch.nn.Module)
        }
        facts = [type(pipeline).__name__, encoders, list(prompts), batch_size, str(dtype)]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        self.folder = Path(directory, f"text-{name}")
        self._parts: list[dict[str, torch.Tensor]] = []
        self._length = 0

    def _files(self) -> list[Path]:
        return [self.folder / f"{number:05d}.safetensors" for number in range(-(-len(self.prompts) // self.size))]

    def encode(self, pipeline: DiffusionPipeline, process: tuple[int, int] = (0, 1)) -> None:
        """Make this process's share of the files that are not there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files = list(enumerate(self._files()))[process[0] :: process[1]]
        left = [(number, path) for number, path in files if not path.is_file()]
        if len(left) < len(files):
            logger.info(
                f"Embeddings in {len(files) - len(left)} of {len(files)} files of {self.folder} are read again."
            )
        shares = [self.prompts[number * self.size : (number + 1) * self.size] for number, _ in left]
        with tqdm(total=sum(map(len, shares)), desc="encode prompts", disable=process[0] > 0) as bar:
            for (_, path), share in zip(left, shares, strict=True):
                text = _encoded(pipeline, share, self.batch_size, self.dtype, bar)
                write_atomically(path, save(text.tensors()))

    def open(self) -> StoredText:
        """Map all files; `ValueError` where one is missing, broken or not of this set."""
        parts = []
        for number, path in enumerate(self._files()):
            if not path.is_file():
                raise ValueError(
                    f"`text_cache_dir` must be a folder that all processes share, got {self.folder} without "
                    f"{path.name}, which another one has made."
                )
            handle = open_tensors(path, _REMEDY)
            part = {name: handle.get_tensor(name) for name in handle.keys()}
            rows = len(self.prompts[number * self.size : (number + 1) * self.size])
            shapes = {name: (len(tensor), tensor.dtype) for name, tensor in part.items() if name != "attention_mask"}
            strange = part.keys() - set(_READ) or any(found != (rows, self.dtype) for found in shapes.values())
            if "prompt_embeds" not in part or strange or (parts and part.keys() != parts[0].keys()):
                raise ValueError(
                    f"{path} must hold {rows} prompts in {self.dtype}, got {sorted(part)} of {shapes}. {_REMEDY}"
                )
            parts.append(part)
        self._parts, self._length = parts, max(part["prompt_embeds"].shape[1] for part in parts)
        size = sum(tensor.nbytes for part in parts for tensor in part.values())
        logger.info(f"Embeddings of {len(self.prompts)} prompts take {size / 2**30:.2f} GiB in {self.folder}.")
        return self

    def __getitem__(self, rows: torch.Tensor) -> TextConditioning:
        places = [divmod(row, self.size) for row in rows.tolist()]
        found = {}
        for name in self._parts[0]:
            chosen = [self._parts[part][name][row] for part, row in places]
            if name != "pooled_prompt_embeds":
                chosen = [_lengthened(tensor[None], self._length)[0] for tensor in chosen]
            found[name] = torch.stack(chosen)
        return TextConditioning(**found)


def _lengthened(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """With zeros for further tokens, which are in the second dimension."""
    more = length - tensor.shape[1]
    return pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, more)) if more else tensor


def _trimmed(text: TextConditioning) -> TextConditioning:
    """Without the padding that all of its prompts have."""
    length = int(text.attention_mask.sum(1).max())
    return TextConditioning(text.prompt_embeds[:, :length], attention_mask=text.attention_mask[:, :length])


def _kept(encoded: TextConditioning, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tensors = {name: tensor for name, tensor in encoded.tensors().items() if name in _READ}
    kept = TextConditioning(**tensors).to("cpu", dtype).tensors()
    if not all(tensor.isfinite().all() for tensor in kept.values()):
        raise ValueError(
            f"Prompt embeddings must be finite in {dtype}, got some that are not. Use "
            "`--text_cache_dtype fp32`, or check the text encoder."
        )
    return kept
