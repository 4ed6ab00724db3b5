"""Unified Concept Editing (Gandikota et al. 2023, arXiv 2308.14761), equation 7, for one concept in another's place.

    W' = (sum_E W c*_i c_i^T + lambda W + sum_P W c_j c_j^T) (sum_E c_i c_i^T + lambda I + sum_P c_j c_j^T)^-1

E are the tokens of the concept's own name from its last word to the end of the text, `c*` those of the other's, P
those of the names to preserve, all without templates; lambda is 0.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.families import find_family
from diffusers_ext.nullspace.text_only import denoiser_arguments, text_only_linears


@torch.no_grad()
def concept_tokens(pipeline: DiffusionPipeline, name: str) -> torch.Tensor:
    """What the denoiser reads for a name, from its last word to the end of the text, `(tokens, width)` float64."""
    embeddings = denoiser_arguments(pipeline, [name])["encoder_hidden_states"][0].double()
    return embeddings[len(pipeline.tokenizer(name).input_ids) - 2 :]


@torch.no_grad()
def unified_concept_edit(
    pipeline: DiffusionPipeline, edits: Mapping[str, str], preserve: Sequence[str], weight: float = 0.5
) -> dict[str, torch.Tensor]:
    """The edit of what reads text alone, a UNet's K and V, as a LoRA of full rank, keys as in `read_lora`."""
    sources = text_only_linears(pipeline)
    change, seen = 0.0, 0.0
    for target, anchor in edits.items():
        old, new = concept_tokens(pipeline, target), concept_tokens(pipeline, anchor)
        length = min(len(old), len(new))
        old, new = old[:length], new[:length]
        change, seen = change + (new - old).T @ old, seen + old.T @ old
    kept = torch.cat([concept_tokens(pipeline, name) for name in preserve])
    matrix = torch.linalg.solve(seen + weight * torch.eye(len(seen), dtype=seen.dtype) + kept.T @ kept, change.T).T
    lora, prefix = {}, find_family(pipeline).denoiser
    for name in sources:
        down = denoiser_of(pipeline).get_submodule(name).weight.double()
        lora[f"{prefix}.{name}.lora_A.weight"], lora[f"{prefix}.{name}.lora_B.weight"] = matrix.float(), down.float()
    return lora
