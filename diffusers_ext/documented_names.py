"""Names that the design documents use and this package calls otherwise, each with its replacement.

The documents describe three earlier programs. What means the same has the same name here; what is left is listed, so
that asking for it says where it went.
"""

from __future__ import annotations

from typing import NamedTuple


class Replacement(NamedTuple):
    """What stands for a documented name."""

    names: tuple[str, ...]  # dotted, below `diffusers_ext`
    use: str  # how it is called, and what differs


_MEASURED = "`collect_statistics(pipe, prompts, batch_size=...)`, which keeps sums, not features"

REPLACEMENTS: dict[str, Replacement] = {
    # null-space DreamBooth
    "load_covariance_data": Replacement(
        ("FeatureStatistics.from_layout", "FeatureStatistics.from_pretrained"),
        "`FeatureStatistics.from_layout(run_folder, denoiser=pipe.unet)`",
    ),
    "apply_nullspace_constraint": Replacement(
        ("NullSpaceProjector.from_statistics", "NullSpaceProjector.project"),
        "`NullSpaceProjector.from_statistics(statistics, ...).project(delta, layer, slot)`",
    ),
    "validate_covariance_matrix": Replacement(
        ("FeatureStatistics.validate",), "`statistics.validate()`, which checks every matrix"
    ),
    "update_covariance_incrementally": Replacement(
        ("FeatureStatistics.merge", "SecondMoment.merge"), "`statistics.merge(others)`"
    ),
    "compress_covariance_matrix": Replacement(
        ("FeatureStatistics.compress",),
        "`statistics.compress(energy=0.95)`, a share of the energy, not of the directions",
    ),
    "distribute_covariance_computation": Replacement(
        ("collect_statistics", "FeatureStatistics.all_reduce"),
        "`accelerate launch training/build_covariance.py`, or `collect_statistics(shard=...)` and "
        "`statistics.all_reduce()`",
    ),
    "compute_covariance": Replacement(
        ("SecondMoment.update", "SecondMoment.mean"), "`SecondMoment(dim).update(vectors).mean`, uncentred"
    ),
    "compute_partial_covariance": Replacement(
        ("collect_statistics",), "`collect_statistics(pipe, prompts, shard=(index, count))`"
    ),
    "merge_covariance_results": Replacement(("FeatureStatistics.merge",), "`statistics.merge(others)`"),
    "compute_and_save_covariance": Replacement(
        ("collect_statistics", "FeatureStatistics.export_layout"),
        "`collect_statistics(pipe, prompts).export_layout(folder)`",
    ),
    "reshape_and_center": Replacement(
        ("SecondMoment.update",),
        "`SecondMoment(dim).update(vectors)`: nothing is centred, for the null space of centred "
        "features does not keep their mean",
    ),
    "process_in_batches": Replacement(("collect_statistics",), _MEASURED),
    "save_immediately_and_clear": Replacement(
        ("collect_statistics",), "`collect_statistics(pipe, prompts, progress_dir=...)`, which saves sums as it goes"
    ),
    "robust_save_matrix": Replacement(
        ("FeatureStatistics.save_pretrained", "FeatureStatistics.export_layout"),
        "`statistics.save_pretrained(folder)` or `statistics.export_layout(folder)`, whole or not at all",
    ),
    # golden noise
    "SVDNoiseUnet": Replacement(("NPNet",), "`NPNet`, of which it is a part"),
    "NoiseTransformer": Replacement(("NPNet",), "`NPNet`, of which it is a part"),
    "CrossAttention": Replacement(("NPNet",), "`NPNet`, of which it is a part"),
    "encode_text": Replacement(("encode_prompts",), "`encode_prompts(pipe, prompts)`"),
    # eraser
    "AdapterEraser": Replacement(
        ("EraserConfig", "EraserLayer"),
        "`pipe.transformer.add_adapter(EraserConfig(...))`, which places an `EraserLayer` beside "
        "every attention layer",
    ),
    "CogVideoXWithEraser": Replacement(
        ("EraserConfig", "EraserModel", "load_eraser"),
        "`load_eraser(pipe.transformer, folder)`; the attention layers stay as they are",
    ),
    "setup_cogvideo_adapter_eraser": Replacement(
        ("EraserConfig",),
        "`pipe.transformer.add_adapter(EraserConfig(...))`, or `load_eraser(pipe.transformer, folder)`",
    ),
    "zero_module": Replacement(
        ("EraserConfig",), "`EraserConfig(...)`: the second Linear of an eraser begins at zero"
    ),
    "AttnMapsCapture": Replacement(
        ("concept_mask", "eraser.concept_attention.concept_attention"),
        "`concept_mask(...)`, or for the attention itself `concept_attention(transformer, token_mask)` of "
        "`diffusers_ext.eraser.concept_attention`",
    ),
    "get_mask": Replacement(("concept_mask", "concept_token_mask"), "`concept_mask(...)`"),
    "EraserOutputsCapture": Replacement(
        ("eraser.adapter.outputs.eraser_outputs",),
        "`with eraser_outputs(transformer) as outputs:` of `diffusers_ext.eraser.adapter.outputs`",
    ),
}

ALIASES = {"NoiseSequenceRNN_v2": "NoiseSequenceRNN"}


def missing_name(module: str, name: str) -> ImportError | AttributeError:
    """The error for a public name that is not there.

    An `ImportError` for a documented name, because Python drops the message of an `AttributeError` when a name is
    imported.
    """
    if name in REPLACEMENTS:
        return ImportError(
            f"{module!r} has no {name!r} of the design documents. Use {REPLACEMENTS[name].use}.", name=module
        )
    return AttributeError(f"module {module!r} has no attribute {name!r}")
