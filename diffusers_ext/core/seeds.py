"""Seeds of unrelated streams of random numbers: each depends on what it is for, and on nothing that ran before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler


def check_diffusion_levels(scheduler: Any, name: str = "scheduler") -> None:
    """Raise `ValueError` for a scheduler whose noise levels are not those of its `alphas_cumprod`.

    From the configuration of an EDM, consistency or flow-matching model diffusers would make default levels silently.
    """
    levels = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(levels, torch.Tensor) and not scheduler.config.get("use_flow_sigmas"):
        return
    kind = type(scheduler).__name__
    found = f"a {kind} without it" if levels is None else f"a {kind} with `use_flow_sigmas`"
    raise ValueError(
        f"`{name}` must have the noise levels of `alphas_cumprod`, got {found}. Put a DDIMScheduler of the "
        "model's own configuration there; a model that was made for this kind of scheduler (EDM, "
        "flow matching) is not supported here."
    )


def check_flow_levels(scheduler: Any, name: str = "scheduler") -> None:
    """Raise `ValueError` for a scheduler that takes no velocities `noise - x_0` of flow matching."""
    config = scheduler.config
    straight = getattr(scheduler, "alphas_cumprod", None) is None or config.get("use_flow_sigmas")
    kind = config.get("prediction_type", "flow_prediction")
    if not straight or kind != "flow_prediction":
        raise ValueError(
            f"`{name}` must have the levels of flow matching and the prediction type 'flow_prediction', got {kind!r} "
            f"in a {type(scheduler).__name__}. Use the scheduler that comes with the model."
        )


def training_schedule(scheduler: Any) -> DDPMScheduler:
    """The noise schedule that a model under this scheduler was trained with, for further training."""
    check_prediction_type(scheduler)
    # Left in, it would make values that this class took by default the other class's defaults.
    config = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
    schedule = DDPMScheduler.from_config(config)
    levels, own = schedule.alphas_cumprod.double(), scheduler.alphas_cumprod.double().cpu()
    # Schedulers that divide by a level of zero write a tiny number in its place.
    if levels.shape != own.shape or not torch.allclose(levels, own, atol=1e-6, rtol=1e-4):
        raise ValueError(
            f"`scheduler` must have the noise levels that its configuration names, got a {type(scheduler).__name__} "
            "with others. Put a DDPMScheduler of the model's own configuration there."
        )
    return schedule


def check_prediction_type(scheduler: Any) -> None:
    """Raise `ValueError` unless a model under this scheduler predicts noise or velocity at known levels."""
    kind = scheduler.config.get("prediction_type")
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"`prediction_type` of the scheduler must be 'epsilon' or 'v_prediction', got {kind!r}.")
    check_diffusion_levels(scheduler)


def check_min_snr(schedule: DDPMScheduler, snr_gamma: float | None) -> None:
    """Raise `ValueError` where Min-SNR weights (arXiv 2303.09556) would divide by zero."""
    levels = schedule.alphas_cumprod
    noise_alone = schedule.config.prediction_type == "epsilon" and bool((levels <= 0).any())
    if snr_gamma is not None and (noise_alone or bool((levels >= 1).any())):
        raise ValueError(
            f"`snr_gamma` must be None for a scheduler with a timestep of noise alone "
            f"(`rescale_betas_zero_snr`) whose model predicts noise, got {snr_gamma}: the weight "
            "min(SNR, gamma) / SNR would be 0 / 0 there. Leave it out."
        )


_MICRO_STEP_STREAM, _EPOCH_STREAM = 1, 2


def stream_seed(seed: int, *names: str | int) -> int:
    """Seed of what the names tell, 63 bits; other names, or another `seed`, give an unrelated one."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stream_generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator that starts from `stream_seed`."""
    return torch.Generator().manual_seed(stream_seed(seed, *names))


def step_seed(seed: int, stream: int, index: int) -> int:
    """A 63-bit seed for one purpose (`stream`) at one `index` of a run; SplitMix64 keeps neighbours unrelated."""
    mixed = (seed * 0x9E3779B97F4A7C15 + stream * 0xBF58476D1CE4E5B9 + index) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return (mixed ^ (mixed >> 31)) >> 1


class StepGenerator(torch.Generator):
    """A CPU generator that is the same in all processes, and knows which of them, `(index, count)`, draws."""

    process: tuple[int, int] = (0, 1)


def step_generator(seed: int, micro_step: int, process: tuple[int, int] = (0, 1)) -> StepGenerator:
    """The generator of one micro-step: noise and timesteps drawn from it do not depend on what ran before.

    What differs from row to row is drawn by `draw_rows`, so that several processes train on what one would.
    """
    generator = StepGenerator()
    generator.manual_seed(step_seed(seed, _MICRO_STEP_STREAM, micro_step))
    generator.process = process
    return generator


def draw_rows(draw: Callable[..., torch.Tensor], shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """This process's rows of what `draw(shape, generator=generator)` gives for the batch of all processes.

    `shape` is that of this process's rows, which all processes have as many of. With a plain generator they are all.
    """
    index, count = getattr(generator, "process", (0, 1))
    rows = shape[0]
    return draw((rows * count, *shape[1:]), generator=generator)[index * rows : (index + 1) * rows]


def spread_rows(count: int, rows: int) -> list[int]:
    """Indices of `count` of some rows, spread evenly: of a part of the rows the part's own."""
    return [row for row in range(rows) if (row + 1) * count // rows > row * count // rows]


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The CPU generator of one epoch's order, the same in all processes."""
    return torch.Generator().manual_seed(step_seed(seed, _EPOCH_STREAM, epoch))
