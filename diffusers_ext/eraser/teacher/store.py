"""Samples of an eraser's training: points of the frozen model's runs with its velocities there.

They are kept in memory, or on disk in one safetensors file a run, so that a killed collection resumes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from diffusers import SchedulerMixin
from safetensors import safe_open
from torch.utils.data import Dataset

from diffusers_ext.core.artifacts import CONFIG_NAME, fingerprint, same_fingerprint, sealed, write_atomically
from diffusers_ext.core.tensor_files import (
    CONFIG_DIGEST,
    FLOATING,
    check_config_digest,
    config_digest,
    open_tensors,
    read_tensors,
)
from diffusers_ext.core.text_files import read_json

PARTS = ("target", "preserved")
EMPTY_PROMPT = -1
Row = dict[str, torch.Tensor]
CLASS_NAME, FORMAT_VERSION = "TeacherSamples", 1
_HEADS_NAME = "head_weights.safetensors"
_MOST_HANDLES = 64
_REMEDY = "Remove it and collect again."


class TeacherSamples(Dataset):
    """What an eraser is trained on.

    Item `i` is `{"target": row, "preserved": row}`, row `i` modulo the rows of each part; a part without rows is left
    out. Rows are float32 but for the two indices:

    - `"target"`: `x_t` `(frames, channels, height, width)`, `t`, `prompt` (index of the target prompt and of its
      anchor), `v_concept` and `v_anchor` (the frozen model's velocities of the two), and `mask` `(frames', rows,
      columns)` in [0, 1] where masks were asked for, made with the `head_weights`.
    - `"preserved"`: `x_t`, `t`, `prompt` (index of the preserved prompt, -1 for the empty prompt) and `velocity`.
    """

    def __init__(
        self, parts: Mapping[str, Sequence[Row] | FileRows], head_weights: torch.Tensor | None = None
    ) -> None:
        self.head_weights = head_weights
        self.parts = {name: rows for name, rows in parts.items() if len(rows)}
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise ValueError(f"`parts` must have rows, of {PARTS} only, got {sorted(self.parts)}.")

    def __len__(self) -> int:
        return max(len(rows) for rows in self.parts.values())

    def __getitem__(self, index: int) -> dict[str, Row]:
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be from 0 to {len(self) - 1}, got {index}.")
        rows = {name: rows[index % len(rows)] for name, rows in self.parts.items()}
        return {name: _cast(row, torch.float32) for name, row in rows.items()}


def first_process_has(tensor: torch.Tensor) -> torch.Tensor:
    """What the first of several processes has, which all have computed: on other machines it may round differently."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    return broadcast(tensor.to(PartialState().device)).to(tensor.device)


class TeacherMemory:
    """The runs of one collection in memory; `TeacherFiles` keeps them in a folder."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._rows: dict[str, list[Row]] = {part: [] for part in PARTS}
        self._head_weights: torch.Tensor | None = None

    def has(self, part: str, run: int) -> bool:
        """Never: a run is not made twice."""
        return False

    def write(self, part: str, run: int, rows: Row) -> None:
        """Keep the rows of one run."""
        stored = to_storage(rows, self.dtype)
        for point in range(len(stored["t"])):
            self._rows[part].append({name: column[point] for name, column in stored.items()})

    def head_weights(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The weights that all runs here are made with."""
        self._head_weights = first_process_has(make())
        return self._head_weights

    def samples(self) -> TeacherSamples:
        """All that was kept."""
        return TeacherSamples(self._rows, self._head_weights)


def to_storage(rows: Row, dtype: torch.dtype) -> Row:
    """Rows `{name: (points, ...)}`, the floating-point ones in the dtype in which they are kept, and finite in it."""
    stored = {name: value.contiguous() for name, value in _cast(rows, dtype).items()}
    for name, value in stored.items():
        if not value.isfinite().all():
            prompt = rows["prompt"][~value.flatten(1).isfinite().all(1)][0]
            raise ValueError(
                f"`{name}` must be finite, got NaN or infinity for prompt {int(prompt)}. Run the "
                "model in bfloat16 or float32."
            )
    return stored


def _cast(rows: Row, dtype: torch.dtype) -> Row:
    # Timesteps of flow matching are floats, and too fine for half precision.
    return {
        n: value.to(torch.float32 if n == "t" else dtype) if value.is_floating_point() else value
        for n, value in rows.items()
    }


class FileRows:
    """Rows of one part in a folder, memory-mapped, picklable for the workers of a `DataLoader`."""

    def __init__(self, folder: Path, num_runs: int) -> None:
        self.folder, self.num_runs = folder, num_runs
        self._handles: dict[int, safe_open] = {}
        self._forms: dict[int, dict[str, Any]] = {}  # dtypes and shapes of the runs looked at
        missing = [run for run in range(num_runs) if not run_file(folder, run).is_file()]
        if missing:
            raise ValueError(
                f"{folder} must hold {num_runs} runs, got {num_runs - len(missing)}: "
                f"{run_file(folder, missing[0]).name} is missing. Collect again to continue."
            )
        self._points = len(self._open(0).get_slice("t")[:]) if num_runs else 0

    def __len__(self) -> int:
        return self.num_runs * self._points

    def __getitem__(self, index: int) -> Row:
        run, point = divmod(index, self._points)
        handle = self._open(run)
        return {name: handle.get_slice(name)[point : point + 1][0].clone() for name in handle.keys()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}  # a worker maps the files for itself

    def _open(self, run: int) -> safe_open:
        if run not in self._handles:
            if len(self._handles) >= _MOST_HANDLES:
                self._handles.clear()
            self._handles[run] = self._checked(run)
        return self._handles[run]

    def _checked(self, run: int) -> safe_open:
        """A handle of one run, all of which is looked at the first time."""
        path = run_file(self.folder, run)
        if run not in self._forms:
            tensors, _ = read_tensors(path, remedy=_REMEDY)
            form = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            if "t" not in form or any(not shape for _, shape in form.values()):
                raise ValueError(f"{path} must hold rows, `t` among them, got {form}. {_REMEDY}")
            if run != 0:
                self._open(0)  # so that its form is known
            first = self._forms.setdefault(0, form)
            if form != first or len({shape[0] for _, shape in form.values()}) > 1:
                raise ValueError(f"{path} must hold rows like {run_file(self.folder, 0).name}, got {form}. {_REMEDY}")
            self._forms[run] = form
        return open_tensors(path, _REMEDY)


class TeacherFiles:
    """The folder of one collection: `config.json`, and `<part>/<run>.safetensors`.

    A file is there whole or not at all. The config says how the samples are made, by JSON-able `settings` of the
    collection and `facts` of how the embeddings were made; a folder of other samples is refused.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        scheduler: SchedulerMixin,
        model: torch.nn.Module,
        settings: dict[str, Any],
        facts: dict[str, Any] | None,
        dtype: torch.dtype,
    ) -> None:
        if not facts:
            raise ValueError(
                "`facts` must say of which model and prompts the samples are where a `directory` "
                f"keeps them, got {facts}."
            )
        self.folder, self.dtype = Path(directory), dtype
        public = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
        config = {
            "_class_name": CLASS_NAME,
            "format_version": FORMAT_VERSION,
            "settings": settings | {"dtype": str(dtype).removeprefix("torch.")},
            "scheduler": [type(scheduler).__name__, public],
            "model": fingerprint(model),
            "facts": facts,
        }
        # Through JSON, as it is read back: tuples become lists.
        config = json.loads(json.dumps(config, default=str))
        config[CONFIG_DIGEST] = config_digest(config)
        self.folder.mkdir(parents=True, exist_ok=True)
        # Listed first, as another process may be creating the set at this moment.
        names = [path.name for path in self.folder.iterdir()]
        if (self.folder / CONFIG_NAME).is_file():
            _check_same(self.folder, config)
        elif [name for name in names if not name.startswith(f".{CONFIG_NAME}.")]:
            raise ValueError(f"`directory` must be empty or hold samples, got {self.folder} with {sorted(names)}.")
        else:
            write_atomically(self.folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
        for part in PARTS:
            (self.folder / part).mkdir(exist_ok=True)

    def has(self, part: str, run: int) -> bool:
        """Whether a run is there."""
        return run_file(self.folder / part, run).is_file()

    def write(self, part: str, run: int, rows: Row) -> None:
        """Keep the rows of one run."""
        write_atomically(run_file(self.folder / part, run), sealed(to_storage(rows, self.dtype)))

    def head_weights(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The weights that all runs here are made with; `make` is called where there are none."""
        path = self.folder / _HEADS_NAME
        if not path.is_file():
            write_atomically(path, sealed({"head_weights": make()}))
        return _read_head_weights(self.folder)

    def samples(self) -> TeacherSamples:
        """All runs, once they are there; what killed processes have left half written is removed."""
        for pattern in (".*.json.*", "**/.*.safetensors.*"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
        return open_teacher_samples(self.folder)


def open_teacher_samples(directory: str | os.PathLike) -> TeacherSamples:
    """The samples of a finished collection; `ValueError` where not all of them are there."""
    folder = Path(directory)
    settings = _read_config(folder)["settings"]
    parts = {part: FileRows(folder / part, settings[f"num_{part}"]) for part in PARTS}
    masked = settings["masks"] and settings["num_target"]
    return TeacherSamples(parts, _read_head_weights(folder) if masked else None)


def run_file(folder: Path, run: int) -> Path:
    """Where a run of one part is kept."""
    return folder / f"{run:05d}.safetensors"


def _read_head_weights(folder: Path) -> torch.Tensor:
    path = folder / _HEADS_NAME
    tensors, _ = read_tensors(path, dtypes=FLOATING, remedy=_REMEDY)
    if tensors.keys() != {"head_weights"}:
        raise ValueError(f"{path} must hold 'head_weights', got {sorted(tensors)}. {_REMEDY}")
    return tensors["head_weights"]


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder} must hold samples of a collection, got no {CONFIG_NAME}.")
    config = read_json(path)
    found = (config.get("_class_name"), config.get("format_version"))
    if found != (CLASS_NAME, FORMAT_VERSION):
        raise ValueError(
            f"{path} must describe {CLASS_NAME} of format {FORMAT_VERSION}, got {found[0]!r} of format {found[1]}."
        )
    check_config_digest(config, path)
    settings = config.get("settings")
    if not isinstance(settings, dict) or "masks" not in settings:
        raise ValueError(f"`settings` of {path} must be an object with `masks`, got {settings!r:.200}.")
    for name in (f"num_{part}" for part in PARTS):
        count = settings.get(name)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < 2**31:
            raise ValueError(f"`settings.{name}` of {path} must be a number from 0, got {count!r}.")
    missing = sorted({"scheduler", "model", "facts"} - config.keys())
    if missing:
        raise ValueError(f"{path} must hold {missing}, got only {sorted(config)}.")
    return config


def _check_same(folder: Path, config: dict[str, Any]) -> None:
    stored = _read_config(folder)
    changed = [
        f"{kind}.{name}"
        for kind in ("settings", "facts")
        for name in sorted({*stored[kind], *config[kind]})
        if stored[kind].get(name) != config[kind].get(name)
    ]
    changed += ["scheduler"] * (stored["scheduler"] != config["scheduler"])
    changed += ["model"] * (not same_fingerprint(stored["model"], config["model"]))
    if changed:
        raise ValueError(
            f"{folder} must hold samples made in the same way as now, got others: "
            f"{', '.join(changed)} differ. Choose another folder, or restore the old settings."
        )
