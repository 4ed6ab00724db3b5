"""The whole loss that trains an eraser, in one pass of the teacher and one of the student."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch

from diffusers_ext.eraser.loss_terms import (
    ConceptPreservationLoss,
    LossAndParts,
    MaskLocalizationLoss,
    NegativelyGuidedVelocityLoss,
    choose_anchor,
)
from diffusers_ext.eraser.outputs import eraser_outputs as capture_eraser_outputs
from diffusers_ext.eraser.teacher import VelocityModel, cached_or_predicted, module_of, velocities


class T2VUnlearningLoss(torch.nn.Module):
    """`w_u L_unlearn + w_p L_pre + w_l L_loc` of T2VUnlearning (arXiv 2505.17550).

    Usage, the teacher being the same transformer with its erasers off:

        velocity = find_family(pipeline, "eraser").velocity(pipeline, num_frames, height, width)
        loss, parts = T2VUnlearningLoss(guidance_scale=1.0)(
            velocity, velocity, x_t, t, cond_target, cond_preserve, cond_neg=anchor
        )

    Args:
        alphas_cumprod: see `NegativelyGuidedVelocityLoss`.
        unlearning_weight, preservation_weight, localization_weight: at least 0. A term of weight 0
            is not computed.
        guidance_scale: eta of the negative guidance, at least 0.
        loss_type: `"l2"` or `"l1"`, of all terms.
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
            model_original: the teacher, frozen; may be the student itself, whose erasers are then
                off. `None` where all its velocities are given.
            model_unlearned: the student, the only one with gradient.
            x_t: `(batch, frames, channels, height, width)` of the target prompts.
            t: `(batch,)`.
            cond_target, cond_preserve: `(1 or batch, text, dim)` embeddings of the prompt with the
                concept, and of what must stay.
            cond_neg: anchor: the prompt with the concept replaced by a neutral word.
            uncond: anchor where `cond_neg` is `None`: embeddings of the empty prompt.
            mask: `(batch, frames', rows, columns)` in [0, 1] on the token grid, 1 where the
                concept is.
            eraser_outputs: `{name: (batch, video, dim)}` with gradient; taken from the student's
                pass unless given.
            x_preserve, t_preserve: of preserved prompts; `x_t` and `t` unless given.
            v_concept, v_anchor, v_preserve: teacher velocities, made before.

        Returns:
            The total, and for logging: `total_loss`; `{term}_loss_weighted`; and
            `{term}/{figure}` with the figures that each term's class logs.

        Raises:
            ValueError: no anchor, no teacher for an unknown velocity, or tensors that do not fit.
        """
        if mask is None and (eraser_outputs is not None or self.mask_unlearning):
            raise ValueError(
                "`mask` must be given with `eraser_outputs` and under `mask_unlearning`, got None."
            )
        target = (x_t, t, cond_target)
        needed, student_rows = [], [target]
        if self.weights["unlearning"]:
            anchor = choose_anchor(cond_neg, uncond, v_anchor)
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
            region = mask if self.mask_unlearning else None
            terms["unlearning"] = self.unlearning.compare(predictions[0], t, *teacher[:2], region)
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
                "`T2VUnlearningLoss` must be given what a term of positive weight needs, got no "
                "such term."
            )
        total = self.weighted_sum({name: loss for name, (loss, _) in terms.items()})
        logged: dict[str, torch.Tensor | int] = {"total_loss": total.detach()}
        for name, (loss, _) in terms.items():
            logged[f"{name}_loss_weighted"] = self.weights[name] * loss.detach()
        for term, (_, parts) in terms.items():
            logged |= {f"{term}/{name}": value for name, value in parts.items()}
        return total, logged
