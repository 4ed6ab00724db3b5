"""White-box attack on an eraser: learned text embeddings that try to bring the concept back.

After the adversarial prompt learning of Receler (Huang et al. 2024, arXiv 2311.17717, section 3.3) and UnlearnDiffAtk
(Zhang et al. 2024, arXiv 2310.11868). `lora_finetuning` is the other way back, by training on other clips.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import mean
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast, gather, reduce
from diffusers import DiffusionPipeline
from torch.nn import functional
from tqdm.auto import tqdm

from diffusers_ext.core.restored_state import module_eval_mode
from diffusers_ext.core.seeds import spread_rows
from diffusers_ext.eraser.adapter.outputs import eraser_layers, erasers_disabled
from diffusers_ext.eraser.batch import Rows, encode_video_prompts
from diffusers_ext.eraser.losses import velocity_distance
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.families import find_family
from diffusers_ext.families.family import Velocity
from diffusers_ext.families.text_conditioning import Text, TextConditioning, token_embeds


class RevivalEmbeddings(NamedTuple):
    """Learned embeddings `(num_embeddings, text_dim)` float32 and the loss of each step."""

    embeddings: torch.Tensor
    losses: list[float]


def learn_revival_embeddings(
    velocity: Velocity,
    x_t: torch.Tensor,
    t: torch.Tensor,
    prompt_embeds: Text,
    *,
    v_concept: torch.Tensor | None = None,
    num_embeddings: int = 16,
    steps: int = 300,
    learning_rate: float = 0.1,
    batch_size: int = 4,
    seed: int = 0,
    restarts: int = 1,
    shared: bool = False,
) -> RevivalEmbeddings:
    """Embeddings `e` that make the erased model answer target prompts as the model before did.

    `min_e mean ||v_erased(x_t, [c; e], t) - v_before(x_t, c, t)||^2` over the points given, by Adam. One set of
    embeddings serves all prompts. They start at random with the mean and spread of `prompt_embeds`, and the learning
    rate is in units of that spread. The model is run in eval mode; its parameters, gradients and modes stay as they
    are, and so does torch's random state.

    Args:
        velocity: of the transformer with its erasers as they are to be attacked.
        x_t, t, prompt_embeds: points, best from sampling the model before with the target prompts.
        v_concept: velocities of the model before under these prompts; asked from the transformer with its erasers off
            unless given.
        num_embeddings: how many to learn; Receler takes 16.
        restarts: of the whole search, from further seeds; the one with the least loss over its last tenth is given.
        shared: against the points of all processes, each of which gives as many and is asked about its own.
    """
    if v_concept is None and not eraser_layers(velocity.model):
        raise ValueError(
            f"`velocity` must be of a model with an eraser, got a {type(velocity.model).__name__} without one."
        )
    for name, tensor in (("t", t), ("prompt_embeds", prompt_embeds), ("v_concept", v_concept)):
        if tensor is not None and len(tensor) != len(x_t):
            raise ValueError(f"`{name}` must have one row per point of `x_t`, {len(x_t)}, got {len(tensor)}.")
    if not len(x_t):
        raise ValueError("`x_t` must hold at least one point, got none.")
    for name, value in (("num_embeddings", num_embeddings), ("steps", steps), ("restarts", restarts)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    points = (x_t, t, prompt_embeds, v_concept)
    size = (num_embeddings, steps, learning_rate, batch_size)
    found = [_search(velocity, points, *size, seed + restart, shared) for restart in range(restarts)]
    return min(found, key=lambda one: mean(one.losses[-max(1, steps // 10) :]))


def _search(
    velocity: Velocity,
    points: tuple[torch.Tensor, torch.Tensor, Text, torch.Tensor | None],
    num_embeddings: int,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    shared: bool,
) -> RevivalEmbeddings:
    """One run of `learn_revival_embeddings`."""
    x_t, t, prompt_embeds, v_concept = points
    generator = torch.Generator().manual_seed(seed)
    text = prompt_embeds.to(x_t.device, torch.float32)
    centre, spread = _centre_and_spread(text, velocity.config, shared)
    start = torch.randn(num_embeddings, len(centre), generator=generator)
    offsets = start.to(centre.device).requires_grad_()
    optimizer = torch.optim.Adam([offsets], lr=learning_rate)
    losses = []
    with module_eval_mode(*velocity.models):
        for _ in tqdm(range(steps), desc="learn embeddings"):
            chosen = torch.randperm(len(x_t), generator=generator)[:batch_size].to(x_t.device)
            states = (x_t[chosen], t[chosen])
            if v_concept is not None:
                target = v_concept[chosen.to(v_concept.device)].to(x_t.device, torch.float32)
            else:
                with torch.no_grad(), erasers_disabled(*velocity.models):
                    target = velocity(*states, text[chosen])
            with torch.enable_grad():
                revived = insert_embeddings(text[chosen], centre + spread * offsets, velocity.config)
                loss = velocity_distance(velocity(*states, revived), target)
            # Not `backward`: erasers that are trainable must not collect gradients.
            found = (*torch.autograd.grad(loss, [offsets]), loss.detach())
            offsets.grad, loss = (reduce(part, "mean") for part in found) if shared else found
            optimizer.step()
            losses.append(loss.item())
    return RevivalEmbeddings((centre + spread * offsets).detach(), losses)


def _centre_and_spread(text: Text, config: Mapping[str, Any], shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `(text_dim,)` and deviation of the tokens that are read, `shared` of those of all processes."""
    values = token_embeds(text).detach()
    apart = isinstance(text, TextConditioning) or _pads_with_zeros(config)
    read = read_tokens(text) if apart else None
    if shared:
        values = gather(values)
        read = None if read is None else gather(read)
    if read is None:
        return values.mean(dim=(0, 1)), values.std()
    return values[read].mean(dim=0), values[read].std()


