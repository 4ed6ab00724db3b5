"""Trees of npy files on disk: where the matrices lie, whose they are, and how one is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from diffusers_ext.core.text_files import read_json
from diffusers_ext.nullspace.slots import linear_name


_STEP_FOLDER = re.compile(r"(?:timestep|step)_(\d+)")
_FLAT_FILE = re.compile(r"((?:timestep|alpha_\d+)_(\d+))_(\w+)_cov\.npy")


class MatrixFile(NamedTuple):
    """One matrix of a tree."""

    path: Path
    metadata_path: Path
    step: str  # as the tree names it
    timestep: int
    layer_folder: str  # the layer's name with `.` replaced by `_`, perhaps after `module_`
    slot: str


def safe_name(layer: str) -> str:
    """A layer's dotted name as a folder name; not invertible."""
    return re.sub(r"[./]", "_", layer)


def find_run(folder: Path) -> Path:
    """The folder itself, or the one `run_*` in it; raises `ValueError` where there are several."""
    if not folder.is_dir():
        raise ValueError(f"`directory` must be a folder, got {folder}.")
    runs = sorted(path for path in folder.glob("run_*") if path.is_dir())
    if len(runs) > 1:
        raise ValueError(f"`directory` must be or hold a single run, got {[p.name for p in runs]}.")
    return runs[0] if runs else folder


def find_files(run: Path) -> list[MatrixFile]:
    """All matrices of a run, sorted by path, in either of two forms.

    `{timestep,step}_<number>/<layer>/<slot>_covariance.npy`, or
    `covariance_matrices/<layer>/{timestep_<number>,alpha_<index>_<number>}_<slot>_cov.npy`. Links
    to other steps of the run are second names, not further matrices.
    """
    files = []
    for path in run.glob("*/*/*_covariance.npy"):
        step = path.parents[1]
        if (match := _STEP_FOLDER.fullmatch(step.name)) and not step.is_symlink():
            slot = path.name.removesuffix("_covariance.npy")
            metadata_path = path.with_name(f"{slot}_metadata.json")
            files.append(
                MatrixFile(path, metadata_path, match[0], int(match[1]), path.parts[-2], slot)
            )
    for path in run.glob("covariance_matrices/*/*_cov.npy"):
        if match := _FLAT_FILE.fullmatch(path.name):
            step, timestep, slot = match.groups()
            metadata_path = path.with_name(f"{step}_{slot}_metadata.json")
            files.append(MatrixFile(path, metadata_path, step, int(timestep), path.parts[-2], slot))
    if not files:
        raise ValueError(
            f"{run} must hold timestep_*/<layer>/<slot>_covariance.npy or "
            "covariance_matrices/<layer>/timestep_*_<slot>_cov.npy, got neither."
        )
    return sorted(files)


def read_metadata(path: Path) -> dict[str, Any]:
    """Metadata of one matrix; raises `ValueError` where its sizes are not positive integers."""
    if not path.is_file():
        raise ValueError(f"{path} must stand beside its matrix, got no such file.")
    metadata = read_json(path)
    for name in ("n_samples", "feature_dim"):
        value = metadata.get(name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer in {path}, got {value!r}.")
    return metadata


def read_matrix(path: Path, dim: int) -> torch.Tensor:
    """One matrix, `(dim, dim)` float64, made exactly symmetric."""
    with path.open("rb") as handle:
        try:
            matrix = np.lib.format.read_array(handle, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path} must be a whole npy file of floats, got: {error}.") from error
    if matrix.shape != (dim, dim) or matrix.dtype.kind != "f":
        raise ValueError(
            f"{path} must hold {dim} x {dim} floats, as its metadata says, got {matrix.dtype} of "
            f"shape {matrix.shape}."
        )
    matrix = matrix.astype(np.float64)
    if not np.isfinite(matrix).all():
        raise ValueError(f"{path} must be finite, got infinite or not-a-number values.")
    if np.abs(matrix - matrix.T).max() > 1e-4 * np.abs(matrix).max():
        raise ValueError(f"{path} must be a symmetric matrix, got one that is not.")
    return torch.from_numpy((matrix + matrix.T) / 2)


def find_linear(
    file: MatrixFile, metadata: dict[str, Any], modules: dict[str, torch.nn.Module] | None
) -> str:
    """Dotted name of the Linear whose inputs one file is about.

    Args:
        modules: `{dotted name: module}` of the denoiser, against which other trees are matched.
    """
    layer = metadata.get("layer")
    if layer is None and modules is None:
        raise ValueError(
            f"{file.metadata_path} must name its `layer`, got a folder name only. Pass `denoiser=`."
        )
    if layer is None:
        folder = file.layer_folder.removeprefix("module_")
        layers = [name for name in modules if name.endswith("attn2") and safe_name(name) == folder]
        if len(layers) != 1:
            raise ValueError(
                f"{file.path.parent} must be named after one cross-attention layer of `denoiser`, "
                f"got {len(layers)} such layers."
            )
        layer = layers[0]
    linear = linear_name(layer, file.slot)
    if modules is None:
        return linear
    if linear not in modules:
        raise ValueError(f"{file.path} must belong to a Linear of `denoiser`, got {linear!r}.")
    width, dim = modules[linear].in_features, metadata["feature_dim"]
    if dim != width:
        raise ValueError(
            f"{file.path} must be of the inputs of {linear} (width {width}), got width {dim}. "
            "Output features, often per head, lie on the other side of the weight and give no "
            "guarantee. Collect with `collect_statistics`."
        )
    return linear
