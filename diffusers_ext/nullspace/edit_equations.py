"""The equations of an edit in closed form, and what they are filled with.

A Linear that reads text alone is to give for the target's tokens `k1` what it gives for the anchor's tokens `k2` in
their places, and to keep its outputs for the preserved tokens `k0`:

    min_D  E|D k1 - W (k2 - k1)|^2 + lambda E|D k0|^2 + eps tr(C1)/d |D|^2
    D = W M,  M = dC (C1 + lambda C0 + eps tr(C1)/d I)^-1,  dC = E[(k2 - k1) k1^T],  Ci = E[ki ki^T]

(the normal equations; AlphaEdit, arXiv 2410.02355, solves the same problem inside the null space of C0, which is
`hard=True`; UCE, arXiv 2308.14761, with the anchors of Stable Diffusion's cross-attention). M depends on the text
alone, so that one matrix serves all Linears that read the same tensor.

It is solved twice. A large lambda finds the directions that tell a target from what is preserved, often one an edit,
but leaves D too small; a least-squares fit at the lambda that is asked for gives it its size within them. The lambda
of the directions is the largest that lets them do most of what the plain solution does to the targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from diffusers_ext.core.restored_state import CallScope
from diffusers_ext.core.second_moment import SecondMoment, gram
from diffusers_ext.families.token_alignment import token_alignment
from diffusers_ext.nullspace.edit_prompts import EditPrompts
from diffusers_ext.nullspace.projector import null_dimensions
from diffusers_ext.nullspace.prompts import unique
from diffusers_ext.nullspace.text_only import TextReader

# Of a token's energy: two prompts nearer than this are one to the model.
_SAME = 1e-10
# Widths from which `leading_directions` looks for few directions, and how many at once.
_WIDE, _BLOCK = 512, 32
# By how much lambda is larger where directions are chosen: less takes directions that other words share.
_DIRECTION_WEIGHTS = (1000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0)
# Of the plain solution's effect; less leaves concepts that stand in several places of a prompt, such as colours.
_ENOUGH = 0.8


class TargetRows(NamedTuple):
    """The targets' tokens, scaled so that `dC = change^T read`, `C1 = read^T read`; at most as many as directions."""

    change: torch.Tensor  # (tokens, dim), k2 - k1
    read: torch.Tensor  # (tokens, dim), k1


