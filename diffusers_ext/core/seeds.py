"""Seeds of unrelated streams of random numbers: each depends on what it is for, and on nothing that ran before."""

from __future__ import annotations

import hashlib

import torch

_MICRO_STEP_STREAM, _EPOCH_STREAM = 1, 2


def stream_seed(seed: int, *names: str | int) -> int:
    """Seed of what the names tell, 63 bits; other names, or another `seed`, give an unrelated one."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stream_generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator that starts from `stream_seed`."""
    return torch.Generator().manual_seed(stream_seed(seed, *names))


def step_seed(seed: int, stream: int, index: int, process_index: int = 0) -> int:
    """A 63-bit seed for one purpose (`stream`) at one `index` of a run; SplitMix64 keeps neighbours unrelated."""
    mixed = (
        seed * 0x9E3779B97F4A7C15 + stream * 0xBF58476D1CE4E5B9 + process_index * 0xD6E8FEB86659FD93 + index
    ) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return (mixed ^ (mixed >> 31)) >> 1


def step_generator(seed: int, micro_step: int, process_index: int = 0) -> torch.Generator:
    """The CPU generator of one micro-step: noise and timesteps drawn from it do not depend on what ran before."""
    return torch.Generator().manual_seed(step_seed(seed, _MICRO_STEP_STREAM, micro_step, process_index))


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The CPU generator of one epoch's order, the same in all processes."""
    return torch.Generator().manual_seed(step_seed(seed, _EPOCH_STREAM, epoch))
