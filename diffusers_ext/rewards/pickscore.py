"""PickScore: the preferences of people who used a text-to-image application."""

from __future__ import annotations

import torch

from diffusers_ext.rewards.clip_reward import ProcessorReward


class PickScoreReward(ProcessorReward):
    """`exp(logit_scale) * cos(text, image)`, the scale trained with the model (arXiv 2305.01569).

    Scores of one prompt's pictures compare; their softmax is the probability that people pick
    each. Scores of different prompts do not.
    """

    name = "pickscore"
    default_model = "yuvalkirstain/PickScore_v1"
    default_processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    default_version = "v1"

    def _from_cosines(self, cosines: torch.Tensor) -> torch.Tensor:
        scale = self.model.logit_scale.detach().float().exp()
        return cosines * scale.to(cosines.device)