class _Solution(NamedTuple):
    """`M` by its action: of few tokens it is never formed, `M k1 = change^T K1 A^-1 k1`."""

    factor: torch.Tensor  # L of the Cholesky factorisation A = L L^T
    half: torch.Tensor  # (dim, tokens), L^-1 K1^T
    effect: torch.Tensor  # (tokens, dim), what is added for the targets' tokens, K1 M^T

    def rows(self, change: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """`left^T M`."""
        return torch.linalg.solve_triangular(self.factor.T, self.half @ (change @ left), upper=True).T

    def gain(self, change: torch.Tensor) -> torch.Tensor:
        """`E|k2 - k1|^2 - E|M k1 - (k2 - k1)|^2`."""
        return 2 * (change * self.effect).sum() - self.effect.square().sum()


def _solution(system: torch.Tensor, change: torch.Tensor, read: torch.Tensor) -> _Solution:
    """Of `A = system`."""
    factor = _cholesky(system)
    half = torch.linalg.solve_triangular(factor, read.T, upper=False)
    return _Solution(factor, half, gram(half, half.dtype) @ change)


def _cholesky(system: torch.Tensor) -> torch.Tensor:
    """Of a symmetric matrix without negative eigenvalues, but for those of its rounding, which is added to all."""
    rounding = torch.finfo(system.dtype).eps * system.diagonal().sum()
    for times in (0, 1, 10, 100):
        factor, info = torch.linalg.cholesky_ex(_with_ridge(system, times * rounding) if times else system)
        if info == 0:
            return factor
    raise ValueError("`pipeline` must read finite numbers for its prompts, got a system of them that is not.")


def _with_ridge(matrix: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    matrix = matrix.clone()
    matrix.diagonal().add_(ridge)
    return matrix


def free_directions(c0: torch.Tensor, edits: int) -> torch.Tensor:
    """An orthonormal basis `(dim, free)` of what the preserved tokens never use, for `hard=True`.

    Raises:
        ValueError: fewer directions than edits.
    """
    values, vectors = torch.linalg.eigh(c0)
    free = null_dimensions(values, energy=0, floor=1e-12)
    if free < edits:
        raise ValueError(
            f"`preserve` must leave directions free for `hard=True`, one for each of {edits} edits, got prompts that "
            f"leave {free} of {len(c0)}. Preserve fewer, leave their sub-phrases out, or edit with `hard=False`."
        )
    return vectors[:, :free]


def leading_directions(effect: torch.Tensor, kept: float) -> tuple[torch.Tensor, float]:
    """The fewest directions that keep a share of the energy of the rows of `effect`, `(dim, rank)`, and that share."""
    dim = effect.shape[1]
    if dim >= _WIDE:
        found = _krylov_directions(effect, kept)
        if found is not None:
            return found
    energies, vectors = torch.linalg.eigh(effect.T @ effect)
    energies, vectors = energies.flip(0).clamp_min(0), vectors.flip(1)
    shares = energies.cumsum(0) / energies.sum()
    rank = min(int((shares < kept).sum()) + 1, dim)  # the last share may be rounded to below 1
    return vectors[:, :rank], shares[rank - 1].item()


def _krylov_directions(effect: torch.Tensor, kept: float) -> tuple[torch.Tensor, float] | None:
    """`leading_directions` without a whole decomposition; `None` where more than a quarter of them are needed.

    Ritz values of a Krylov space are at most the eigenvalues, so that the share they tell is never more than what is
    kept; the rank may be larger than the smallest by what they still lack.
    """
    dim, total = effect.shape[1], effect.square().sum()
    generator = torch.Generator().manual_seed(dim)
    block = torch.randn(_BLOCK, dim, dtype=effect.dtype, generator=generator).to(effect.device)
    basis, image = block[:0], block[:0]
    while len(basis) + _BLOCK <= dim // 4:
        for _ in range(2):  # once leaves what rounding brings back
            block = torch.linalg.qr((block - (block @ basis.T) @ basis).T).Q.T.contiguous()
        block, basis = block @ effect.T @ effect, torch.cat([basis, block])
        image = torch.cat([image, block])
        inner = basis @ image.T
        energies, coordinates = torch.linalg.eigh((inner + inner.T) / 2)
        shares = energies.flip(0).cumsum(0) / total
        if shares[-1] >= kept:
            rank = int((shares < kept).sum()) + 1
            return (coordinates.T.flip(0)[:rank] @ basis).T, shares[rank - 1].item()
    return None


def edit_factors(
    targets: TargetRows,
    c0: torch.Tensor,
    *,
    preserve_weight: float,
    eps: float,
    kept: float,
    hard: bool = False,
    edits: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`M = B A` in the directions that tell the targets from what is preserved, and of the size that is asked for.

    Args:
        c0: `(dim, dim)` float64.
        preserve_weight: lambda.
        kept: share of what the update does to the targets that its directions keep.
        hard: `M` is zero on all that `c0` has seen; lambda then plays no part.
        edits: how many share the directions that there are.

    Returns:
        `B`, `(dim, rank)`; `A`, `(rank, dim)`, of orthonormal rows unless `hard`; and the share that is kept.

    Raises:
        ValueError: fewer directions than edits; `hard`, and `c0` leaves fewer free.
    """
    change, read = targets
    dim = read.shape[1]
    if edits > dim:
        raise ValueError(f"`edits` must be at most as many as the text has directions, {dim}, got {edits}.")
    ridge = eps * read.square().sum() / dim
    if hard:
        basis = free_directions(c0, edits)
        seen = read @ basis
        solution = _solution(_with_ridge(gram(seen, seen.dtype), ridge), change, seen)
        left, share = leading_directions(solution.effect, kept)
        return left, solution.rows(change, left) @ basis.T, share
    c1 = gram(read, read.dtype)

    def solved(weight: float) -> _Solution:
        return _solution(_with_ridge(torch.add(c1, c0, alpha=weight), ridge), change, read)

    plain = solved(preserve_weight)
    enough = _ENOUGH * plain.gain(change)
    for weight in _DIRECTION_WEIGHTS:
        solution = plain if weight == 1 else solved(weight * preserve_weight)
        left, share = leading_directions(solution.effect, kept)
        a = torch.linalg.qr(solution.rows(change, left).T).Q.T
        read_along = read @ a.T
        inner, wanted = read_along.T @ read_along, read_along.T @ change
        b = torch.linalg.solve(_with_ridge(inner + preserve_weight * (a @ c0 @ a.T), ridge), wanted).T
        if 2 * (wanted * b.T).sum() - ((b @ inner) * b).sum() >= enough:
            break
    return b, a, share


def in_places(
    reader: TextReader, targets: Sequence[str], anchors: Sequence[str], source: str, k1: torch.Tensor
) -> torch.Tensor:
    """What is read for the anchors' prompts, each token in the place of the target's that it stands for.

    Args:
        k1: what is read for the targets, `(prompts, tokens, dim)`.
    """
    read, length = reader.all(anchors, source), k1.shape[1]
    # Texts that are as long as their prompts end in zeros, at least one of them.
    longest = max(length, read.shape[1]) + reader.varies if length > 1 else 1
    read = functional.pad(read, (0, 0, 0, longest - read.shape[1]))
    places = token_alignment(reader.pipeline, targets, anchors, longest)[:, :length].to(read.device)
    if reader.varies and length > 1:
        # Texts of whole multiples of a length repeat their last token (Z-Image); the others' end stands for theirs.
        last = read.any(-1).sum(1, keepdim=True) - 1
        places = torch.where(k1.any(-1), places.minimum(last), longest - 1)
    return read.gather(1, places[..., None].expand(-1, -1, read.shape[-1]))


def target_rows(
    denoiser: torch.nn.Module,
    reader: TextReader,
    edits: Sequence[EditPrompts],
    source: str,
    updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> tuple[TargetRows, torch.Tensor]:
    """The targets' tokens, whose moments are summed over the edits, and `E[(k2 - k1) (k2 - k1)^T]`.

    Targets are read with the updates of earlier Linears in place, so that deeper ones correct what is left.
    """
    parts: list[torch.Tensor] = []
    for edit in edits:
        with added_updates(denoiser, updates):
            k1 = reader.all(edit.targets, source)
        k2 = torch.zeros_like(k1)
        for anchors, weights in edit.anchors:
            k2 += weights.to(k1) * in_places(reader, edit.targets, anchors, source, k1)
        change, read = (k2 - k1).flatten(0, 1), k1.flatten(0, 1)
        if change.square().sum() <= _SAME * read.square().sum() and not updates:
            raise ValueError(
                f"`anchor` must be read otherwise than `target`, got {edit.edit.anchor!r} for {edit.edit.target!r}, "
                "whose tokens are the same."
            )
        # Texts that are as long as their prompts end in zeros here, which `C0` does not count either.
        count = int(read.any(1).sum()) if reader.varies else len(read)
        parts.append(torch.cat([read, change], 1) / count**0.5)
    both = torch.cat(parts)
    dim = both.shape[1] // 2
    c2 = gram(both[:, dim:], both.dtype)
    if len(both) > dim:  # a rotation of the tokens leaves all their moments, and the first ones with all that is read
        both = torch.linalg.qr(both, mode="r").R[:dim]
    return TargetRows(both[:, dim:].contiguous(), both[:, :dim].contiguous()), c2


def preserved_moment(reader: TextReader, preserved: Sequence[str], negative_prompt: str, source: str) -> torch.Tensor:
    """`C0`: half of it the preserved prompts, half the unconditional ones."""
    halves = []
    for prompts in (preserved, unique(["", negative_prompt])):
        moment = None
        for rows in reader.batches(prompts, source):
            moment = moment or SecondMoment(rows.shape[-1], rows.device, torch.float64)
            moment.update(rows)
        moment.check_finite(source)
        halves.append(moment.mean)
    return (halves[0] + halves[1]) / 2


def effect_moments(
    left: torch.Tensor, a: torch.Tensor, targets: TargetRows, c2: torch.Tensor, c0: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`E (M k1 - (k2 - k1)) (..)^T`, what an edit `M = left a` misses, and `E M k0 (M k0)^T`, what it moves."""
    # M C1 M^T - dC M^T - M dC^T + E (k2 - k1) (k2 - k1)^T
    read_along = targets.read @ a.T
    cross = (targets.change.T @ read_along) @ left.T
    missed = left @ (read_along.T @ read_along) @ left.T - cross - cross.T + c2
    return missed, left @ (a @ c0 @ a.T) @ left.T


def layer_report(
    metric: torch.Tensor, missed: torch.Tensor, moved: torch.Tensor, c2: torch.Tensor, c0: torch.Tensor
) -> dict[str, float]:
    """Of one Linear: the share of the edit that the update makes up, and its drift on what is preserved.

    Args:
        metric: `W^T W` of its weight.
        missed, moved: of `effect_moments`.
    """

    def energy(moment: torch.Tensor) -> float:
        return (metric * moment).sum().item()

    return {"achieved": 1 - energy(missed) / energy(c2), "drift": energy(moved) / energy(c0)}


def read_weight(linear: torch.nn.Module) -> torch.Tensor:
    """The weight of a Linear in float64, `(out_features, in_features)`; of a quantised one by what it computes.

    Raises:
        ValueError: it computes something that is no weight.
    """
    weight, shape = linear.weight, (linear.out_features, linear.in_features)
    plain = type(weight.data) is torch.Tensor  # no subclass that only stands for a weight
    if plain and weight.is_floating_point() and weight.shape == shape:
        return weight.double()
    dtype = getattr(linear, "compute_dtype", None) or (weight.dtype if weight.is_floating_point() else torch.float32)
    unit = torch.eye(linear.in_features, device=weight.device, dtype=dtype)
    found = (linear(unit) - linear(torch.zeros_like(unit[:1]))).double().T
    if found.shape != shape or not torch.isfinite(found).all():
        raise ValueError(
            f"`pipeline` must have Linears whose weights can be read, got a {type(linear).__name__} that computes "
            f"{tuple(found.shape)} numbers, not all of them finite, for {shape}. Edit the base in bf16: the LoRA "
            "loads into the quantised one."
        )
    return found


@contextmanager
def added_updates(
    denoiser: torch.nn.Module, updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[None]:
    """Let Linears compute `W x + B A x` in calls of this thread; no weight is touched.

    Args:
        updates: `{dotted name: (A, B)}`.
    """
    with CallScope() as scope, ExitStack() as hooks:
        for name, (a, b) in updates.items():

            def add(_: torch.nn.Module, args: tuple, output: torch.Tensor, a: Any = a, b: Any = b) -> torch.Tensor:
                return output + (args[0].to(a) @ a.T @ b.T).to(output) if scope.covers_this_call() else output

            hooks.callback(denoiser.get_submodule(name).register_forward_hook(add).remove)
        yield
