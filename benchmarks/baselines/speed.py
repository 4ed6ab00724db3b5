"""SPEED (Li et al. 2025, arXiv 2503.07392): concepts erased inside the null space of what is to stay.

Columns of `C1` and `C*` are tokens of targets and anchors, of `C0` tokens of retained concepts, and of `C2` what no
edit may move: the start token and the empty prompt, which every picture reads.

    min_D  |(W + D P) C1 - W C*|^2 + |D P|^2   subject to   D P C2 = 0
    D P = W (C* - C1) C1^T P Q M,   M = (C1 C1^T P + I)^-1,   Q = I - M C2 (C2^T P M C2)^-1 C2^T P

P projects on the null space of `C0 C0^T` (eigenvalues below 0.1). `C0` is refined first: influence-based prior
filtering keeps the concepts that an edit without constraints would move more than the mean, and directed prior
augmentation adds copies of them with noise along the direction that W reads least. As in the paper, values alone are
edited and names stand without templates. The tokens are those of `unified_concept_edit`, from a name's last word to
the end of the text, because the digits' text encoder writes the concept into the padding, too. Left out: a second
filtering of the copies, and the paper's lists of names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import StableDiffusionPipeline

from benchmarks.baselines.uce import concept_tokens
from diffusers_ext.nullspace.text_only import denoiser_arguments, text_only_linears

_FREE = 0.1


def null_space(retained: torch.Tensor, threshold: float = _FREE) -> torch.Tensor:
    """`P`, `(dim, dim)`, on the directions in which the rows of `retained` have less energy than `threshold`."""
    values, vectors = torch.linalg.eigh(retained.T @ retained)
    free = vectors[:, values < threshold]
    return free @ free.T


def unconstrained_shift(
    weight: torch.Tensor, c1: torch.Tensor, anchors: torch.Tensor, c0: torch.Tensor
) -> torch.Tensor:
    """`|D c|^2` of every row of `c0` for the `D` that edits and preserves nothing."""
    inverse = torch.linalg.inv(c1.T @ c1 + torch.eye(c1.shape[1], dtype=c1.dtype))
    return (c0 @ (weight @ (anchors - c1).T @ c1 @ inverse).T).square().sum(-1)


def augmented(weight: torch.Tensor, rows: torch.Tensor, copies: int, generator: torch.Generator) -> torch.Tensor:
    """The rows and `copies` of each, with normal noise along the input that `weight` reads least."""
    least = torch.linalg.eigh(weight.T @ weight).eigenvectors[:, :1]
    noise = torch.randn(copies * len(rows), rows.shape[1], generator=generator, dtype=rows.dtype)
    return torch.cat([rows, rows.repeat(copies, 1) + noise @ least @ least.T])


def null_space_update(
    weight: torch.Tensor, c1: torch.Tensor, anchors: torch.Tensor, projection: torch.Tensor, c2: torch.Tensor
) -> torch.Tensor:
    """`D P` of the module's equations, from rows of tokens."""
    unit = torch.eye(c1.shape[1], dtype=c1.dtype)
    m = torch.linalg.inv(c1.T @ c1 @ projection + unit)
    seen = c2 @ projection  # C2^T P
    q = unit - m @ c2.T @ torch.linalg.pinv(seen @ m @ c2.T, rtol=1e-9) @ seen
    return weight @ (anchors - c1).T @ c1 @ projection @ q @ m


@torch.no_grad()
def speed(
    pipeline: StableDiffusionPipeline,
    edits: Mapping[str, str],
    retain: Sequence[str],
    *,
    projections: Sequence[str] = ("to_v",),
    copies: int = 10,
    threshold: float = _FREE,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """The edit of a UNet's V as a LoRA of full rank, keys as in `read_lora`.

    Args:
        retain: names of concepts, from which those that an edit would move are chosen.
        copies: of each, by directed augmentation.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = [(concept_tokens(pipeline, target), concept_tokens(pipeline, anchor)) for target, anchor in edits.items()]
    lengths = [min(len(old), len(new)) for old, new in pairs]
    c1 = torch.cat([old[:length] for (old, _), length in zip(pairs, lengths)])
    anchors = torch.cat([new[:length] for (_, new), length in zip(pairs, lengths)])
    names = [concept_tokens(pipeline, name) for name in retain]
    c2 = denoiser_arguments(pipeline, [""])["encoder_hidden_states"][0].double()
    lora = {}
    for name in text_only_linears(pipeline):
        if not name.endswith(tuple(projections)):
            continue
        weight = pipeline.unet.get_submodule(name).weight.double()
        shifts = torch.stack([unconstrained_shift(weight, c1, anchors, rows).mean() for rows in names])
        moved = torch.cat([rows for rows, shift in zip(names, shifts) if shift > shifts.mean()])
        c0 = augmented(weight, moved, copies, generator)
        update = null_space_update(weight, c1, anchors, null_space(c0, threshold), c2)
        lora[f"unet.{name}.lora_A.weight"] = torch.eye(update.shape[1])
        lora[f"unet.{name}.lora_B.weight"] = update.float()
    return lora
