"""What an eraser is trained on: away from the concept, true to the rest, inside the mask.

Negative guidance as in ESD (Gandikota et al. 2023, arXiv 2303.07345), for video velocities as in T2VUnlearning (Ye et
al. 2025, arXiv 2505.17550); localisation as in Receler (Huang et al. 2024, arXiv 2311.17717).

The student is the model with its erasers, the teacher the model without; both are called as `model(x_t, t,
prompt_embeds)`, see `CogVideoXVelocity`. All targets come from the teacher, without gradient: a target from the
student would let the student move the target instead of itself. Shapes: `x_t` and velocities `v_...` are `(batch,
frames, channels, height, width)`, `t` is `(batch,)`, embeddings `cond_...` are `(1 or batch, text, dim)`, masks
`(batch, frames', rows, columns)` in [0, 1] on the grid of video tokens, 1 where the concept is. A velocity of the
teacher that is given was made before, and is not asked for again. A `loss_type` is `"l2"` (squares) or `"l1"`
(absolute values).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch

from diffusers_ext.eraser.adapter.outputs import eraser_outputs as capture_eraser_outputs
from diffusers_ext.eraser.concept_masks import mask_to_latents
from diffusers_ext.eraser.recipe import LOSS_TYPES
from diffusers_ext.eraser.teacher.collect import VelocityModel, cached_or_predicted, module_of, velocities

# The loss, and figures of it for logging, without gradient.
LossAndParts = tuple[torch.Tensor, dict[str, torch.Tensor | int]]


def negative_velocity(v_anchor: torch.Tensor, v_concept: torch.Tensor, eta: float) -> torch.Tensor:
    """`v_neg = v_anchor - eta (v_concept - v_anchor)`: away from the concept, past the anchor.

    Both velocities are the frozen model's at the same `x_t` and `t`, of the prompt with the concept and of the prompt
    with the concept replaced (or the empty one). At fixed `x_t` and `t` velocity, noise and `x_0` are affine in each
    other and the coefficients `1 + eta` and `-eta` add up to one, so the rule is the same in all three and needs no
    noise schedule.
    """
    _check_same_shape("v_concept", v_concept, "v_anchor", v_anchor)
    return v_anchor - eta * (v_concept - v_anchor)


def velocity_distance(
    prediction: torch.Tensor, target: torch.Tensor, loss_type: str = "l2", mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean difference of two velocities, a scalar in at least float32.

    With a mask of weights, at least 0, that broadcast to `prediction`: `sum(m d) / sum(m)`, which unlike a plain mean
    of `m d` does not depend on how large the masked region is; 0 where the mask is zero everywhere.
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
    clip and holds the eraser at zero. From what the eraser adds to the video tokens, `(batch, video, dim)`, and a mask
    that may also be `(batch, video)` or `(batch, video, 1)`, to a scalar, at least float32; samples that are all
    concept count 0.
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


class _Term(torch.nn.Module):
    """One term; `logged` names its value and the mean norms of the student's velocity and the target."""

    logged: tuple[str, str, str]

    def __init__(self, loss_type: str = "l2") -> None:
        super().__init__()
        _check_loss_type(loss_type)
        self.loss_type = loss_type

    def distance(
        self, prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        return velocity_distance(prediction, target, self.loss_type, weights)

    def compare(
        self, prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None
    ) -> LossAndParts:
        weights = None if mask is None else mask_to_latents(mask, prediction.shape)
        loss = self.distance(prediction, target.detach(), weights)
        # L2 norms of the samples, averaged over the batch.
        norms = (v.detach().flatten(1).norm(dim=1).mean() for v in (prediction, target))
        return loss, dict(zip(self.logged, (loss.detach(), *norms), strict=True))


class NegativelyGuidedVelocityLoss(_Term):
    """Mean of `||v_neg - v_student(x_t, c, t)||^2`, `v_neg = v_anchor - eta (v_c - v_anchor)` of the teacher.

    T2VUnlearning (arXiv 2505.17550), after ESD (arXiv 2303.07345).

    Args:
        alphas_cumprod: `(timesteps,)` of the scheduler. The rule needs no schedule in any prediction space (see
            `negative_velocity`); given, timesteps outside are refused.
        guidance_scale: eta, at least 0.
    """

    logged = ("unlearning_loss", "v_pred_norm", "v_neg_norm")

    def __init__(
        self, alphas_cumprod: torch.Tensor | None = None, guidance_scale: float = 7.5, loss_type: str = "l2"
    ) -> None:
        super().__init__(loss_type)
        if not guidance_scale >= 0:
            raise ValueError(f"`guidance_scale` must be at least 0, got {guidance_scale}.")
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)
        self.guidance_scale = guidance_scale

    def forward(
        self,
        model_original: VelocityModel | None,
        model_unlearned: VelocityModel,
        x_t: torch.Tensor,
        t: torch.Tensor,
        cond_target: torch.Tensor,
        cond_neg: torch.Tensor | None = None,
        uncond: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        *,
        v_concept: torch.Tensor | None = None,
        v_anchor: torch.Tensor | None = None,
    ) -> LossAndParts:
        """One pass of the teacher, one of the student; a mask weighs the difference. See `T2VUnlearningLoss`."""
        anchor = _choose_anchor(cond_neg, uncond, v_anchor)
        needed = [(v_concept, (x_t, t, cond_target)), (v_anchor, (x_t, t, anchor))]
        teacher = cached_or_predicted(model_original, model_unlearned, needed)
        (prediction,) = velocities(model_unlearned, [(x_t, t, cond_target)])
        return self.compare(prediction, self.target(t, *teacher), mask)

    def target(self, t: torch.Tensor, v_concept: torch.Tensor, v_anchor: torch.Tensor) -> torch.Tensor:
        """v_neg of the teacher's velocities; `ValueError` for timesteps outside of the schedule."""
        last = None if self.alphas_cumprod is None else len(self.alphas_cumprod) - 1
        if last is not None and (t.min() < 0 or t.max() > last):
            raise ValueError(f"`t` must lie in 0 ... {last} like `alphas_cumprod`, got {t.tolist()}.")
        return negative_velocity(v_anchor, v_concept, self.guidance_scale)


