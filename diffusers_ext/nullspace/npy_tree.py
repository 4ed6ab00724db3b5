"""Statistics as a tree of npy files, one folder per run, timestep and layer: written and read.

The tree is `run_<time>/timestep_<number>/<layer>/` with `{q,k,v,out}_covariance.npy`, `_projection.npy` and
`_metadata.json`. What is written is uncentred and pooled over timesteps, because one weight serves all timesteps:
every timestep holds the same matrices, and its metadata say so.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_ext.core.artifacts import fingerprint, write_atomically
from diffusers_ext.core.capture import natural_key
from diffusers_ext.core.second_moment import SecondMoment
from diffusers_ext.core.text_files import read_json
from diffusers_ext.nullspace.npy_tree_pictures import (
    MatrixFile,
    find_files,
    find_linear,
    find_run,
    read_matrix,
    read_metadata,
    safe_name,
)
from diffusers_ext.nullspace.projector import null_dimensions
from diffusers_ext.nullspace.slots import split_linear_name
from diffusers_ext.nullspace.statistics import FeatureStatistics

logger = logging.getLogger(__name__)

FACTS_NAME = "facts.json"  # fingerprints and prompts, which the tree has no other place for


def export_layout(
    statistics: FeatureStatistics,
    directory: str | os.PathLike,
    *,
    threshold: float = 2e-2,
    run_name: str | None = None,
    timesteps: Sequence[int] | None = None,
    step_links: bool = False,
    show_progress: bool = True,
) -> Path:
    """Write statistics as a tree of npy files, whole or not at all; its size is logged first.

    Float32 blurs eigenvalues below 1e-7 of the largest, so an exact null space does not survive the way back;
    `save_pretrained` keeps it.

    Args:
        statistics: their second moments `C = E[x x^T]`, `(dim, dim)`, become float32.
        threshold: eigenvalues of `C` below this absolute value are null in the projections.
        run_name: of the new folder, starting with `run_`; `run_<YYYYMMDD_HHMMSS>` when `None`.
        timesteps: write the same pooled matrices under each of them, for readers that look a timestep up; `(0,)` when
            `None`. Disk and time grow with their number.
        step_links: also name the timesteps by their order, `step_000` the first given, as symbolic links.

    Raises:
        ValueError: the run exists, its name, the threshold or the timesteps are unfit, or the disk has too little
            room.
    """
    name = datetime.now().strftime("run_%Y%m%d_%H%M%S") if run_name is None else run_name
    timesteps = [0] if timesteps is None else [int(timestep) for timestep in timesteps]
    if Path(name).name != name or not name.startswith("run_"):
        raise ValueError(f"`run_name` must be a folder name starting with 'run_', got {name!r}.")
    if not timesteps or min(timesteps) < 0 or len(set(timesteps)) < len(timesteps):
        raise ValueError(f"`timesteps` must be different and not negative, got {timesteps}.")
    folders = [safe_name(layer) for layer in statistics.layers]
    alike = sorted({folder for folder in folders if folders.count(folder) > 1})
    if alike:
        raise ValueError(f"Layers must have different folders, got several for {alike}.")
    target = Path(directory, name)
    if target.exists():
        raise ValueError(f"`run_name` must be new, got {name!r}, which {target.parent} holds.")
    null_dims = {
        key: null_dimensions(statistics.spectrum(key).values, threshold=threshold) for key in statistics.moments
    }
    projected = {key for key, count in null_dims.items() if count}
    size = len(timesteps) * layout_size(statistics.widths, statistics.sources, projected)
    check_room(size, target.parent, len(timesteps))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{name}."))
    try:
        keys = sorted(statistics.moments, key=natural_key)
        for key in tqdm(keys, desc="export", disable=not show_progress):
            _write_matrix(statistics, key, temporary, threshold, timesteps)
        for index, timestep in enumerate(timesteps if step_links else ()):
            (temporary / f"step_{index:03d}").symlink_to(f"timestep_{timestep:04d}")
        write_atomically(temporary / FACTS_NAME, json.dumps(statistics.facts, indent=2) + "\n")
        temporary.chmod(0o755)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    return target


def layout_size(
    widths: dict[str, int], sources: dict[str, str] | None = None, projected: set[str] | None = None
) -> int:
    """Bytes that one timestep of a tree takes, without its small metadata.

    Args:
        projected: keys whose matrices have null dimensions, and so a projection; all when `None`.
    """
    size = 0
    for linear, width in widths.items():
        has_projection = projected is None or sources[linear] in projected
        size += (1 + has_projection) * (width * width * 4 + 128)
    return size


def check_room(size: int, directory: str | os.PathLike, count: int) -> None:
    """Log how large a tree of so many timesteps becomes; `ValueError` where it does not fit."""
    place = Path(directory).resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    logger.info("The tree of npy files takes %s for %d timesteps", in_bytes(size), count)
    if size > free:
        raise ValueError(
            f"`directory` must have {in_bytes(size)} free for the npy files of {count} timesteps, got "
            f"{in_bytes(free)} in {place}. Export fewer timesteps: their matrices are the same."
        )


def in_bytes(size: int) -> str:
    """A size as people read it, in decimal units."""
    unit = 0
    number = float(size)
    while number >= 1000 and unit < 4:
        number, unit = number / 1000, unit + 1
    return f"{number:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"


def _write_matrix(statistics: FeatureStatistics, key: str, run: Path, threshold: float, timesteps: list[int]) -> None:
    moment, spectrum = statistics.moments[key], statistics.spectrum(key)
    null_space_dim = null_dimensions(spectrum.values, threshold=threshold)
    contents = {"covariance": _npy(moment.mean)}
    if null_space_dim:
        basis = spectrum.vectors[:, :null_space_dim]
        contents["projection"] = _npy(basis @ basis.T)
    metadata = {
        "original_shape": [moment.count, moment.dim],
        "n_samples": moment.count,
        "feature_dim": moment.dim,
        "null_space_dim": null_space_dim,
        "singular_values": spectrum.values.flip(0).tolist(),
        "nullspace_threshold": threshold,
        "centred": False,
        "pooled": True,
        "note": (
            f"the same matrix stands under each of the {len(timesteps)} exported timesteps: it is "
            "pooled over all timesteps of the run, because one weight serves all of them"
        ),
        "matrix": key,
    }
    for linear in (name for name in statistics.linears if statistics.sources[name] == key):
        layer, slot = split_linear_name(linear)
        for timestep in timesteps:
            folder = run / f"timestep_{timestep:04d}" / safe_name(layer)
            folder.mkdir(parents=True, exist_ok=True)
            for kind, content in contents.items():
                write_atomically(folder / f"{slot}_{kind}.npy", content)
            text = json.dumps({**metadata, "layer": layer, "actual_timestep": timestep}, indent=1)
            write_atomically(folder / f"{slot}_metadata.json", text + "\n")


def _npy(matrix: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, matrix.to("cpu", torch.float32).numpy(), allow_pickle=False)
    return buffer.getvalue()


def load_layout(
    directory: str | os.PathLike,
    *,
    denoiser: torch.nn.Module | None = None,
    allow_centred: bool = False,
    show_progress: bool = True,
) -> FeatureStatistics:
    """Read a tree of npy files; its timesteps are pooled, weighted by their numbers of vectors.

    Trees of other programs (see `find_files` for the forms) hold centred covariances, some of them of output features.
    Those are told from inputs by their width alone: where it agrees, as for the output of a whole attention layer,
    they pass unnoticed.

    Args:
        directory: a run, or a folder with a single `run_*` in it.
        denoiser: gives the layers' dotted names where the tree lacks them, and widths to check.
        allow_centred: take centred covariances as they are; they do not keep the mean input.

    Returns:
        `FeatureStatistics`, with the `facts` of the export where the tree holds them.

    Raises:
        ValueError: no run or several, a broken file, a layer that is unknown or lacks a timestep, a covariance of
            another width than the denoiser's inputs, or a centred one.
    """
    run = find_run(Path(directory))
    files = find_files(run)
    modules = None if denoiser is None else dict(denoiser.named_modules())
    pool = _Pool()
    for file in tqdm(files, desc="import", disable=not show_progress):
        metadata = read_metadata(file.metadata_path)
        linear = find_linear(file, metadata, modules)
        pool.add(file, linear, metadata, allow_centred)
    steps = set().union(*pool.steps.values())
    for linear, found in pool.steps.items():
        if found != steps:
            raise ValueError(
                f"{run} must hold {linear} at each of {len(steps)} steps, got none at "
                f"{min(steps - found)}: it was not written to the end."
            )
    facts = _read_facts(run, denoiser)
    timesteps = sorted({file.timestep for file in files})
    imported = {"imported_from_layout": True, "centred": pool.centred, "timesteps": timesteps}
    facts["settings"] = {**facts["settings"], **imported}
    statistics = FeatureStatistics(pool.moments, pool.sources, facts)
    statistics.validate()
    return statistics


class _Pool:
    """Moments summed over the steps of a tree; matrices that were pooled before count once."""

    def __init__(self) -> None:
        self.moments: dict[str, SecondMoment] = {}
        self.sources: dict[str, str] = {}
        self.steps: dict[str, set[str]] = {}
        self.centred = False

    def add(self, file: MatrixFile, linear: str, metadata: dict[str, Any], allow_centred: bool) -> None:
        centred = metadata.get("centred") is not False
        if centred and not allow_centred:
            raise ValueError(
                f'{file.path} must be uncentred ("centred": false in its metadata), got a centred '
                "covariance: its null space can hold the mean input m, and an update D with D m "
                "not 0 adds a constant to every output of to_v. Collect with "
                "`collect_statistics`, or pass `allow_centred=True` and have no guarantee."
            )
        self.centred |= centred
        count = metadata["n_samples"]
        total = read_matrix(file.path, metadata["feature_dim"]) * count
        pooled = metadata.get("pooled") is True
        key = self.sources.setdefault(linear, metadata.get("matrix", linear) if pooled else linear)
        if key not in self.moments:
            self.moments[key] = SecondMoment.from_total(total, count)
        elif not pooled:
            self.moments[key].merge(SecondMoment.from_total(total, count))
        elif not torch.equal(self.moments[key].total, total):
            raise ValueError(f"{file.path} must repeat the matrix {key!r}, got another one.")
        self.steps.setdefault(linear, set()).add(file.step)


def _read_facts(run: Path, denoiser: torch.nn.Module | None) -> dict[str, Any]:
    models = {} if denoiser is None else {"denoiser": fingerprint(denoiser)}
    if not (run / FACTS_NAME).is_file():
        return {"base_model": "", "models": models, "prompts": [], "settings": {}}
    facts = read_json(run / FACTS_NAME)
    missing = sorted({"models", "prompts", "settings"} - facts.keys())
    if missing:
        raise ValueError(f"{run / FACTS_NAME} must hold models, prompts and settings, got no {missing}.")
    FeatureStatistics({}, {}, facts).check_same_models(models)
    return facts
