"""Attacks on erasers: ways in which a user may bring the concept back, each beside the clips of the model before.

Learned embeddings: Receler (Huang et al. 2024, arXiv 2311.17717) and UnlearnDiffAtk (Zhang et al. 2024, arXiv
2310.11868). Half-noised clips, as of SDEdit (Meng et al. 2022, arXiv 2108.01073): from them an erased model need not
draw the concept, only keep it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext.core.pictures import check_first_frames, model_pixels, read_first_frames
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.core.seeds import stream_seed
from diffusers_ext.eraser.adapter.outputs import erasers_disabled
from diffusers_ext.eraser.attack import learn_revival_embeddings, revived_call
from diffusers_ext.eraser.batch import encode_video_prompts
from diffusers_ext.eraser.fit import erased_models
from diffusers_ext.eraser.lora_finetuning import FinetunedLora, finetune_lora
from diffusers_ext.evaluation.erasure_report import ATTACK
from diffusers_ext.evaluation.rendering import clip_call
from diffusers_ext.evaluation.settings import ATTACKS, PROMPT_FILE, AttackSettings, ErasureSettings
from diffusers_ext.families import find_family
from diffusers_ext.families.family import Family, Velocity, import_class

if TYPE_CHECKING:
    from diffusers_ext.evaluation.erasure import ClipShot

NEVER_COVERED = (
    "searches over words (their embeddings are free here, which is the stronger attack)",
    "training on clips of the concept itself, and of all weights",
    "taking the eraser out, which whoever holds the weights can do",
)
Call = Mapping[str, Any]  # arguments of the pipeline's call; those that are `None` are not given


class Attack:
    """What the erased side of the target's clips is drawn under; the base's stays as it is."""

    kind: ClassVar[str] = ""  # as `--attacks` has it
    group: str = ATTACK  # of the attacked clips in the report
    scale: float = 1.0  # of the erasers, times that of the evaluation

    watches_runs: ClassVar[bool] = False  # of the pipeline, step by step
    one_denoiser: ClassVar[bool] = False  # is all that it attacks

    @classmethod
    def check_family(cls, family: Family, pipeline_class: type, num_denoisers: int) -> None:
        """Raise `ValueError` where models of a family and pipeline cannot be attacked so."""
        shown = family.reports_steps and "callback_on_step_end" in signature(pipeline_class.__call__).parameters
        if cls.watches_runs and not shown:
            raise ValueError(
                f"`attacks` must not hold {cls.kind} for {family.title}, whose pipeline shows no steps of its runs."
            )
        if cls.one_denoiser and num_denoisers > 1:
            raise ValueError(
                f"`attacks` must not hold {cls.kind} for {family.title} with {num_denoisers} transformers, got both."
            )

    def check(self, pipeline: DiffusionPipeline) -> None:
        """The same for a pipeline."""
        family = find_family(pipeline, "eraser")
        self.check_family(family, type(pipeline), len(family.expert_timesteps(pipeline)))

    def prepare(self, pipeline: DiffusionPipeline, groups: Mapping[str, Sequence[str]], call: Call) -> None:
        """Learn what there is to learn against erasers that are on, once, before clips are drawn."""

    @contextmanager
    def active(self, pipeline: DiffusionPipeline, shots: Sequence[ClipShot], call: Call) -> Iterator[dict[str, Any]]:
        """The pipeline under attack, for these clips; gives further arguments of its call."""
        yield {}

    def facts(self) -> dict[str, Any]:
        """What a report says of it."""
        return {}


NO_ATTACK = Attack()


@dataclass
class LoweredScale(Attack):
    """The erasers at a part of their strength."""

    kind = "scale"
    scale: float

    @property
    def group(self) -> str:
        """With the scale in it."""
        return f"{ATTACK}scale {self.scale:g}"


@dataclass
class NoiseRestart(Attack):
    """Each clip starts from the base's own clip of its prompt and seed, noised to a share of the denoising.

    The states of the first part of the run are those of the noised clip, at each step with the same noise; then the
    erased model goes on alone.
    """

    kind, watches_runs = "noise_restart", True
    strength: float = 0.5  # share of the steps that are left to the erased model

    @property
    def group(self) -> str:
        """With the strength in it."""
        return f"{ATTACK}noise restart {self.strength:g}"

    @contextmanager
    def active(self, pipeline: DiffusionPipeline, shots: Sequence[ClipShot], call: Call) -> Iterator[dict[str, Any]]:
        """See `Attack`."""
        prompts, seeds = [shot.prompt for shot in shots], [shot.seed for shot in shots]
        clean = base_run(pipeline, prompts, seeds, call)[0][-1]
        noises = [torch.Generator().manual_seed(stream_seed(seed, "noise restart")) for seed in seeds]
        noise = torch.stack([torch.randn(clean.shape[1:], generator=one) for one in noises]).to(clean)

        def put_back(pipe: DiffusionPipeline, step: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
            times = pipe.scheduler.timesteps
            if step + 1 > min(len(times) - 1, round((1 - self.strength) * len(times))):
                return {}
            return {"latents": _noised(pipe.scheduler, clean, noise, times[step + 1]).to(values["latents"])}

        yield {"callback_on_step_end": put_back}


@dataclass
class LearnedEmbeddings(Attack):
    """Embeddings behind every prompt that were learned to bring the base's velocities back."""

    kind, watches_runs = "learned_embeddings", True
    num_embeddings: int = 16
    steps: int = 300
    restarts: int = 1
    batch_size: int = 4
    num_clips: int = 16  # whose states they are learned on
    seed: int = 0
    embeddings: torch.Tensor | None = field(default=None, init=False, repr=False)
    losses: list[float] = field(default_factory=list, init=False, repr=False)

    @property
    def group(self) -> str:
        """With the number in it."""
        return f"{ATTACK}{self.num_embeddings} learned embeddings"

    def prepare(self, pipeline: DiffusionPipeline, groups: Mapping[str, Sequence[str]], call: Call) -> None:
        """See `Attack`."""
        prompts = _spread(groups["target"], self.num_clips)
        seeds = [stream_seed(self.seed, "attack", index) for index in range(len(prompts))]
        states, times = base_run(pipeline, prompts, seeds, call)
        generator = torch.Generator().manual_seed(self.seed)
        # Pipelines do not show the noise they begin with.
        sigma = getattr(pipeline.scheduler, "init_noise_sigma", 1.0)  # flow matching begins with unit noise
        first = torch.randn(states[0].shape, generator=generator).to(states[0]) * sigma
        read = as_read(pipeline.scheduler, [first, *states[:-1]], times)
        velocity = clip_velocity(pipeline, call, seeds)
        x_t = model_latents(pipeline, torch.cat(read), call).float()
        rows = [row for _ in times for row in range(len(prompts))]
        found = learn_revival_embeddings(
            velocity,
            velocity.with_image(x_t, rows),
            times.repeat_interleave(len(prompts)).to(x_t.device),
            encode_video_prompts(pipeline, prompts).to(x_t.device)[rows],
            num_embeddings=self.num_embeddings,
            steps=self.steps,
            restarts=self.restarts,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        self.embeddings, self.losses = found

    @contextmanager
    def active(self, pipeline: DiffusionPipeline, shots: Sequence[ClipShot], call: Call) -> Iterator[dict[str, Any]]:
        """See `Attack`."""
        prompts = [shot.prompt for shot in shots]
        given = revived_call(pipeline, prompts, self.embeddings, call.get("negative_prompt"))
        yield {"negative_prompt": None, **given}

    def facts(self) -> dict[str, Any]:
        """See `Attack`."""
        return {"first_loss": self.losses[0], "last_loss": self.losses[-1]}


@dataclass
class OtherFinetuning(Attack):
    """A LoRA trained for a few steps on the base's clips of preserved prompts, on top of the erasers."""

    kind, watches_runs, one_denoiser = "finetune", True, True
    steps: int = 100
    num_clips: int = 32
    batch_size: int = 4
    learning_rate: float = 1e-3
    seed: int = 0
    lora: FinetunedLora | None = field(default=None, init=False, repr=False)

    @property
    def group(self) -> str:
        """With the steps in it."""
        return f"{ATTACK}{self.steps} LoRA steps on other clips"

    def prepare(self, pipeline: DiffusionPipeline, groups: Mapping[str, Sequence[str]], call: Call) -> None:
        """See `Attack`."""
        prompts = _spread(groups["preserved"], self.num_clips)
        seeds = [stream_seed(self.seed, "attack", index) for index in range(len(prompts))]
        latents = []
        for start in range(0, len(prompts), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            latents.append(base_run(pipeline, prompts[chosen], seeds[chosen], call)[0][-1])
        clean = model_latents(pipeline, torch.cat(latents), call)
        self.lora = finetune_lora(
            clip_velocity(pipeline, call, seeds),
            pipeline.scheduler,
            clean,
            encode_video_prompts(pipeline, prompts).to(clean.device),
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=self.seed,
        )

    @contextmanager
    def active(self, pipeline: DiffusionPipeline, shots: Sequence[ClipShot], call: Call) -> Iterator[dict[str, Any]]:
        """See `Attack`."""
        with self.lora:
            yield {}

    def facts(self) -> dict[str, Any]:
        """See `Attack`."""
        return {"first_loss": self.lora.losses[0], "last_loss": self.lora.losses[-1]}


def make_attacks(settings: AttackSettings, seed: int) -> list[Attack]:
    """The attacks that are no prompts."""
    found: list[Attack] = []
    for kind in settings.attacks:
        if kind == "learned_embeddings":
            found.append(
                LearnedEmbeddings(
                    settings.num_attack_embeddings,
                    settings.attack_steps,
                    settings.attack_restarts,
                    settings.attack_batch_size,
                    settings.num_attack_clips,
                    seed,
                )
            )
        elif kind == "finetune":
            sizes = (settings.finetuning_steps, settings.num_attack_clips, settings.attack_batch_size)
            found.append(OtherFinetuning(*sizes, seed=seed))
        elif kind == "noise_restart":
            found += map(NoiseRestart, settings.restart_strength)
        elif kind == "scale":
            found += map(LoweredScale, settings.attack_scale)
    return found


def check_base(settings: ErasureSettings, components: Mapping[str, Any]) -> None:
    """Raise `ValueError` for what a base model cannot do, by its `model_index.json`, before its weights are read."""
    name = components["_class_name"]
    family = find_family(name, "eraser")
    check_first_frames(settings.first_frames_dir, name == family.image_pipeline, needed=True)
    several = components.get("transformer_2", (None, None))[0] is not None
    for attack in make_attacks(settings, settings.seed):
        attack.check_family(family, import_class(name), 1 + several)


def read_frames(settings: ErasureSettings, pipeline: DiffusionPipeline) -> list[Image.Image] | None:
    """The pictures of `first_frames_dir` in the size of the clips; `None` without it."""
    if settings.first_frames_dir is None:
        return None
    return read_first_frames(settings.first_frames_dir, *clip_size(pipeline, vars(settings))[1:])


def not_covered(settings: AttackSettings) -> list[str]:
    """What the attacks of a run say nothing about."""
    missing = [kind for kind in (*ATTACKS, PROMPT_FILE) if not any(one.startswith(kind) for one in settings.attacks)]
    return [f"not asked for: {', '.join(one.rstrip(':') for one in missing)}"] * bool(missing) + list(NEVER_COVERED)


def _spread(prompts: Sequence[str], count: int) -> list[str]:
    """`count` of the prompts, evenly chosen; repeated where there are fewer."""
    return [prompts[index * len(prompts) // count] for index in range(count)]


def clip_velocity(pipeline: DiffusionPipeline, call: Call, seeds: Sequence[int] = ()) -> Velocity:
    """The velocity of a pipeline's model for the clips of a call, with the first frames and the guidance of these."""
    family, size, conditions = find_family(pipeline, "eraser"), clip_size(pipeline, call), {}
    model = getattr(pipeline, family.denoiser)
    if family.embedded_guidance(model.config) and call.get("guidance_scale") is not None:
        conditions["guidance_scale"] = call["guidance_scale"]
    pictures = clip_call(pipeline, [""] * len(seeds), seeds, call).get("image")
    if pictures:
        shape = family.latent_shape(model.config, pipeline.vae.config, *size)
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        conditions["image_latents"] = family.image_latents(pipeline, model_pixels(pictures), shape, generators)
    return family.velocity(pipeline, *size, **conditions)


def model_latents(pipeline: DiffusionPipeline, latents: torch.Tensor, call: Call) -> torch.Tensor:
    """Latents of a run of the pipeline as its velocity takes them, `(clips, frames, channels, height, width)`."""
    family = find_family(pipeline, "eraser")
    configs = (getattr(pipeline, family.denoiser).config, pipeline.vae.config)
    return family.clip_latents(latents, family.latent_shape(*configs, *clip_size(pipeline, call)))


def as_read(scheduler: Any, states: Sequence[torch.Tensor], times: torch.Tensor) -> list[torch.Tensor]:
    """Latents of a run as the model reads them before its steps: some samplers keep them at another scale."""
    if not hasattr(scheduler, "scale_model_input"):
        return list(states)
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(len(times), device=times.device)
    # Each by a copy: samplers count the steps that they are asked about.
    return [copy.deepcopy(scheduler).scale_model_input(x, t) for x, t in zip(states, times, strict=True)]


def clip_size(pipeline: DiffusionPipeline, call: Call) -> tuple[int, ...]:
    """Frames, height and width: those of a call, or the model's own."""
    family = find_family(pipeline, "eraser")
    own = family.clip_size(getattr(pipeline, family.denoiser).config, pipeline.vae.config)
    names = ("num_frames", "height", "width")
    return tuple(call[name] if call.get(name) is not None else value for name, value in zip(names, own, strict=True))


@torch.no_grad()
def base_run(
    pipeline: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], call: Call
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Latents after each step of runs without erasers, the finished clips last, and the steps' timesteps."""
    passed: list[torch.Tensor] = []

    def keep(_: Any, __: int, ___: Any, values: dict[str, Any]) -> dict[str, Any]:
        passed.append(values["latents"])
        return {}

    with quiet_run(pipeline), erasers_disabled(*erased_models(pipeline).values()):
        pipeline(
            generator=[torch.Generator().manual_seed(int(seed)) for seed in seeds],
            callback_on_step_end=keep,
            output_type="latent",
            **clip_call(pipeline, prompts, seeds, call),
        )
        times = pipeline.scheduler.timesteps
    return passed, times


def _noised(scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A clip at a timestep of the scheduler, by its own rule."""
    times = t.to(clean.device).expand(len(clean))
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(clean, noise, times)
    return scheduler.scale_noise(clean, times, noise)  # of flow matching
