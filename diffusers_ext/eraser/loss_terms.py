"""The three terms of an eraser's loss: away from the concept, true to the rest, inside the mask.

The student is the model with its erasers, the teacher the model without; both are called as
`model(x_t, t, prompt_embeds)`, see `CogVideoXVelocity`. All targets come from the teacher, without
gradient: a target from the student would let the student move the target instead of itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from diffusers_ext.eraser.masks import mask_to_latents
from diffusers_ext.eraser.teacher import VelocityModel, cached_or_predicted, velocities
from diffusers_ext.eraser.velocity_losses import (
    check_loss_type,
    localization,
    negative_velocity,
    velocity_distance,
)


LossAndParts = tuple[torch.Tensor, dict[str, torch.Tensor | int]]


class NegativelyGuidedVelocityLoss(torch.nn.Module):
    """`||v_neg - v_student(x_t, c, t)||^2`, `v_neg = v_anchor - eta (v_c - v_anchor)` of the teacher.

    T2VUnlearning (arXiv 2505.17550), after ESD (arXiv 2303.07345). The mean over all elements.

    Args:
        alphas_cumprod: `(timesteps,)` of the scheduler. The rule needs no schedule in any
            prediction space (see `negative_velocity`); given, timesteps outside are refused.
        guidance_scale: eta, at least 0.
        loss_type: `"l2"` or `"l1"`.

    Raises:
        ValueError: a negative `guidance_scale`, or another `loss_type`.
    """

    def __init__(
        self,
        alphas_cumprod: torch.Tensor | None = None,
        guidance_scale: float = 7.5,
        loss_type: str = "l2",
    ) -> None:
        super().__init__()
        if not guidance_scale >= 0:
            raise ValueError(f"`guidance_scale` must be at least 0, got {guidance_scale}.")
        check_loss_type(loss_type)
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)
        self.guidance_scale = guidance_scale
        self.loss_type = loss_type

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
        """One pass of the teacher and one of the student.

        Args:
            model_original: the teacher; unused where both teacher velocities are given.
            model_unlearned: the student.
            x_t: `(batch, frames, channels, height, width)`.
            t: `(batch,)`.
            cond_target: `(1 or batch, text, dim)` embeddings of the prompt with the concept.
            cond_neg: anchor: the prompt with the concept replaced by a neutral word.
            uncond: anchor where `cond_neg` is `None`: embeddings of the empty prompt.
            mask: `(batch, frames', rows, columns)` on the token grid; weights the difference.
            v_concept: teacher velocity under `cond_target`, made before.
            v_anchor: teacher velocity under the anchor, made before.

        Returns:
            The loss, and `unlearning_loss`, `v_pred_norm` and `v_neg_norm` for logging.

        Raises:
            ValueError: no anchor, or timesteps outside of the schedule.
        """
        anchor = choose_anchor(cond_neg, uncond, v_anchor)
        wanted = [(v_concept, (x_t, t, cond_target)), (v_anchor, (x_t, t, anchor))]
        v_concept, v_anchor = cached_or_predicted(model_original, model_unlearned, wanted)
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
        """The loss of a velocity that is there; arguments and result as in `forward`."""
        if self.alphas_cumprod is not None:
            last = len(self.alphas_cumprod) - 1
            if t.min() < 0 or t.max() > last:
                raise ValueError(
                    f"`t` must lie in 0 ... {last} like `alphas_cumprod`, got {t.tolist()}."
                )
        target = negative_velocity(v_anchor.detach(), v_concept.detach(), self.guidance_scale)
        weights = None if mask is None else mask_to_latents(mask, prediction.shape)
        loss = velocity_distance(prediction, target, self.loss_type, weights)
        return loss, {
            "unlearning_loss": loss.detach(),
            "v_pred_norm": _mean_norm(prediction),
            "v_neg_norm": _mean_norm(target),
        }


class ConceptPreservationLoss(torch.nn.Module):
    """`||v_student(x_t, c_pre, t) - v_teacher(x_t, c_pre, t)||^2` over whole clips, never masked.

    Prior preservation of T2VUnlearning (arXiv 2505.17550). The mean over all elements.

    Args:
        loss_type: `"l2"` or `"l1"`.

    Raises:
        ValueError: another `loss_type`.
    """

    def __init__(self, loss_type: str = "l2") -> None:
        super().__init__()
        check_loss_type(loss_type)
        self.loss_type = loss_type

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
        """One pass of the teacher and one of the student.

        Args:
            model_original: the teacher; unused where `v_preserve` is given.
            model_unlearned: the student.
            x_t: `(batch, frames, channels, height, width)`, best of clips of the preserved prompts.
            t: `(batch,)`.
            cond_preserve: `(1 or batch, text, dim)` embeddings of the preserved prompts.
            v_preserve: teacher velocity, made before.

        Returns:
            The loss, and `preservation_loss`, `v_orig_norm` and `v_unlearn_norm` for logging.
        """
        rows = (x_t, t, cond_preserve)
        (v_preserve,) = cached_or_predicted(model_original, model_unlearned, [(v_preserve, rows)])
        (prediction,) = velocities(model_unlearned, [rows])
        return self.compare(prediction, v_preserve)

    def compare(self, prediction: torch.Tensor, v_preserve: torch.Tensor) -> LossAndParts:
        """The loss of a velocity that is there; result as in `forward`."""
        loss = velocity_distance(prediction, v_preserve.detach(), self.loss_type)
        return loss, {
            "preservation_loss": loss.detach(),
            "v_orig_norm": _mean_norm(v_preserve),
            "v_unlearn_norm": _mean_norm(prediction),
        }


class MaskLocalizationLoss(torch.nn.Module):
    """`1/L sum_l ||o_l (1 - M)||^2`, divided by channels and background area.

    Eq. 9 of T2VUnlearning (arXiv 2505.17550) with the divisors of Receler (arXiv 2311.17717); see
    `layer_localization`.

    Args:
        loss_type: `"l2"` or `"l1"`.

    Raises:
        ValueError: another `loss_type`.
    """

    def __init__(self, loss_type: str = "l2") -> None:
        super().__init__()
        check_loss_type(loss_type)
        self.loss_type = loss_type

    def forward(
        self, eraser_outputs: Mapping[str, torch.Tensor], mask: torch.Tensor
    ) -> LossAndParts:
        """Weigh what erasers add outside of the concept.

        Args:
            eraser_outputs: `{name: (batch, video, dim)}`, see `diffusers_ext.eraser.outputs`.
            mask: `(batch, frames', rows, columns)` or `(batch, video, 1)` in [0, 1], 1 where the
                concept is.

        Returns:
            The loss, and `total_loss`, `num_layers` and `{name}/loss` for logging.

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
