"""The eraser's training objective as pure functions of tensors.

Negative guidance as in ESD (Gandikota et al. 2023, arXiv 2303.07345), for video velocities as in T2VUnlearning (Ye et
al. 2025, arXiv 2505.17550); localisation as in Receler (Huang et al. 2024, arXiv 2311.17717). A `loss_type` is `"l2"`
(squares) or `"l1"` (absolute values).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

LOSS_TYPES = ("l2", "l1")


def negative_velocity(v_anchor: torch.Tensor, v_concept: torch.Tensor, eta: float) -> torch.Tensor:
    """`v_neg = v_anchor - eta (v_concept - v_anchor)`: away from the concept, past the anchor.

    Both velocities are the frozen model's at the same `x_t` and `t`, of the prompt with the concept and of the prompt
    with the concept replaced (or the empty one). At fixed `x_t` and `t` velocity, noise and `x_0` are affine in each
    other and the coefficients `1 + eta` and `-eta` add up to one, so the rule is the same in all three and needs no
    noise schedule.

    Raises:
        ValueError: shapes that differ.
    """
    _check_same_shape("v_concept", v_concept, "v_anchor", v_anchor)
    return v_anchor - eta * (v_concept - v_anchor)


def velocity_distance(
    prediction: torch.Tensor, target: torch.Tensor, loss_type: str = "l2", mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean difference of two velocities, a scalar in at least float32.

    With a mask of weights, at least 0, that broadcast to `prediction`: `sum(m d) / sum(m)`, which unlike a plain mean
    of `m d` does not depend on how large the masked region is; 0 where the mask is zero everywhere.

    Raises:
        ValueError: shapes that do not fit, or another `loss_type`.
    """
    _check_same_shape("prediction", prediction, "target", target)
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    elements = _penalty(prediction.to(dtype) - target.to(dtype), loss_type)
    if mask is None:
        return elements.mean()
    try:
        weights = mask.to(dtype).expand_as(elements)
    except RuntimeError as error:
        raise ValueError(f"`mask` must broadcast to {tuple(elements.shape)}, got {tuple(mask.shape)}.") from error
    area = weights.sum()
    return (weights * elements).sum() / torch.where(area > 0, area, 1)


def layer_localization(output: torch.Tensor, mask: torch.Tensor, loss_type: str = "l2") -> torch.Tensor:
    """What one eraser adds outside the concept's region, per channel and per background token.

    `L = mean over samples of sum_v |o_v (1 - M_v)|^2 / (dim sum_v (1 - M_v))`, with `|.|` instead of its square for
    l1. Without the two divisors (channels and background area, Receler's `concept_reg.py`) the term grows with the
    clip and holds the eraser at zero.

    Args:
        output: `(batch, video, dim)`, what the eraser adds to the video tokens.
        mask: `(batch, video)`, `(batch, video, 1)` or `(batch, frames, rows, columns)` on the grid of video tokens, in
            [0, 1]: 1 where the concept is.

    Returns:
        A scalar, at least float32; samples that are all concept count 0.

    Raises:
        ValueError: a mask of other tokens, or another `loss_type`.
    """
    if mask.shape[0] != output.shape[0] or mask[0].numel() != output.shape[1]:
        raise ValueError(
            f"`mask` must have one value for each of {output.shape[1]} video tokens of "
            f"{output.shape[0]} samples, got {tuple(mask.shape)}."
        )
    dtype = torch.promote_types(output.dtype, torch.float32)
    # Video tokens run frame by frame, row by row, as the mask's axes do.
    background = 1 - mask.to(dtype).reshape(*output.shape[:2])
    tokens = _penalty(output.to(dtype) * background.unsqueeze(-1), loss_type).mean(dim=2)
    area = background.sum(dim=1)
    return (tokens.sum(dim=1) / torch.where(area > 0, area, 1)).mean()


def localization(outputs: Mapping[str, torch.Tensor], mask: torch.Tensor, loss_type: str = "l2") -> torch.Tensor:
    """Mean over layers `{name: (batch, video, dim)}` of `layer_localization`: eq. 9, normalised."""
    if not outputs:
        raise ValueError("`outputs` must hold the output of at least one eraser, got none.")
    layers = [layer_localization(output, mask, loss_type) for output in outputs.values()]
    return torch.stack(layers).mean()


def check_loss_type(loss_type: str) -> None:
    """Raise `ValueError` unless `loss_type` is `"l2"` or `"l1"`."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"`loss_type` must be 'l2' or 'l1', got {loss_type!r}.")


def _penalty(difference: torch.Tensor, loss_type: str) -> torch.Tensor:
    check_loss_type(loss_type)
    return difference.square() if loss_type == "l2" else difference.abs()


def _check_same_shape(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(
            f"`{name}` must have the shape of `{other_name}`, {tuple(other.shape)}, got {tuple(tensor.shape)}."
        )
