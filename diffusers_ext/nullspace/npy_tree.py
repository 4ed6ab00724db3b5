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
import re
import shutil
import tempfile
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_ext.core.artifacts import fingerprint, write_atomically
from diffusers_ext.core.capture import natural_key
from diffusers_ext.core.second_moment import SecondMoment
from diffusers_ext.core.text_files import read_json
from diffusers_ext.nullspace.projector import null_dimensions
from diffusers_ext.nullspace.slots import linear_name, split_linear_name
from diffusers_ext.nullspace.statistics import FeatureStatistics

logger = logging.getLogger(__name__)

FACTS_NAME = "facts.json"  # fingerprints and prompts, which the tree has no other place for
# The two forms of a matrix's path in its run.
_BY_STEP = re.compile(r"(?P<step>(?:timestep|step)_(?P<time>\d+))/(?P<layer>[^/]+)/(?P<slot>.*)_covariance\.npy")
_BY_LAYER = re.compile(
    r"covariance_matrices/(?P<layer>[^/]+)/(?P<step>(?:timestep|alpha_\d+)_(?P<time>\d+))_(?P<slot>\w+)_cov\.npy"
)


def safe_name(layer: str) -> str:
    """A layer's dotted name as a folder name; not invertible."""
    return re.sub(r"[./]", "_", layer)


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
        threshold: eigenvalues of `C = E[x x^T]` below this absolute value are null in the projections.
        run_name: of the new folder; `run_<YYYYMMDD_HHMMSS>` when `None`.
        timesteps: write the same pooled matrices under each of them, for readers that look a timestep up; `(0,)` when
            `None`. Disk and time grow with their number.
        step_links: also name the timesteps by their order, `step_000` the first given, as symbolic links.
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
    keys = sorted(statistics.moments, key=natural_key)
    null_dims = {key: null_dimensions(statistics.spectrum(key).values, threshold=threshold) for key in keys}
    unprojected = {linear for linear, key in statistics.sources.items() if not null_dims[key]}
    check_room(len(timesteps) * layout_size(statistics.widths, unprojected), target.parent, len(timesteps))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{name}."))
    try:
        for key in tqdm(keys, desc="export", disable=not show_progress):
            _write_matrix(statistics, key, temporary, threshold, null_dims[key], timesteps)
        for index, timestep in enumerate(timesteps if step_links else ()):
            (temporary / f"step_{index:03d}").symlink_to(f"timestep_{timestep:04d}")
        write_atomically(temporary / FACTS_NAME, json.dumps(statistics.facts, indent=2) + "\n")
        temporary.chmod(0o755)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    return target


def layout_size(widths: dict[str, int], unprojected: Collection[str] = ()) -> int:
    """Bytes that one timestep of a tree takes, without its small metadata.

    Args:
        unprojected: Linears whose matrices have no null dimensions, hence no projection.
    """
    return sum((1 if linear in unprojected else 2) * (width * width * 4 + 128) for linear, width in widths.items())


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


def in_bytes(size: float) -> str:
    """A size as people read it, in decimal units."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{float(size):.3g} {units[0]}"


def _write_matrix(
    statistics: FeatureStatistics, key: str, run: Path, threshold: float, null_dims: int, timesteps: list[int]
) -> None:
    moment, spectrum = statistics.moments[key], statistics.spectrum(key)
    contents = {"covariance": _npy(moment.mean)}
    if null_dims:
        basis = spectrum.vectors[:, :null_dims]
        contents["projection"] = _npy(basis @ basis.T)
    metadata = {
        "original_shape": [moment.count, moment.dim],
        "n_samples": moment.count,
        "feature_dim": moment.dim,
        "null_space_dim": null_dims,
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
    """
    run = _find_run(Path(directory))
    files = find_files(run)
    modules = None if denoiser is None else dict(denoiser.named_modules())
    statistics = FeatureStatistics({}, {}, _read_facts(run, denoiser))
    steps: dict[str, set[str]] = {}
    centred = False
    for file in tqdm(files, desc="import", disable=not show_progress):
        metadata = read_metadata(file.metadata_path)
        linear = find_linear(file, metadata, modules)
        is_centred = metadata.get("centred") is not False
        if is_centred and not allow_centred:
            raise ValueError(
                f'{file.path} must be uncentred ("centred": false in its metadata), got a centred '
                "covariance: its null space can hold the mean input m, and an update D with D m "
                "not 0 adds a constant to every output of to_v. Collect with "
                "`collect_statistics`, or pass `allow_centred=True` and have no guarantee."
            )
        centred |= is_centred
        _pool(statistics, file, linear, metadata)
        steps.setdefault(linear, set()).add(file.step)
    every = set().union(*steps.values())
    for linear, found in steps.items():
        if found != every:
            raise ValueError(
                f"{run} must hold {linear} at each of {len(every)} steps, got none at "
                f"{min(every - found)}: it was not written to the end."
            )
    timesteps = sorted({file.timestep for file in files})
    imported = {"imported_from_layout": True, "centred": centred, "timesteps": timesteps}
    statistics.facts["settings"] = {**statistics.facts["settings"], **imported}
    statistics.validate()
    return statistics


