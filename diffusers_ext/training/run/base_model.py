"""The base model of a run: frozen, whole or its text encoders alone, and what tells its denoiser from others."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import PipelineQuantizationConfig
from diffusers.quantizers.quantization_config import BitsAndBytesConfig
from huggingface_hub import snapshot_download

from diffusers_ext.core.artifacts import fingerprint, same_fingerprint
from diffusers_ext.core.settings import ModelSettings
from diffusers_ext.core.tensor_files import open_tensors
from diffusers_ext.families import match_family
from diffusers_ext.families.base_source import (
    config_place,
    is_single_file,
    load_base,
    load_single_file_unet,
    read_base_config,
)
from diffusers_ext.nullspace.settings import QUANTIZATIONS
from diffusers_ext.training.run.setup import WEIGHT_DTYPES

logger = logging.getLogger(__name__)

DENOISERS = ("unet", "transformer")
# What else has no part in encoding text; schedulers are small, and pipelines demand them.
_NOT_TEXT = (*DENOISERS, "transformer_2", "vae", "safety_checker", "feature_extractor", "image_encoder")


def load_frozen(
    settings: ModelSettings, dtype: torch.dtype, *, with_filter: bool = False, **components: Any
) -> DiffusionPipeline:
    """The base pipeline on the CPU, frozen, in evaluation mode, without a progress bar.

    Without a safety checker too, unless it comes `with_filter`: a black picture in place of a refused one would be
    measured like any other. `components` are as of `load_base`.

    Raises:
        ValueError: `--pretrained_model_name_or_path` is no pipeline.
    """
    known = read_components(settings)
    if not with_filter:
        without = {"safety_checker": None, "requires_safety_checker": False}
        components = {**{name: value for name, value in without.items() if name in known}, **components}
    pipeline = load_base(
        settings.pretrained_model_name_or_path,
        revision=settings.revision,
        variant=settings.variant,
        single_file_config=getattr(settings, "single_file_config", None),
        dtype=dtype,
        **components,
    )
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def quantization_arguments(settings: ModelSettings, dtype: torch.dtype) -> dict[str, Any]:
    """Of `load_frozen`, for a denoiser of `--quantization` that computes in a dtype; none without it.

    Raises:
        ValueError: there is no GPU, without which diffusers lets bitsandbytes quantise nothing.
    """
    if settings.quantization is None:
        return {}
    package, keywords = QUANTIZATIONS[settings.quantization]
    if package == "bitsandbytes" and not torch.accelerator.is_available():
        raise ValueError(
            f"`quantization` must be left out where there is no GPU, got {settings.quantization!r}: bitsandbytes "
            "quantises for diffusers on GPUs alone."
        )
    keywords = {**keywords, "bnb_4bit_compute_dtype": dtype} if "load_in_4bit" in keywords else keywords
    name = denoiser_name(read_components(settings), settings.pretrained_model_name_or_path)
    # By their own names: those at the top ask for the package.
    mapping = {name: BitsAndBytesConfig(**keywords)}
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)}


@dataclass(frozen=True)
class DenoiserStandIn:
    """What pipelines ask their denoiser while they encode text; it has no weights."""

    config: FrozenDict
    dtype: torch.dtype


def load_text_pipeline(settings: ModelSettings, device: torch.device) -> DiffusionPipeline:
    """`load_frozen` without denoiser and VAE, in the dtype of `--mixed_precision`."""
    source, dtype = settings.pretrained_model_name_or_path, WEIGHT_DTYPES[settings.mixed_precision]
    components = read_components(settings)
    family = match_family(components["_class_name"])
    needed = () if family is None else family.read_by_constructor
    left_out = [name for name in _NOT_TEXT if name in components and name not in needed]
    pipeline = load_frozen(settings, dtype, **dict.fromkeys(left_out))
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.to(device)
    name = denoiser_name(components, source)
    config_file = getattr(settings, "single_file_config", None)
    place = config_place(source, revision=settings.revision, single_file_config=config_file)
    config = denoiser_class(components[name]).load_config(place, subfolder=name, revision=settings.revision)
    setattr(pipeline, name, DenoiserStandIn(FrozenDict(config), dtype))
    return pipeline


def read_components(settings: ModelSettings) -> dict[str, Any]:
    """The base model's `model_index.json`; raises `ValueError` where there is none."""
    return read_base_config(
        settings.pretrained_model_name_or_path,
        revision=settings.revision,
        single_file_config=getattr(settings, "single_file_config", None),
    )


