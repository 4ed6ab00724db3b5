"""Base models as users name them: a folder or Hub name of diffusers, or one file of Stable Diffusion."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ext.core.sources import not_found
from diffusers_ext.families import FAMILIES

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, UNet2DConditionModel


_ARGUMENT = "pretrained_model_name_or_path"
_PICKLES = (".ckpt", ".pt", ".pth")
_WHOLE = "a whole Stable Diffusion or SDXL checkpoint (UNet, VAE and text encoders)"
_UNET = "model.diffusion_model."
_VAES = ("first_stage_model.", "vae.")
_READ_TYPES = ("v1", "v2", "xl_base")  # by diffusers' names
_CONFIG_FILES = ["*.json", "**/*.json", "*.txt", "**/*.txt"]


def is_single_file(source: str | os.PathLike) -> bool:
    """Whether a base model is named by a file of weights, there or not."""
    suffix = Path(source).suffix.lower()
    return suffix in (".safetensors", *_PICKLES) and not Path(source).is_dir()


def refuse_single_file(source: str | os.PathLike, kind: str) -> None:
    """Raise `ValueError` where a model that diffusers reads from folders only is named by a file."""
    if is_single_file(source):
        raise ValueError(
            f"`{_ARGUMENT}` must be a folder or Hub name of {kind}, got {source}, a single file, which is "
            "not read here. Give the model in the layout of diffusers."
        )


def read_base_config(
    source: str | os.PathLike, *, revision: str | None = None, single_file_config: str | None = None
) -> dict[str, Any]:
    """The `model_index.json` of a base model, of a single file that of its config; reads no weights.

    Raises:
        ValueError: no pipeline, a file that is none, or no config for it.
    """
    from diffusers import DiffusionPipeline

    argument, kind, place = _ARGUMENT, "a pipeline", source
    if is_single_file(source):
        argument, kind = "single_file_config", "a diffusers model"
        place = config_place(source, revision=revision, single_file_config=single_file_config)
    elif single_file_config is not None:
        raise ValueError(
            f"`single_file_config` must be given with a single file only, got {single_file_config} with "
            f"the base model {source}. Leave it out."
        )
    try:
        found = DiffusionPipeline.load_config(place, revision=revision)
    except OSError as error:
        raise ValueError(not_found(argument, place, kind, error)) from error
    if is_single_file(source):
        expected, _ = _family(source)
        if found["_class_name"] != expected:
            raise ValueError(
                f"`single_file_config` must be a {expected} like {source}, got a "
                f"{found['_class_name']} in {place}. Name a model of the file's family."
            )
    return found


def config_place(
    source: str | os.PathLike, *, revision: str | None = None, single_file_config: str | None = None
) -> str:
    """Where the configs of a base model's components lie; a Hub name only where `source` is one.

    Raises:
        ValueError: a file that is no pipeline, or a config that cannot be found.
    """
    if not is_single_file(source):
        return str(source)
    _, default = _family(source)
    config = str(single_file_config or default)
    if Path(config).is_dir():
        return config
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return snapshot_download(config, revision=revision, allow_patterns=_CONFIG_FILES)
    except (OSError, HFValidationError) as error:
        kind = f"a diffusers model whose configs and tokenizer {source} is read with"
        raise ValueError(not_found("single_file_config", config, kind, error)) from error


def load_base(
    source: str | os.PathLike,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    variant: str | None = None,
    single_file_config: str | None = None,
    **components: Any,
) -> DiffusionPipeline:
    """A base model's pipeline from a folder, the Hub or one file of Stable Diffusion or SDXL.

    Args:
        revision: on the Hub, of a single file that of its config.
        variant: of the weight files; a single file has none.
        single_file_config: folder or Hub name of a diffusers model whose configs, scheduler and tokenizer a single
            file is read with; what diffusers infers from the file without it.
        components: as of `DiffusionPipeline.from_pretrained`; `None` leaves one out.

    Raises:
        ValueError: as `read_base_config`, a variant of a file, or a file that its config does not fit.
    """
    import diffusers

    if not is_single_file(source):
        return _load_saved(source, revision, variant, dtype, components)
    if variant is not None:
        raise ValueError(f"`variant` must be left out with the single file {source}, got {variant!r}.")
    index = read_base_config(source, revision=revision, single_file_config=single_file_config)
    place = config_place(source, revision=revision, single_file_config=single_file_config)
    if "requires_safety_checker" in index:  # which single files do not have
        components = {"safety_checker": None, **components, "requires_safety_checker": False}
    pipeline_class = getattr(diffusers, index["_class_name"])
    pipeline = _converted(pipeline_class, source, place, dtype=dtype, **components)
    for name, component in pipeline.components.items():
        _check_whole(component, name, source, place)
    return pipeline


def _load_saved(
    source: str | os.PathLike,
    revision: str | None,
    variant: str | None,
    dtype: torch.dtype,
    components: dict[str, Any],
) -> DiffusionPipeline:
    """From a folder or the Hub; refuses what transformers 4, where that is installed, fills with random weights."""
    from diffusers import DiffusionPipeline

    from diffusers_ext.hub.saved_pipelines import check_readable, with_known_dtype

    chosen = {"revision": revision, "variant": variant}
    known = check_readable(source, _ARGUMENT, **chosen, given=components)
    arguments = with_known_dtype({**chosen, "dtype": dtype, **components})
    pipeline = DiffusionPipeline.from_pretrained(source, **arguments)
    if not known:
        check_readable(source, _ARGUMENT, **chosen, given=components, loaded=True)
    return pipeline


def load_single_file_unet(source: str | os.PathLike, place: str) -> UNet2DConditionModel:
    """The UNet of a single file, whose `config_place` is `place`."""
    from diffusers import UNet2DConditionModel

    return _converted(UNet2DConditionModel, source, place, subfolder="unet")


def _converted(kind: type, source: str | os.PathLike, place: str, **arguments: Any) -> Any:
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    from diffusers_ext.hub.saved_pipelines import with_known_dtype

    try:
        return kind.from_single_file(str(source), config=place, **with_known_dtype(arguments))
    except (SingleFileComponentError, OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if "meta tensor" in reason:  # torch's word for weights that were not in the file
            reason = "the file lacks weights that they describe; get it again if it is the right model"
        raise ValueError(
            f"`single_file_config` must be a model whose configs fit {source}, got {place}: {reason[:500]}"
        ) from error


def _check_whole(component: Any, name: str, source: str | os.PathLike, place: str) -> None:
    # Weights that a file lacks stay without memory, and diffusers says nothing.
    parameters = getattr(component, "named_parameters", dict)
    lacking = [key for key, tensor in dict(parameters()).items() if tensor.is_meta]
    if lacking:
        raise ValueError(
            f"`{_ARGUMENT}` must hold all weights that the configs in {place} describe, got {source} "
            f"without {len(lacking)} of the {name}, such as {lacking[0]}. Name the file's own model by "
            "`single_file_config`, or get the file again."
        )


def _family(source: str | os.PathLike) -> tuple[str, str]:
    """The pipeline class of a single file, and the Hub name of the configs that diffusers infers."""
    import torch
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type

    from diffusers_ext.core.tensor_files import open_tensors

    path = Path(source)
    if not path.exists():
        raise ValueError(
            f"`{_ARGUMENT}` must be a folder, a Hub name or a .safetensors file, got {source}: no such file."
        )
    if path.suffix.lower() in _PICKLES:
        raise ValueError(
            f"`{_ARGUMENT}` must be a .safetensors file, got {source}: a pickle, which can run code when it "
            "is read. Convert it where you trust it, or get the model as .safetensors."
        )
    handle = open_tensors(path)
    shapes = {key: torch.empty(handle.get_slice(key).get_shape(), device="meta") for key in handle.keys()}
    starts = lambda *prefixes: any(key.startswith(prefixes) for key in shapes)
    known = {f.single_file_prefix: f.pipelines[0] for f in FAMILIES if f.single_file_prefix}
    family = next((name for prefix, name in known.items() if starts(prefix)), None)
    if family is None or not starts(_UNET) or not starts(*_VAES):
        raise ValueError(f"`{_ARGUMENT}` must be {_WHOLE}, got {source}: {_what_it_is(shapes)}.")
    model_type = infer_diffusers_model_type(shapes)
    if model_type not in _READ_TYPES:
        raise ValueError(
            f"`{_ARGUMENT}` must be {_WHOLE} that draws from text alone, got {source}: diffusers takes it "
            f"for {model_type!r}."
        )
    return family, fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]


def _what_it_is(names: dict[str, Any]) -> str:
    if any("lora" in name.lower() for name in names):
        return "a LoRA. Name the base model that it was trained on"
    if "emb_params" in names:
        return "a textual inversion. Name the base model that it was trained on"
    if any(name.startswith(_UNET) for name in names):
        return "its denoiser without the VAE and text encoders. Give the model as a folder of diffusers"
    if any(name.startswith(("down_blocks.", "encoder.", "text_model.")) for name in names):
        return "one component. Give the folder of diffusers with all of them, or the whole checkpoint"
    return f"tensors such as {min(names, default='none')!r}. Give the model as a folder of diffusers"


def check_xformers() -> None:
    """Raise `ValueError` where xFormers cannot compute attention."""
    import torch
    from diffusers.utils import is_xformers_available

    if not is_xformers_available() or not torch.cuda.is_available():
        lacking = "no CUDA device" if is_xformers_available() else "no such package"
        raise ValueError(
            "`enable_xformers_memory_efficient_attention` must have xFormers on a CUDA device, got "
            f"{lacking}. Leave it out: PyTorch's scaled_dot_product_attention, which runs without "
            "it, is memory-efficient as well."
        )