def insert_embeddings(prompt_embeds: Text, embeddings: torch.Tensor, config: Mapping[str, Any]) -> Text:
    """Prompts `(batch, text, text_dim)` with embeddings `(n, text_dim)` after them, or over their last tokens.

    CogVideoX gives text tokens no positions, so their order means nothing and rotary models take any number; models
    with absolute positions (by `config`, the transformer's) take exactly their own, the last being padding unless a
    prompt fills them. Models whose padding is zeros, as Wan's, read them right after each prompt, in its place, and
    are given more tokens where that is too short: cross-attention reads any number. So are models whose text has a
    mask. Pooled text stays that of the prompt.
    """
    if isinstance(prompt_embeds, TextConditioning):
        return _insert_read(prompt_embeds, embeddings)
    text, width = prompt_embeds.shape[1:]
    if embeddings.ndim != 2 or embeddings.shape[1] != width:
        raise ValueError(f"`embeddings` must be (num_embeddings, {width}), got {tuple(embeddings.shape)}.")
    added = embeddings.to(prompt_embeds).expand(len(prompt_embeds), -1, -1)
    if takes_any_text_length(config):
        return torch.cat([prompt_embeds, added], dim=1)
    if _pads_with_zeros(config):
        places = read_tokens(prompt_embeds).sum(1)[:, None] + torch.arange(len(embeddings), device=added.device)
        longer = functional.pad(prompt_embeds, (0, 0, 0, max(0, int(places.max()) + 1 - text)))
        return longer.scatter(1, places[..., None].expand_as(added), added)
    if len(embeddings) >= text:
        raise ValueError(
            f"`embeddings` must be fewer than the {text} text tokens of this model, which has "
            f"absolute positions, got {len(embeddings)}."
        )
    return torch.cat([prompt_embeds[:, : text - len(embeddings)], added], dim=1)


def _insert_read(text: TextConditioning, embeddings: torch.Tensor) -> TextConditioning:
    """Right after the last token of each prompt that its mask, if there is one, lets be read."""
    found, mask = text.tensors(), read_tokens(text)
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
    places = last[:, None] + 1 + torch.arange(len(embeddings), device=mask.device)
    more = max(0, int(places.max()) + 1 - mask.shape[1])
    added = embeddings.to(text.prompt_embeds).expand(len(text), -1, -1)
    longer = functional.pad(text.prompt_embeds, (0, 0, 0, more))
    found["prompt_embeds"] = longer.scatter(1, places[..., None].expand_as(added), added)
    if text.attention_mask is not None:
        found["attention_mask"] = functional.pad(text.attention_mask, (0, more)).scatter(1, places, 1)
    return TextConditioning(**found)


def takes_any_text_length(config: Mapping[str, Any]) -> bool:
    """Whether a transformer takes more text tokens than it was made for: if only rotary."""
    rotary = config.get("use_rotary_positional_embeddings", False)
    return rotary and not config["use_learned_positional_embeddings"]


def _pads_with_zeros(config: Mapping[str, Any]) -> bool:
    # CogVideoX alone reads its encoder's embeddings of padding.
    return "use_rotary_positional_embeddings" not in config


def read_tokens(prompt_embeds: Text) -> torch.Tensor:
    """Which tokens of prompts `(batch, text, text_dim)` are no padding, of zeros or masked, `(batch, text)` bool."""
    if isinstance(prompt_embeds, torch.Tensor):
        return prompt_embeds.ne(0).any(dim=2)
    if prompt_embeds.attention_mask is not None:
        return prompt_embeds.attention_mask.bool()
    tokens = prompt_embeds.prompt_embeds
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


