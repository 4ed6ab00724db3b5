"""Take out of a trained LoRA what acts on preserved inputs."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from diffusers_ext.nullspace.lora_files import (
    StateDict,
    check_lora_effect,
    check_output_path,
    read_lora,
    write_lora,
)
from diffusers_ext.nullspace.projector import NullSpaceProjector, project_rows
from diffusers_ext.nullspace.statistics import FeatureStatistics


_DENOISERS = ("unet", "transformer")


def debleed_lora(
    lora: str | os.PathLike | Mapping[str, torch.Tensor],
    statistics: FeatureStatistics,
    *,
    projector: NullSpaceProjector | None = None,
    uncovered: str = "error",
    output_path: str | os.PathLike | None = None,
    **criterion: float,
) -> StateDict:
    """Take out of an existing LoRA what acts on preserved inputs: `A <- A P`, without training.

    Args:
        lora: as in `read_lora`, for the model that `statistics` were collected on.
        statistics: of the prompts to protect.
        projector: ready projector, in place of `criterion`.
        uncovered: what to do with modules that have no statistic: `"error"`, `"keep"`, `"drop"`.
        output_path: file to write in diffusers format; `None` only returns the state dict.
        criterion: one of `NullSpaceProjector.from_statistics`, e.g. `damping=1e-3`, `energy=1e-4`.

    Returns:
        The projected LoRA, keys as in `read_lora`, dtypes as they were.
    """
    if uncovered not in ("error", "keep", "drop"):
        raise ValueError(f"`uncovered` must be 'error', 'keep' or 'drop', got {uncovered!r}.")
    check_output_path(output_path)
    if (projector is None) != bool(criterion):
        raise ValueError("Either `projector` or one criterion must be given, got neither or both.")
    projector = projector or NullSpaceProjector.from_statistics(statistics, **criterion)
    projections = projector.projections()
    result: StateDict = {}
    missing = []
    for key, tensor in read_lora(lora).items():
        component, _, name = key.rsplit(".lora_", 1)[0].partition(".")
        linear = name if component in _DENOISERS else None
        if linear in projections:
            is_a = key.endswith(".lora_A.weight")
            result[key] = project_rows(tensor, projections[linear]) if is_a else tensor
        else:
            missing.append(key)
            if uncovered == "keep":
                result[key] = tensor
    if missing and uncovered == "error":
        raise ValueError(
            f"`statistics` must cover every module of the LoRA, got none for {len(missing) // 2}, the "
            f"first is {missing[0]!r}. Collect more features, or pass uncovered='keep' or 'drop'."
        )
    check_lora_effect(result)
    if output_path is not None:
        write_lora(result, output_path)
    return result


def preserved_energy(
    lora: str | os.PathLike | Mapping[str, torch.Tensor], statistics: FeatureStatistics
) -> dict[str, float]:
    """`tr(D C D^T)`, how strongly each update `D` of a LoRA acts on preserved inputs.

    Divided by `tr(W C W^T)` of the model's own weights it is `predicted_drift`; so the share of it
    that `debleed_lora` leaves is the share of the predicted drift.

    Args:
        lora: as in `read_lora`.
        statistics: of the preserved prompts.

    Returns:
        By dotted name of the Linear; modules without a statistic are left out.
    """
    tensors, energies = read_lora(lora), {}
    for key, a in tensors.items():
        component, _, rest = key.partition(".")
        linear = rest.removesuffix(".lora_A.weight")
        if linear == rest or component not in _DENOISERS or linear not in statistics.sources:
            continue
        b = tensors[key.replace(".lora_A.", ".lora_B.")]
        moment = statistics.moments[statistics.key(linear)].mean.double()
        a, b = a.to(moment), b.to(moment)
        energies[linear] = float(((a @ moment @ a.T) * (b.T @ b)).sum())
    return energies