def denoiser_name(components: dict[str, Any], source: str) -> str:
    """`"unet"` or `"transformer"`; raises `ValueError` for a pipeline that has neither."""
    found = [name for name in DENOISERS if name in components]
    if not found:
        raise ValueError(
            f"`pretrained_model_name_or_path` must have one of {DENOISERS}, got {source} with "
            f"{sorted(name for name in components if not name.startswith('_'))}."
        )
    return found[0]


def denoiser_class(entry: list[str]) -> type[diffusers.ModelMixin]:
    """The class that an entry of `model_index.json` names."""
    library, name = entry
    if library != "diffusers" or not hasattr(diffusers, name):
        raise ValueError(f"The denoiser must be a class of diffusers, got {name} of {library}.")
    return getattr(diffusers, name)


def stored_fingerprint(settings: ModelSettings) -> dict[str, Any]:
    """`fingerprint` of the base model's denoiser, read from its files without loading it.

    The probe is empty where the weights of a Hub model are not on this machine.
    """
    source, components = settings.pretrained_model_name_or_path, read_components(settings)
    name = denoiser_name(components, source)
    model_class = denoiser_class(components[name])
    if is_single_file(source):
        config_file = getattr(settings, "single_file_config", None)
        place = config_place(source, revision=settings.revision, single_file_config=config_file)
        return fingerprint(load_single_file_unet(source, place))
    config = model_class.load_config(source, subfolder=name, revision=settings.revision)
    with torch.device("meta"):
        model = model_class.from_config(config)
    tensors: dict[str, torch.Tensor] = {}
    for file in _weight_files(source, name, settings):
        handle = open_tensors(file)  # maps the file; only what is looked at is read
        tensors.update({key: handle.get_tensor(key) for key in handle.keys()})
    missing = model.load_state_dict(tensors, assign=True, strict=False).missing_keys
    if not missing:
        return fingerprint(model)
    logger.info(f"The weights of {source}/{name} are not here; only its structure is compared.")
    with torch.device("cpu"):
        zeros = {n: torch.zeros(()).expand(p.shape) for n, p in model.named_parameters()}
    model.load_state_dict(zeros, assign=True, strict=False)
    return {**fingerprint(model), "probe": []}


def check_base_model(settings: ModelSettings, pipeline: DiffusionPipeline, made_with: dict[str, Any] | None) -> None:
    """Raise `ValueError` unless noise pairs were made with the denoiser and text encoders of a base.

    `made_with` are fingerprints of the models that made the pairs, by name of the component, where they are known.
    """
    for name, expected in (made_with or {}).items():
        component = getattr(pipeline, name, None)
        if isinstance(component, torch.nn.Module):
            found = fingerprint(component)
        elif name in DENOISERS and component is not None:
            found = stored_fingerprint(settings)
        else:
            continue  # the VAE has no part in what is learned
        same = found["architecture"] == expected["architecture"]
        if same and found["probe"]:
            same = same_fingerprint(found, expected)
        if not same:
            raise ValueError(
                "`pretrained_model_name_or_path` must be the model that `dataset_dir` was made "
                f"with, got {settings.pretrained_model_name_or_path}, whose {name} has other weights. "
                "Name that model, or make pairs with this one."
            )


def _weight_files(source: str, name: str, settings: ModelSettings) -> list[Path]:
    folder = Path(source)
    if not folder.is_dir():
        # The text encoders have just been fetched, so the snapshot is there, though not all of it;
        # nothing is downloaded.
        folder = Path(
            snapshot_download(
                source, revision=settings.revision, local_files_only=True,
                allow_patterns="model_index.json",
            )
        )  # fmt: skip
    files = sorted((folder / name).glob("*.safetensors"))
    variant = f".{settings.variant}" if settings.variant else None
    chosen = [file for file in files if variant and variant in file.name]
    return chosen or [file for file in files if file.name.count(".") == 1] or files
