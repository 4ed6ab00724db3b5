"""What a run takes: memory by part and by phase, disk, and time, with what was assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from diffusers_ext.planning.plan_table import plan_text


GIB = 2**30


class PhasePlan(NamedTuple):
    """One phase of a run."""

    name: str
    peak: int  # bytes on the device, everything that is there included
    seconds: float | None  # `None` where no device is known


@dataclass(frozen=True)
class RunPlan:
    """What a run of a tool takes, before it is run.

    Sizes are bytes, times are seconds of one device.

    Attributes:
        tool: `"nullspace"`, `"golden-noise"` or `"eraser"`.
        model: name or folder of the base model.
        setting: of the run, defaults filled in.
        parts: memory by what takes it.
        phases: in the order in which they are run.
        disk: by what takes it; what is kept on disk or in the host's memory, as the run is told, too.
        download: of the base model; 0 for a folder.
        device: what the time is for, and `memory`, if it is known, the memory that it has.
        memory: bytes of the device; `None` where none was named.
        reserve: bytes of it that the run cannot have: context of the device, fragmentation.
        assumptions: what was taken for granted, sentence by sentence.
    """

    tool: str
    model: str
    setting: Mapping[str, Any]
    parts: Mapping[str, int]
    phases: tuple[PhasePlan, ...]
    disk: Mapping[str, int]
    download: int
    device: str | None = None
    memory: int | None = None
    reserve: int = GIB
    assumptions: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Memory of the worst phase."""
        return max(phase.peak for phase in self.phases)

    @property
    def worst_phase(self) -> str:
        """Name of the phase with the highest peak."""
        return max(self.phases, key=lambda phase: phase.peak).name

    @property
    def disk_total(self) -> int:
        """Everything that the run writes; the download is not in it."""
        return sum(self.disk.values())

    @property
    def seconds(self) -> float | None:
        """Of all phases; `None` where no device is known."""
        known = [phase.seconds for phase in self.phases]
        return None if None in known else sum(known)

    @property
    def fits(self) -> bool | None:
        """Whether the device's memory suffices; `None` where it is not known."""
        return None if self.memory is None else self.peak + self.reserve <= self.memory

    @property
    def missing(self) -> int:
        """Bytes that the device has too few; 0 where the run fits or no memory is known."""
        return 0 if self.memory is None else max(0, self.peak + self.reserve - self.memory)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {
            "tool": self.tool,
            "model": self.model,
            "setting": {name: _plain(value) for name, value in self.setting.items()},
            "device": self.device,
            "memory": self.memory,
            "reserve": self.reserve,
            "fits": self.fits,
            "missing": self.missing,
            "peak": self.peak,
            "worst_phase": self.worst_phase,
            "parts": dict(self.parts),
            "phases": [phase._asdict() for phase in self.phases],
            "seconds": self.seconds,
            "disk": dict(self.disk),
            "disk_total": self.disk_total,
            "download": self.download,
            "assumptions": list(self.assumptions),
        }

    def table(self) -> str:
        """Everything, as people read it."""
        return plan_text(self.to_dict())


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
