"""CLIPScore: how well a picture fits its prompt to a CLIP model that saw no preferences."""

from __future__ import annotations

import torch

from diffusers_ext.rewards.clip_reward import ProcessorReward


class CLIPScoreReward(ProcessorReward):
    """`max(100 * cos(text, image), 0)`, between 0 and 100.

    The scale is that of torchmetrics and of diffusers' evaluation guide. The paper (Hessel et
    al., arXiv 2104.08718) has the factor 2.5 and puts "A photo depicts" before each caption;
    neither is done here. Numbers compare only within one CLIP model, which is the `version`:
    the last part of its repository or folder, unless another is given.
    """

    name = "clip_score"
    default_model = "openai/clip-vit-large-patch14"

    def _from_cosines(self, cosines: torch.Tensor) -> torch.Tensor:
        return (100.0 * cosines).clamp(min=0.0)