def _pool(statistics: FeatureStatistics, file: MatrixFile, linear: str, metadata: dict[str, Any]) -> None:
    """Add one matrix; those that were pooled over the steps before count once."""
    count = metadata["n_samples"]
    total = read_matrix(file.path, metadata["feature_dim"]) * count
    pooled, moments = metadata.get("pooled") is True, statistics.moments
    key = statistics.sources.setdefault(linear, metadata.get("matrix", linear) if pooled else linear)
    if key not in moments:
        moments[key] = SecondMoment.from_total(total, count)
    elif not pooled:
        moments[key].merge(SecondMoment.from_total(total, count))
    elif not torch.equal(moments[key].total, total):
        raise ValueError(f"{file.path} must repeat the matrix {key!r}, got another one.")


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


class MatrixFile(NamedTuple):
    """One matrix of a tree."""

    path: Path
    metadata_path: Path
    step: str  # as the tree names it
    timestep: int
    layer_folder: str  # the layer's name with `.` replaced by `_`, perhaps after `module_`
    slot: str


def _find_run(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"`directory` must be a folder, got {folder}.")
    runs = sorted(path for path in folder.glob("run_*") if path.is_dir())
    if len(runs) > 1:
        raise ValueError(f"`directory` must be or hold a single run, got {[p.name for p in runs]}.")
    return runs[0] if runs else folder


def find_files(run: Path) -> list[MatrixFile]:
    """All matrices of a run, sorted by path, in either of two forms.

    `{timestep,step}_<number>/<layer>/<slot>_covariance.npy`, or
    `covariance_matrices/<layer>/{timestep_<number>,alpha_<index>_<number>}_<slot>_cov.npy`. Links to other steps of
    the run are second names, not further matrices.
    """
    files = []
    for path in run.glob("*/*/*.npy"):
        name = path.relative_to(run).as_posix()
        match = _BY_STEP.fullmatch(name) or _BY_LAYER.fullmatch(name)
        if match and not (run / match["step"]).is_symlink():
            metadata_path = path.with_name(re.sub(r"_cov(ariance)?\.npy$", "_metadata.json", path.name))
            found = (match["step"], int(match["time"]), match["layer"], match["slot"])
            files.append(MatrixFile(path, metadata_path, *found))
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
            f"{path} must hold {dim} x {dim} floats, as its metadata says, got {matrix.dtype} of shape {matrix.shape}."
        )
    matrix = matrix.astype(np.float64)
    if not np.isfinite(matrix).all():
        raise ValueError(f"{path} must be finite, got infinite or not-a-number values.")
    if np.abs(matrix - matrix.T).max() > 1e-4 * np.abs(matrix).max():
        raise ValueError(f"{path} must be a symmetric matrix, got one that is not.")
    return torch.from_numpy((matrix + matrix.T) / 2)


def find_linear(file: MatrixFile, metadata: dict[str, Any], modules: dict[str, torch.nn.Module] | None) -> str:
    """Dotted name of the Linear whose inputs one file is about; trees without names are matched to `modules`."""
    layer = metadata.get("layer")
    if layer is None and modules is None:
        raise ValueError(f"{file.metadata_path} must name its `layer`, got a folder name only. Pass `denoiser=`.")
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
            f"{file.path} must be of the inputs of {linear} (width {width}), got width {dim}. Output features, often "
            "per head, lie on the other side of the weight and give no guarantee. Collect with `collect_statistics`."
        )
    return linear
