"""The three terms of an eraser's loss: away from the concept, true to the rest, inside the mask.

The student is the model with its erasers, the teacher the model without; both are called as
`model(x_t, t, prompt_embeds)`, see `CogVideoXVelocity`. All targets come from the teacher, without
gradient: a target from the student would let the student move the target instead of itself.
Shapes: `x_t` and velocities `v_...` are `(batch, frames, channels, height, width)`, `t` is
`(batch,)`, embeddings `cond_...` are `(1 or batch, text, dim)`, masks `(batch, frames', rows,
columns)` in [0, 1] on the grid of video tokens, 1 where the concept is. A velocity of the teacher
that is given was made before, and is not asked for again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from diffusers_ext.eraser.masks import mask_to_latents
from diffusers_ext.eraser.teacher import VelocityModel, cached_or_predicted, velocities
from diffusers_ext.eraser.velocity_losses import (
    check_loss_type,
    layer_localization,
    localization,
    negative_velocity,
    velocity_distance,
)


# The loss, and figures of it for logging, without gradient.
LossAndParts = tuple[torch.Tensor, dict[str, torch.Tensor | int]]


class _Loss(torch.nn.Module):
    def __init__(self, loss_type: str = "l2") -> None:
        super().__init__()
        check_loss_type(loss_type)
        self.loss_type = loss_type

    def distance(
        self, prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `velocity_distance`."""
        return velocity_distance(prediction, target, self.loss_type, weights)


class NegativelyGuidedVelocityLoss(_Loss):
    """`||v_neg - v_student(x_t, c, t)||^2`, `v_neg = v_anchor - eta (v_c - v_anchor)` of the teacher.

    T2VUnlearning (arXiv 2505.17550), after ESD (arXiv 2303.07345). The mean over all elements.

    Args:
        alphas_cumprod: `(timesteps,)` of the scheduler. The rule needs no schedule in any
            prediction space (see `negative_velocity`); given, timesteps outside are refused.
        guidance_scale: eta, at least 0.
        loss_type: `"l2"` or `"l1"`.
    """

    def __init__(
        self,
        alphas_cumprod: torch.Tensor | None = None,
        guidance_scale: float = 7.5,
        loss_type: str = "l2",
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
        """One pass of the teacher, one of the student; arguments as in `T2VUnlearningLoss.forward`.

        A mask weighs the difference. Logs `unlearning_loss`, `v_pred_norm` and `v_neg_norm`.

        Raises:
            ValueError: no anchor, or timesteps outside of the schedule.
        """
        anchor = choose_anchor(cond_neg, uncond, v_anchor)
        needed = [(v_concept, (x_t, t, cond_target)), (v_anchor, (x_t, t, anchor))]
        v_concept, v_anchor = cached_or_predicted(model_original, model_unlearned, needed)
        (prediction,) = velocities(model_unlearned, [(x_t, t, cond_target)])
        return self.compare(prediction, t, v_concept, v_anchor, mask)

    def compare(
        self,
        prediction: torch.Tensor,
        t: torch.Tensor,
        v_concept: torch.Tensor,
        v_anchor: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> LossAndParts:
        """The loss of a velocity that is there; result as of `forward`."""
        if self.alphas_cumprod is not None:
            last = len(self.alphas_cumprod) - 1
            if t.min() < 0 or t.max() > last:
                raise ValueError(
                    f"`t` must lie in 0 ... {last} like `alphas_cumprod`, got {t.tolist()}."
                )
        target = self.target(v_concept, v_anchor)
        weights = None if mask is None else mask_to_latents(mask, prediction.shape)
        loss = self.distance(prediction, target, weights)
        return loss, {
            "unlearning_loss": loss.detach(),
            "v_pred_norm": _mean_norm(prediction),
            "v_neg_norm": _mean_norm(target),
        }

    def target(self, v_concept: torch.Tensor, v_anchor: torch.Tensor) -> torch.Tensor:
        """v_neg, without gradient."""
        return negative_velocity(v_anchor.detach(), v_concept.detach(), self.guidance_scale)


class ConceptPreservationLoss(_Loss):
    """`||v_student(x_t, c_pre, t) - v_teacher(x_t, c_pre, t)||^2` over whole clips, never masked.

    T2VUnlearning (arXiv 2505.17550). The mean over all elements.

    Args:
        loss_type: `"l2"` or `"l1"`.
    """

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
        """One pass of the teacher and one of the student, best at `x_t` of clips of the preserved prompts.

        Logs `preservation_loss`, `v_orig_norm` and `v_unlearn_norm`.
        """
        rows = (x_t, t, cond_preserve)
        (v_preserve,) = cached_or_predicted(model_original, model_unlearned, [(v_preserve, rows)])
        (prediction,) = velocities(model_unlearned, [rows])
        return self.compare(prediction, v_preserve)

    def compare(self, prediction: torch.Tensor, v_preserve: torch.Tensor) -> LossAndParts:
        """The loss of a velocity that is there; result as of `forward`."""
        loss = self.distance(prediction, v_preserve.detach())
        return loss, {
            "preservation_loss": loss.detach(),
            "v_orig_norm": _mean_norm(v_preserve),
            "v_unlearn_norm": _mean_norm(prediction),
        }


class MaskLocalizationLoss(_Loss):
    """`1/L sum_l ||o_l (1 - M)||^2`, divided by channels and background area.

    Eq. 9 of T2VUnlearning (arXiv 2505.17550) with the divisors of Receler (arXiv 2311.17717); see
    `layer_localization`.

    Args:
        loss_type: `"l2"` or `"l1"`.
    """

    def forward(
        self, eraser_outputs: Mapping[str, torch.Tensor], mask: torch.Tensor
    ) -> LossAndParts:
        """Weigh what erasers add, `{name: (batch, video, dim)}` of `eraser_outputs`, outside of the concept.

        The mask may also be `(batch, video, 1)`. Logs `total_loss`, `num_layers` and `{name}/loss`.

        Raises:
            ValueError: no outputs, or a mask of other tokens.
        """
        if not isinstance(eraser_outputs, Mapping):
            raise TypeError(
                "`eraser_outputs` must be `{name: (batch, video, dim)}`, got a "
                f"{type(eraser_outputs).__name__}. Run the transformer within "
                "`eraser_outputs(transformer) as outputs`, and give the outputs."
            )
        loss = localization(eraser_outputs, mask, self.loss_type)
        with torch.no_grad():
            parts = {
                f"{name}/loss": localization({name: output}, mask, self.loss_type)
                for name, output in eraser_outputs.items()
            }
        return loss, {"total_loss": loss.detach(), "num_layers": len(parts), **parts}

    def of_layer(self, output: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The share of one layer; see `layer_localization`."""
        return layer_localization(output, mask, self.loss_type)


def choose_anchor(
    cond_neg: torch.Tensor | None, uncond: torch.Tensor | None, v_anchor: torch.Tensor | None
) -> torch.Tensor | None:
    """The embeddings that the guidance starts from; `ValueError` where nothing can serve."""
    if cond_neg is None and uncond is None and v_anchor is None:
        raise ValueError(
            "`cond_neg` or `uncond` must be given as the anchor of the guidance, got neither. "
            "The embeddings of the empty prompt always serve as `uncond`."
        )
    return cond_neg if cond_neg is not None else uncond


def _mean_norm(velocity: torch.Tensor) -> torch.Tensor:
    """L2 norm of a sample's velocity, averaged over the batch."""
    return velocity.detach().flatten(1).norm(dim=1).mean()
