"""What ComfyUI, A1111 and managers of models read in a LoRA's metadata: `ss_*`, `sshs_*`, `modelspec.*`.

Names and values are those of kohya's scripts and of Stability AI's ModelSpec 1.0.1. What is not known is left out;
nothing of the machine or of the time is written, so that equal LoRAs are equal files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import save

from diffusers_ext.core.artifacts import tensors_offset
from diffusers_ext.core.tensor_files import DIGEST_KEY
from diffusers_ext.families.registry import FAMILIES

# Depend on the tensors, so they are written anew with every file.
_COMPUTED = ("ss_network_dim", "ss_network_alpha", "sshs_model_hash", "sshs_legacy_hash",
             "modelspec.hash_sha256")  # fmt: skip
# Of the format; scales are folded into B, so the adapter's settings no longer hold.
_FORMAT = ("format", LORA_ADAPTER_METADATA_KEY, DIGEST_KEY)


def kept_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What of a file's metadata goes along when the LoRA is written under other names."""
    return {name: value for name, value in metadata.items() if name not in {*_COMPUTED, *_FORMAT}}


def training_metadata(
    *,
    instance_prompt: str | None = None,
    base_model: str | None = None,
    prediction_type: str | None = None,
    resolution: int | None = None,
    num_pictures: int | None = None,
    caption_counts: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """What is known of a training.

    Args:
        instance_prompt: asks for the subject; the trigger phrase, and the title that managers show.
        resolution: pixels a side that it was trained at.
        caption_counts: how many of them had each caption; all the instance prompt by default.
    """
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}.get(prediction_type or "")
    frequency = {"instance": dict(caption_counts or {instance_prompt: num_pictures})}
    told = {
        "modelspec.title": instance_prompt,
        "modelspec.trigger_phrase": instance_prompt,
        "modelspec.resolution": f"{resolution}x{resolution}" if resolution else None,
        "modelspec.prediction_type": prediction,
        "ss_sd_model_name": base_model,
        "ss_resolution": f"({resolution}, {resolution})" if resolution else None,
        "ss_num_train_images": str(num_pictures) if num_pictures else None,
        "ss_tag_frequency": json.dumps(frequency) if instance_prompt and num_pictures else None,
    }
    return {name: value for name, value in told.items() if value is not None}


def lora_metadata(
    lora: Mapping[str, torch.Tensor], written: Mapping[str, torch.Tensor], kept: Mapping[str, str]
) -> dict[str, str]:
    """The metadata of a file.

    Args:
        kept: entries that are known already; they win over the family that is found here.
    """
    ranks = {tensor.shape[0] for key, tensor in lora.items() if key.endswith(".lora_A.weight")}
    # As kohya's scripts write ranks that differ from module to module.
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    alphas = {str(float(t)) for key, t in written.items() if key.endswith(".alpha")}
    digest = data_hash(written)
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "ss_network_module": "networks.lora",
        **_family(lora, kept),
        **kept,
        "ss_network_dim": dim,
        # Without alphas the scale is 1, which is an alpha as large as the rank.
        "ss_network_alpha": (alphas.pop() if len(alphas) == 1 else dim if dim == "Dynamic" else str(float(dim))),
        "sshs_model_hash": digest,
        "modelspec.hash_sha256": f"0x{digest}",
    }


def data_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of a safetensors file from its tensors on, as kohya's scripts and A1111 identify LoRAs.

    Metadata does not count, so that it may be edited.
    """
    copies = {  # tensors that share memory are not written
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }
    content = save(copies)
    return hashlib.sha256(memoryview(content)[tensors_offset(content) :]).hexdigest()


def _family(lora: Mapping[str, torch.Tensor], kept: Mapping[str, str]) -> dict[str, str]:
    """Version and architecture of the base model, where the width of its text tells."""
    widths = {
        tensor.shape[1]
        for key, tensor in lora.items()
        if key.startswith("unet.") and key.endswith((".attn2.to_k.lora_A.weight",
                                                     ".attn2.to_v.lora_A.weight"))
    }  # fmt: skip
    known = {width: told for f in FAMILIES for width, told in f.lora_versions.items()}
    version, architecture = known.get(widths.pop() if len(widths) == 1 else 0, (None, None))
    if version is None:
        return {}
    prediction = kept.get("modelspec.prediction_type")
    if version == "sd_v2" and prediction:
        kind = "768-v" if prediction == "v" else "512"
        architecture = f"stable-diffusion-v2-{kind}/lora"
    told = {
        "ss_base_model_version": version + ("_v" if prediction == "v" else ""),
        "ss_v2": str(version == "sd_v2"),
        "modelspec.architecture": architecture,
    }
    return {name: value for name, value in told.items() if value is not None}