class ConceptPreservationLoss(_Term):
    """Mean of `||v_student(x_t, c_pre, t) - v_teacher(x_t, c_pre, t)||^2` over whole clips, never masked.

    T2VUnlearning (arXiv 2505.17550).
    """

    logged = ("preservation_loss", "v_unlearn_norm", "v_orig_norm")

    def forward(
        self,
        model_original: VelocityModel | None,
        model_unlearned: VelocityModel,
        x_t: torch.Tensor,
        t: torch.Tensor,
        cond_preserve: torch.Tensor,
        *,
        v_preserve: torch.Tensor | None = None,
    ) -> LossAndParts:
        """One pass of the teacher, one of the student, best at `x_t` of clips of the preserved prompts."""
        rows = (x_t, t, cond_preserve)
        (v_preserve,) = cached_or_predicted(model_original, model_unlearned, [(v_preserve, rows)])
        (prediction,) = velocities(model_unlearned, [rows])
        return self.compare(prediction, v_preserve)


class MaskLocalizationLoss(_Term):
    """`1/L sum_l ||o_l (1 - M)||^2`, divided by channels and background area; see `layer_localization`.

    Eq. 9 of T2VUnlearning (arXiv 2505.17550) with the divisors of Receler (arXiv 2311.17717).
    """

    def forward(self, eraser_outputs: Mapping[str, torch.Tensor], mask: torch.Tensor) -> LossAndParts:
        """Weigh what erasers add outside the concept, `{name: (batch, video, dim)}`; see `layer_localization`."""
        if not isinstance(eraser_outputs, Mapping):
            raise TypeError(
                f"`eraser_outputs` must be `{{name: (batch, video, dim)}}`, got a {type(eraser_outputs).__name__}. "
                "Run the transformer within `eraser_outputs(transformer) as outputs`, and give the outputs."
            )
        if not eraser_outputs:
            raise ValueError("`outputs` must hold the output of at least one eraser, got none.")
        layers = {name: self.of_layer(output, mask) for name, output in eraser_outputs.items()}
        loss = torch.stack(list(layers.values())).mean()
        parts = {f"{name}/loss": value.detach() for name, value in layers.items()}
        return loss, {"total_loss": loss.detach(), "num_layers": len(parts), **parts}

    def of_layer(self, output: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The share of one layer."""
        return layer_localization(output, mask, self.loss_type)


class T2VUnlearningLoss(torch.nn.Module):
    """`w_u L_unlearn + w_p L_pre + w_l L_loc` of T2VUnlearning (arXiv 2505.17550).

    Usage, the teacher being the same transformer with its erasers off:

        velocity = CogVideoXVelocity.from_pipeline(pipeline, num_frames, height, width)
        loss, parts = T2VUnlearningLoss(guidance_scale=1.0)(
            velocity, velocity, x_t, t, cond_target, cond_preserve, cond_neg=anchor
        )

    Args:
        alphas_cumprod, guidance_scale: see `NegativelyGuidedVelocityLoss`.
        unlearning_weight, preservation_weight, localization_weight: a term of weight 0 is not computed.
        mask_unlearning: weigh L_unlearn by the mask as well; the paper does not.
    """

    def __init__(
        self,
        alphas_cumprod: torch.Tensor | None = None,
        unlearning_weight: float = 1.0,
        preservation_weight: float = 0.5,
        localization_weight: float = 1.0,
        guidance_scale: float = 7.5,
        loss_type: str = "l2",
        *,
        mask_unlearning: bool = False,
    ) -> None:
        super().__init__()
        self.weights = {
            "unlearning": unlearning_weight,
            "preservation": preservation_weight,
            "localization": localization_weight,
        }
        for name, weight in self.weights.items():
            if not weight >= 0:
                raise ValueError(f"`{name}_weight` must be at least 0, got {weight}.")
        self.unlearning = NegativelyGuidedVelocityLoss(alphas_cumprod, guidance_scale, loss_type)
        self.preservation = ConceptPreservationLoss(loss_type)
        self.localization = MaskLocalizationLoss(loss_type)
        self.mask_unlearning = mask_unlearning

    def forward(
        self,
        model_original: VelocityModel | None,
        model_unlearned: VelocityModel,
        x_t: torch.Tensor,
        t: torch.Tensor,
        cond_target: torch.Tensor,
        cond_preserve: torch.Tensor | None = None,
        cond_neg: torch.Tensor | None = None,
        uncond: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        eraser_outputs: Mapping[str, torch.Tensor] | None = None,
        *,
        x_preserve: torch.Tensor | None = None,
        t_preserve: torch.Tensor | None = None,
        v_concept: torch.Tensor | None = None,
        v_anchor: torch.Tensor | None = None,
        v_preserve: torch.Tensor | None = None,
    ) -> LossAndParts:
        """Compute what the arguments allow: without `cond_preserve` no L_pre, without `mask` no L_loc.

        Args:
            model_original: the teacher, frozen; may be the student itself, whose erasers are then off. `None` where
                all its velocities are given.
            cond_neg: anchor: the prompt with the concept replaced by a neutral word.
            uncond: anchor where `cond_neg` is `None`: embeddings of the empty prompt.
            eraser_outputs: `{name: (batch, video, dim)}` with gradient; taken from the student's pass unless given.
            x_preserve, t_preserve: of preserved prompts; `x_t` and `t` unless given.

        Returns:
            The total, and for logging: `total_loss`; `{term}_loss_weighted`; and `{term}/{figure}` with the figures
            that each term's class logs.
        """
        if mask is None and (eraser_outputs is not None or self.mask_unlearning):
            raise ValueError("`mask` must be given with `eraser_outputs` and under `mask_unlearning`, got None.")
        target = (x_t, t, cond_target)
        needed, student_rows = [], [target]
        if self.weights["unlearning"]:
            anchor = _choose_anchor(cond_neg, uncond, v_anchor)
            needed += [(v_concept, target), (v_anchor, (x_t, t, anchor))]
        preserves = cond_preserve is not None and self.weights["preservation"]
        if preserves:
            x_pre = x_t if x_preserve is None else x_preserve
            preserved = (x_pre, t if t_preserve is None else t_preserve, cond_preserve)
            needed.append((v_preserve, preserved))
            student_rows.append(preserved)
        teacher = cached_or_predicted(model_original, model_unlearned, needed)
        localizes = mask is not None and self.weights["localization"]
        captures = localizes and eraser_outputs is None
        capture = capture_eraser_outputs(module_of(model_unlearned)) if captures else nullcontext()
        with capture as captured:
            predictions = velocities(model_unlearned, student_rows)
        terms = {}
        if self.weights["unlearning"]:
            v_neg = self.unlearning.target(t, *teacher[:2])
            region = mask if self.mask_unlearning else None
            terms["unlearning"] = self.unlearning.compare(predictions[0], v_neg, region)
        if preserves:
            terms["preservation"] = self.preservation.compare(predictions[1], teacher[-1])
        if localizes:
            if captures:
                eraser_outputs = {name: output[: len(x_t)] for name, output in captured.items()}
            terms["localization"] = self.localization(eraser_outputs, mask)
        return self._logged_sum(terms)

    def weighted_sum(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The total of the terms that are there."""
        return sum(self.weights[name] * loss for name, loss in terms.items())

    def _logged_sum(self, terms: Mapping[str, LossAndParts]) -> LossAndParts:
        if not terms:
            raise ValueError(
                "`T2VUnlearningLoss` must be given what a term of positive weight needs, got no such term."
            )
        total = self.weighted_sum({name: loss for name, (loss, _) in terms.items()})
        logged: dict[str, torch.Tensor | int] = {"total_loss": total.detach()}
        for name, (loss, _) in terms.items():
            logged[f"{name}_loss_weighted"] = self.weights[name] * loss.detach()
        for term, (_, parts) in terms.items():
            logged |= {f"{term}/{name}": value for name, value in parts.items()}
        return total, logged


def _choose_anchor(
    cond_neg: torch.Tensor | None, uncond: torch.Tensor | None, v_anchor: torch.Tensor | None
) -> torch.Tensor | None:
    """The embeddings that the guidance starts from; `ValueError` where nothing can serve."""
    if cond_neg is None and uncond is None and v_anchor is None:
        raise ValueError(
            "`cond_neg` or `uncond` must be given as the anchor of the guidance, got neither. "
            "The embeddings of the empty prompt always serve as `uncond`."
        )
    return cond_neg if cond_neg is not None else uncond


def _check_loss_type(loss_type: str) -> None:
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"`loss_type` must be 'l2' or 'l1', got {loss_type!r}.")


def _penalty(difference: torch.Tensor, loss_type: str) -> torch.Tensor:
    _check_loss_type(loss_type)
    return difference.square() if loss_type == "l2" else difference.abs()


def _check_same_shape(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(
            f"`{name}` must have the shape of `{other_name}`, {tuple(other.shape)}, got {tuple(tensor.shape)}."
        )
