"""Names that the design documents use and this package calls otherwise, each with its replacement.

The documents describe three earlier programs. What means the same has the same name here; what is left is listed, so
that asking for it says where it went.
"""

from __future__ import annotations

from typing import Any

from diffusers_ext.core.settings import did_you_mean

_PART_OF_NPNET = "`NPNet`, of which it is a part"

# Documented name -> how what stands for it is called, and what differs.
REPLACEMENTS = {
    # null-space DreamBooth
    "load_covariance_data": "`FeatureStatistics.from_layout(run_folder, denoiser=pipe.unet)`",
    "apply_nullspace_constraint": "`NullSpaceProjector.from_statistics(statistics, ...).project(delta, layer, slot)`",
    "validate_covariance_matrix": "`statistics.validate()`, which checks every matrix",
    "update_covariance_incrementally": "`statistics.merge(others)`",
    "compress_covariance_matrix": "`statistics.compress(energy=0.95)`, a share of the energy, not of the directions",
    "distribute_covariance_computation": (
        "`accelerate launch training/build_covariance.py`, or `collect_statistics(shard=...)` and "
        "`statistics.all_reduce()`"
    ),
    "compute_covariance": "`SecondMoment(dim).update(vectors).mean`, uncentred",
    "compute_partial_covariance": "`collect_statistics(pipe, prompts, shard=(index, count))`",
    "merge_covariance_results": "`statistics.merge(others)`",
    "compute_and_save_covariance": "`collect_statistics(pipe, prompts).export_layout(folder)`",
    "reshape_and_center": (
        "`SecondMoment(dim).update(vectors)`: nothing is centred, for the null space of centred features does not "
        "keep their mean"
    ),
    "process_in_batches": "`collect_statistics(pipe, prompts, batch_size=...)`, which keeps sums, not features",
    "save_immediately_and_clear": "`collect_statistics(pipe, prompts, progress_dir=...)`, which saves sums as it goes",
    "robust_save_matrix": (
        "`statistics.save_pretrained(folder)` or `statistics.export_layout(folder)`, whole or not at all"
    ),
    # golden noise
    "SVDNoiseUnet": _PART_OF_NPNET,
    "NoiseTransformer": _PART_OF_NPNET,
    "CrossAttention": _PART_OF_NPNET,
    "encode_text": "`encode_prompts(pipe, prompts)`",
    # eraser
    "AdapterEraser": (
        "`pipe.transformer.add_adapter(EraserConfig(...))`, which places an `EraserLayer` beside every attention layer"
    ),
    "CogVideoXWithEraser": "`load_eraser(pipe.transformer, folder)`; the attention layers stay as they are",
    "setup_cogvideo_adapter_eraser": (
        "`pipe.transformer.add_adapter(EraserConfig(...))`, or `load_eraser(pipe.transformer, folder)`"
    ),
    "zero_module": "`EraserConfig(...)`: the second Linear of an eraser begins at zero",
    "AttnMapsCapture": (
        "`concept_mask(...)`, or for the attention itself `concept_attention(transformer, token_mask)` of "
        "`diffusers_ext.eraser.concept_attention`"
    ),
    "get_mask": "`concept_mask(...)`",
    "EraserOutputsCapture": "`with eraser_outputs(transformer) as outputs:` of `diffusers_ext.eraser.adapter.outputs`",
}
ALIASES = {"NoiseSequenceRNN_v2": "NoiseSequenceRNN"}


def missing_name(module: str, name: str) -> ImportError | AttributeError:
    """The error for a public name that is not there.

    An `ImportError` for a documented name, because Python drops the message of an `AttributeError` when a name is
    imported.
    """
    if name in REPLACEMENTS:
        return ImportError(
            f"{module!r} has no {name!r} of the design documents. Use {REPLACEMENTS[name]}.", name=module
        )
    return AttributeError(f"module {module!r} has no attribute {name!r}")


_FROM_THE_WEIGHTS = "nothing: the network's form is read from its file"

# Flags of the documents' scripts, each with what stands for it.
DOCUMENTED_FLAGS = {
    # eraser
    "--model_path": "--pretrained_model_name_or_path",
    "--batch_size": "--train_batch_size",
    "--use_fp16": "--mixed_precision fp16, or bf16",
    "--use_cpu_offload": "nothing: it trains without the text encoder and keeps the VAE on the CPU; "
    "--gradient_checkpointing saves more",
    # golden noise
    "--npnet_weights_path": "--noise_model",
    "--evaluation_prompts_file": "--prompt_file",
    "--metrics": "--reward",
    "--npnet_model_id": _FROM_THE_WEIGHTS,
    "--svd_dropout": _FROM_THE_WEIGHTS,
    "--nt_adapter": _FROM_THE_WEIGHTS,
    "--nt_finetune": _FROM_THE_WEIGHTS,
    "--nt_dropout": _FROM_THE_WEIGHTS,
    "--cross_attention": _FROM_THE_WEIGHTS,
}

# Keys of the `nullbooth:` block of a YAML file, and the arguments that they give.
_BLOCK_NAMES = {
    "original_knowledge_prompts": "knowledge_prompts",
    "num_denoising_steps": "num_inference_steps",
    "nullspace_threshold": "nullspace_threshold",
    "cross_attention_layers": "cross_attention_layers",
    "visual_attention_map": "visual_attention_map",
    "collect_features": "features",
    "enable": "enable",
}


# What the block stands for where statistics are written.
_TREE = {"export_layout": True, "layout_timesteps": "all", "layout_dir": "."}


def read_nullbooth_block(values: dict[str, Any], covariance_dir: str = "statistics") -> dict[str, Any]:
    """Flat arguments from the values of a file whose `nullbooth:` block has the keys of the original system.

    `covariance_dir` is the argument that `cov_matrices_output_dir` gives: `"statistics"` where they are read,
    `"output_dir"` where they are written: as the tree of npy files that readers of the original system's files look
    for, at all timesteps of the run.
    """
    values = dict(values)
    block = values.pop("nullbooth", None) or {}
    if not isinstance(block, dict):
        raise ValueError(f"`nullbooth` must be a mapping, got {block!r}.")
    names = {**_BLOCK_NAMES, "cov_matrices_output_dir": covariance_dir}
    unknown = sorted(block.keys() - names.keys())
    if unknown:
        raise ValueError(
            f"`nullbooth` must have keys among {sorted(names)}, got {unknown}.{did_you_mean(unknown, names)}"
        )
    flat = {names[key]: value for key, value in block.items()}
    if "features" in flat:
        flat["features"] = _chosen_features(flat["features"])
    if block and covariance_dir == "output_dir":
        values = {**_TREE, **values}
    # The file's `output_dir` is the trained model's; the statistics have a folder of their own.
    both = sorted((flat.keys() & values.keys()) - {"output_dir"})
    if both:
        raise ValueError(f"`nullbooth` must not repeat what stands outside of it, got {both}.")
    return {**values, **flat}


def _chosen_features(chosen: Any) -> list[str]:
    wanted = list(chosen.values()) if isinstance(chosen, dict) else []
    if not any(wanted) or not all(isinstance(value, bool) for value in wanted):
        raise ValueError(
            f"`collect_features` must map names like `k_features` to true or false, one at least true, got {chosen!r}."
        )
    return [name.removesuffix("_features") for name, wanted in chosen.items() if wanted]