@contextmanager
def revived_prompts(pipeline: DiffusionPipeline, embeddings: torch.Tensor) -> Iterator[None]:
    """Let a CogVideoX pipeline put embeddings `(num_embeddings, text_dim)` into every prompt.

    Negative prompts, of the same length by the pipeline's rule, repeat their last token instead. On leaving, also
    after an exception, the pipeline encodes prompts as before.
    """
    encode, had_own = pipeline.encode_prompt, vars(pipeline).get("encode_prompt")
    config = pipeline.transformer.config

    def encode_prompt(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        prompt_embeds, negative_embeds = encode(*args, **kwargs)
        if negative_embeds is not None and takes_any_text_length(config):
            last = negative_embeds[:, -1:].expand(-1, len(embeddings), -1)
            negative_embeds = torch.cat([negative_embeds, last], dim=1)
        return insert_embeddings(prompt_embeds, embeddings, config), negative_embeds

    try:
        pipeline.encode_prompt = encode_prompt
        yield
    finally:
        del pipeline.encode_prompt
        if had_own is not None:
            pipeline.encode_prompt = had_own


def revived_call(
    pipeline: DiffusionPipeline, prompts: Sequence[str], embeddings: torch.Tensor, negative_prompt: str | None = None
) -> dict[str, Any]:
    """Arguments of a pipeline's call for prompts with embeddings `(num_embeddings, text_dim)` in them, of any family.

    Negative prompts, where the call wants them of the same length, repeat their last token instead.
    """
    family = find_family(pipeline, "eraser")
    model = getattr(pipeline, family.denoiser)
    device, config = pipeline._execution_device, model.config
    encoded = (encode_video_prompts(pipeline, texts) for texts in (prompts, [negative_prompt or ""] * len(prompts)))
    text, negative = (one.to(device, model.dtype) for one in encoded)
    text = insert_embeddings(text, embeddings.to(device), config)
    masked = isinstance(text, TextConditioning) and text.attention_mask is not None
    # Wan asks about one after the other.
    if not masked and (family.draws_pictures or takes_any_text_length(config)):
        negative = _as_long(negative, text)
    return family.clip_arguments(text, negative)


def _as_long(text: Text, other: Text) -> Text:
    """A text that repeats its last token until it is as long as another."""
    tokens = token_embeds(text)
    more = tokens[:, -1:].expand(-1, token_embeds(other).shape[1] - tokens.shape[1], -1)
    longer = torch.cat([tokens, more], dim=1)
    return (
        longer if isinstance(text, torch.Tensor) else TextConditioning(**{**text.tensors(), "prompt_embeds": longer})
    )


class AdversarialPrompts:
    """Attacks the eraser every `adversarial_every` steps and keeps the latest embeddings.

    As Receler's adversarial prompt learning, but the attack is made seldom and used often: its 50 passes before every
    step are out of reach for video models. The velocity is of the model that trains, not prepared by accelerate.
    """

    def __init__(self, velocity: Velocity, recipe: EraserTraining) -> None:
        self.velocity, self.recipe = velocity, recipe
        self._calls = 0
        self._sets: list[torch.Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"calls": self._calls, "sets": [embeds.cpu() for embeds in self._sets]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        device = self.velocity.model.device
        self._calls, self._sets = state["calls"], [embeds.to(device) for embeds in state["sets"]]

    def prompts(self, rows: Rows, generator: torch.Generator) -> torch.Tensor | None:
        """Prompts of the first target rows with embeddings of one attack; `None` before the first."""
        # The eraser has to do something before it can be attacked, so the first interval has none.
        seed, drawn = torch.randint(2**31, (2,), generator=generator).tolist()
        if self._calls and self._calls % self.recipe.adversarial_every == 0:
            self._attack(rows, seed)
        self._calls += 1
        count = self._count(rows)
        if not self._sets or not count:
            return None
        embeds = self._sets[drawn % len(self._sets)]
        return insert_embeddings(rows.prompt_embeds[:count], embeds, self.velocity.config)

    def first(self, rows: Rows, num_on_policy: int) -> Rows:
        """The rows with those first that get other prompts: of the `num_on_policy` first ones, then of the others.

        They are spread over each of these, so that of several processes each has its part.
        """
        others = rows.num_target - num_on_policy
        count = self._count(rows)
        of_policy = min(count, num_on_policy)
        chosen = spread_rows(of_policy, num_on_policy)
        return rows.with_first(chosen + [num_on_policy + row for row in spread_rows(count - of_policy, others)])

    def _count(self, rows: Rows) -> int:
        return round(self.recipe.adversarial_share * rows.num_target)

    def _attack(self, rows: Rows, seed: int) -> None:
        chosen = slice(None, rows.num_target)
        found = learn_revival_embeddings(
            self.velocity,
            rows.x_t[chosen],
            rows.t[chosen],
            rows.prompt_embeds[chosen],
            v_concept=rows.teacher_velocity,
            num_embeddings=self.recipe.num_adversarial_embeddings,
            steps=self.recipe.adversarial_steps,
            batch_size=rows.num_target,
            seed=seed,
            shared=True,
        )
        self._sets.append(broadcast(found.embeddings))  # checkpoints hold the first process's
        del self._sets[: -self.recipe.num_adversarial_sets]
