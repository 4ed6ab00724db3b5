"""SAFREE (Yoon et al. 2024, arXiv 2410.12761): tokens that carry a concept, projected out of the prompt.

Columns of C are pooled texts of the concept, of I pooled texts of the prompt with one token masked, p_i. `P_X`
projects on the columns' span. A token carries the concept if without it the prompt is far from the concept,

    d_i = |(I - P_C) p_i|,   d_i > (1 + alpha) mean of all other d,

and is then replaced by `(I - P_C) P_I p`, in the order of the published code. The replacement is used in the first
`t' = gamma sigmoid(1 - cos(p, p'))` steps of 50, gamma 10, and in as large a share of other runs.

T5 has no pooled output; the mean over a text's tokens takes its place. Left out: re-attention to the latents, which
filters a UNet's skip connections; there are none in these models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline

from benchmarks.baselines.guarded_calls import GuardedCalls
from diffusers_ext.families import match_family

_PUBLISHED_STEPS = 50


def span_projection(rows: torch.Tensor) -> torch.Tensor:
    """`P`, `(width, width)`, on the span of rows `(n, width)`."""
    return rows.T @ torch.linalg.pinv(rows @ rows.T, hermitian=True) @ rows


def carries_concept(masked: torch.Tensor, onto_concept: torch.Tensor, alpha: float) -> torch.Tensor:
    """Which tokens do, `(n,)` bool, from the pooled texts `(n, width)` without each of them."""
    far = (masked - masked @ onto_concept).norm(dim=1)
    others = (far.sum() - far) / (len(far) - 1)
    return far > (1 + alpha) * others


def projected(tokens: torch.Tensor, masked: torch.Tensor, onto_concept: torch.Tensor) -> torch.Tensor:
    """`(I - P_C) P_I p` of tokens `(n, width)`."""
    inside = tokens @ span_projection(masked)
    return inside - inside @ onto_concept


def filtered_share(tokens: torch.Tensor, replaced: torch.Tensor, gamma: float = 10.0) -> float:
    """`t'` as a share of the published number of steps."""
    likeness = torch.nn.functional.cosine_similarity(tokens.flatten(), replaced.flatten(), dim=0)
    return gamma * torch.sigmoid(1 - likeness).item() / _PUBLISHED_STEPS


@torch.no_grad()
def pooled_without_each(pipeline: DiffusionPipeline, prompt: str, length: int) -> torch.Tensor:
    """Pooled texts `(tokens, width)` of a prompt in each of which one token is padding."""
    family, padding = match_family(pipeline), pipeline.tokenizer.pad_token_id
    ids = torch.tensor(family.token_ids(pipeline, prompt)[0][:length])
    count = len(ids) - 1  # all but the end of the text
    rows = torch.full((count, length), padding)
    rows[:, : len(ids)] = ids
    rows[torch.arange(count), torch.arange(count)] = padding
    # CogVideoX's T5 also reads padding; Wan's does not.
    masks = {} if family.name == "cogvideox" else {"attention_mask": (rows != padding).long()}
    encoded = pipeline.text_encoder(rows, **masks)[0].double()
    kept = (rows[:, : len(ids)] != padding).double()[..., None]
    return (encoded[:, : len(ids)] * kept).sum(1) / kept.sum(1)


class Safree(GuardedCalls):
    """SAFREE on a video pipeline.

    Args:
        every_step: the replacement in all steps of a run, which is more than the paper does.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, concept: str, *, alpha: float = 0.01, every_step: bool = False, **sizes: int
    ) -> None:
        super().__init__(pipeline, concept, **sizes)
        self.alpha, self.every_step = alpha, every_step
        tokens = match_family(pipeline).token_ids(pipeline, concept)[0]
        self._onto_concept = span_projection(self.of_concept[0, : len(tokens)].double().mean(0, keepdim=True))
        self._replaced, self._num_steps = self.empty[:0], torch.zeros(0, dtype=torch.long)

    def share_of_run(self, tokens: torch.Tensor, replaced: torch.Tensor) -> float:
        """Of the steps with the replacement."""
        return 1.0 if self.every_step else filtered_share(tokens, replaced)

    def learn(self, prompts: Sequence[str], embeds: torch.Tensor, real: torch.Tensor) -> None:
        """Replacements, and how long they are used."""
        for prompt, tokens, count in zip(prompts, embeds, real.sum(1).tolist()):
            masked = pooled_without_each(self.pipeline, prompt, self.length)
            carrying = carries_concept(masked, self._onto_concept, self.alpha).nonzero()[:, 0]
            replaced = tokens.clone()
            found = projected(tokens[carrying].double(), masked, self._onto_concept)
            replaced[carrying] = found.to(tokens)
            steps = round(self.share_of_run(tokens[:count], replaced[:count]) * len(self.timesteps))
            self._replaced = torch.cat([self._replaced, replaced[None]])
            self._num_steps = torch.cat([self._num_steps, torch.tensor([steps])])

    def text(self, text: torch.Tensor, prompts: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Tokens behind the prompt's own stay as they are."""
        changed = (steps < self._num_steps[prompts])[:, None] & self._real[prompts]
        own = changed.shape[1]
        filtered = torch.where(changed[..., None], self._replaced[prompts].to(text), text[:, :own])
        return torch.cat([filtered, text[:, own:]], dim=1)
