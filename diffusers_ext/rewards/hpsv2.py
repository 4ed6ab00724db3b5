"""HPSv2: the preferences of people who ranked pictures of many text-to-image models."""

from __future__ import annotations

import html
import importlib
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from diffusers_ext.core.pictures import rgb_picture
from diffusers_ext.core.sources import check_download_arguments, files_on_hub
from diffusers_ext.core.tensor_files import read_pickled_tensors, read_tensors
from diffusers_ext.rewards.clip import CLIPReward, standardised

_REMEDY = "It must be a checkpoint of nothing but tensors, and may be truncated: download it again."
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_OUTSIDE_BLOCKS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelt so in transformers
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_IN_BLOCKS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def vit_h_14_config() -> CLIPConfig:
    """The model of HPSv2 (and of PickScore): open_clip's ViT-H-14, 986 million parameters."""
    shared = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "projection_dim": 1024, "num_attention_heads": 16}
    vision = {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "image_size": 224, "patch_size": 14,
    }  # fmt: skip
    text = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "max_position_embeddings": 77,
        "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0,
    }  # fmt: skip
    return CLIPConfig(text_config={**text, **shared}, vision_config={**vision, **shared}, projection_dim=1024)


def map_open_clip(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename, and split the attention's joint q/k/v projection."""
    mapped: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        block = _BLOCK.fullmatch(key)
        if key in _OUTSIDE_BLOCKS:
            mapped[_OUTSIDE_BLOCKS[key]] = tensor
        elif key in _TRANSPOSED:
            mapped[_TRANSPOSED[key]] = tensor.t().contiguous()
        elif block is not None:
            tower = "vision_model" if block[1] else "text_model"
            prefix = f"{tower}.encoder.layers.{block[2]}."
            mapped |= {prefix + name: part for name, part in _map_inside(block[3], tensor, key)}
        else:
            raise ValueError(f"`state_dict` must hold an open_clip CLIP model, got the key {key}.")
    return mapped


def _map_inside(name: str, tensor: torch.Tensor, key: str) -> list[tuple[str, torch.Tensor]]:
    """New names and tensors of one tensor inside a transformer block."""
    layer, _, kind = name.rpartition(".")
    if layer in _IN_BLOCKS and kind in ("weight", "bias"):
        return [(f"{_IN_BLOCKS[layer]}.{kind}", tensor)]
    if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = name.removeprefix("attn.in_proj_")
        parts = zip("qkv", tensor.chunk(3))
        return [(f"self_attn.{letter}_proj.{kind}", part.contiguous()) for letter, part in parts]
    raise ValueError(f"`state_dict` must hold an open_clip CLIP model, got the key {key}.")


def check_weights(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Raise `ValueError` unless names and shapes are those of `expected`, one for one."""
    surplus = sorted(weights.keys() - expected.keys())
    missing = sorted(expected.keys() - weights.keys())
    if surplus or missing:
        raise ValueError(
            "The checkpoint must hold exactly the weights of the model, got "
            f"{len(missing)} missing {missing[:3]} and {len(surplus)} surplus {surplus[:3]}."
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"`{name}` must have shape {tuple(expected[name].shape)}, got {tuple(tensor.shape)} in the checkpoint."
            )


def read_checkpoint(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The state dict of a safetensors file, or of a `.pt` file with or without `state_dict` in it."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_tensors(path, remedy=_REMEDY)[0]
    # Only the newer format of `torch.save`, a zip file, can be mapped into memory.
    mmap = path.is_file() and zipfile.is_zipfile(path)
    content = read_pickled_tensors(path, mmap=mmap, remedy=_REMEDY)
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict):
        raise ValueError(f"{path} must hold a state dict, got {type(weights).__name__}.")
    wrong = [key for key, value in weights.items() if not torch.is_tensor(value)]
    if wrong:
        kind = type(weights[wrong[0]]).__name__
        raise ValueError(f"{path} must hold a state dict, got dict with {wrong[0]!r} a {kind}.")
    return weights


def load_open_clip(path: str | os.PathLike, config: CLIPConfig, dtype: torch.dtype = torch.float32) -> CLIPModel:
    """A `CLIPModel` with an open_clip checkpoint's weights, strictly.

    `config` is its structure: the number of heads cannot be read off the weights.
    """
    weights = map_open_clip(read_checkpoint(path))
    with torch.device("meta"):
        check_weights(weights, CLIPModel(config).state_dict())
    # transformers' own loader, because it neither initialises what it overwrites nor forgets the
    # buffers that are in no checkpoint.
    return CLIPModel.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


# https://github.com/openai/CLIP, the statistics of its training pictures.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HPSV2_REPOSITORY = "xswu/HPSv2"
CHECKPOINTS = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
# The published checkpoints come without a tokenizer; this repository holds the one of their model.
TOKENIZER_REPOSITORY = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def letterbox(image: Image.Image, size: int = 224, *, antialias: bool = True) -> torch.Tensor:
    """Resize the longer side to `size`, pad the shorter with black on both ends, normalise.

    As https://github.com/tgxs002/HPSv2/tree/866735ecaae999fa714bd9edfa05aa2672669ee3 does it: bicubic on the float
    tensor, overshoots kept, the smaller half of the padding left and above; `(3, size, size)` float32. What is
    transparent is put on white (the official code fails on an alpha channel). `antialias` is what torchvision does
    since 0.17; `False` as it did when HPSv2 was published.
    """
    # A copy, because PIL's own memory is read-only.
    pixels = torch.from_numpy(np.array(rgb_picture(image))).permute(2, 0, 1).float() / 255
    return letterbox_pixels(pixels[None], size, antialias=antialias)[0]


def letterbox_pixels(pixels: torch.Tensor, size: int = 224, *, antialias: bool = True) -> torch.Tensor:
    """As `letterbox`, of pictures `(n, 3, height, width)` in [0, 1], with a gradient."""
    longer = max(pixels.shape[-2:])
    if longer != size:
        # Python's rounding (half to even), as the official code.
        height, width = (max(round(side * (size / longer)), 1) for side in pixels.shape[-2:])
        pixels = F.interpolate(pixels, size=(height, width), mode="bicubic", align_corners=False, antialias=antialias)
    below, right = size - pixels.shape[-2], size - pixels.shape[-1]
    pixels = F.pad(pixels, (right // 2, right - right // 2, below // 2, below - below // 2))
    return standardised(pixels, CLIP_MEAN, CLIP_STD)


def import_ftfy() -> ModuleType:
    """The package that repairs text; raises `ImportError` with the remedy where it is absent."""
    try:
        return importlib.import_module("ftfy")
    except ModuleNotFoundError as error:
        raise ImportError(
            "HPSv2 needs ftfy to read prompts as its authors did, and ftfy is not installed. "
            "Install it: pip install 'diffusers_ext[rewards]'."
        ) from error


def clean_prompt(prompt: str) -> str:
    """Repair mojibake, unescape HTML twice, join white space, lower the case.

    CLIP tokenizers of transformers do only the last two, so they give other tokens for curly quotes, HTML entities and
    full-width letters.
    """
    text = html.unescape(html.unescape(import_ftfy().fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip().lower()


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int = 77) -> torch.Tensor:
    """Tokens of cleaned prompts: start, at most `length - 2` of text, end, then zeros; int64."""
    cleaned = [clean_prompt(prompt) for prompt in prompts]
    ids = torch.zeros(len(cleaned), length, dtype=torch.long)
    for row, text in zip(ids, cleaned, strict=True):
        tokens = tokenizer(text, truncation=True, max_length=length).input_ids
        row[: len(tokens)] = torch.tensor(tokens)
    return ids


def check_version(version: str) -> str:
    """The version, if it is one that was published; raises `ValueError` otherwise."""
    if version not in CHECKPOINTS:
        raise ValueError(f"`version` must be one of {list(CHECKPOINTS)}, got {version!r}.")
    return version


def locate_checkpoint(source: str | os.PathLike, version: str, download_arguments: dict[str, Any]) -> Path:
    """Path of a version's checkpoint: itself, in a folder by its published name or as safetensors, or on the Hub."""
    name, path = CHECKPOINTS[check_version(version)], Path(source)
    if path.is_file():
        stems = {Path(file).stem: published for published, file in CHECKPOINTS.items()}
        if stems.get(path.stem, version) != version:
            raise ValueError(f"`version` must be {stems[path.stem]!r} for {path.name}, got {version!r}.")
        return path
    if path.is_dir():
        candidates = [path / name, (path / name).with_suffix(".safetensors")]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            held = sorted(entry.name for entry in path.iterdir())
            raise ValueError(
                f"{path} must hold {name} for version {version}, got {held}. Download it from "
                f"https://huggingface.co/{HPSV2_REPOSITORY}."
            )
        return found[0]
    no_folder = (
        "`pretrained_model_name_or_path` must be a file, a folder or 'user/name', got "
        f"{source}: no such file or folder."
    )
    no_file = f"Repository {source} must hold {name}, got none."
    with files_on_hub(source, "HPSv2's weights", no_file=no_file, no_folder=no_folder):
        return Path(hf_hub_download(str(source), name, **download_arguments))


class HPSv2Reward(CLIPReward):
    """`cos(text, image)` of a CLIP trained on ranked pictures (arXiv 2306.09341).

    The number that `hpsv2.score` gives; the tables of its authors show it times 100. Needs the extra `rewards` (ftfy).
    `antialias=False`, of which the attribute `version` tells too, gives the numbers of a torchvision before 0.17,
    which differ by up to 0.003 in the tests' tiny model.
    """

    name = "hpsv2"

    def __init__(
        self, model: CLIPModel, tokenizer: Any, *, version: str = "v2.1", antialias: bool = True, batch_size: int = 16
    ) -> None:
        import_ftfy()
        label = check_version(version) + ("" if antialias else "+no-antialias")
        super().__init__(model, tokenizer, version=label, batch_size=batch_size)
        self.antialias = antialias

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike = HPSV2_REPOSITORY,
        *,
        version: str = "v2.1",
        tokenizer: str | os.PathLike | None = None,
        config: CLIPConfig | None = None,
        antialias: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
        **download_arguments: Any,
    ) -> HPSv2Reward:
        """Load a published checkpoint from a file, a folder that holds it under its published name, or the Hub.

        Args:
            version: `"v2.0"` (what `hpsv2.score` takes unless told otherwise) or `"v2.1"`.
            tokenizer: folder or repository of CLIP's tokenizer. When `None`, the folder of the checkpoint if it holds
                one, else `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`.
            config: structure of the checkpoint; ViT-H-14 when `None`, as published.
            download_arguments: `revision` (of the checkpoint), `cache_dir`, `token`, `local_files_only`.
        """
        check_download_arguments(download_arguments, f"{cls.__name__}.from_pretrained")
        import_ftfy()  # before gigabytes are read
        path = locate_checkpoint(pretrained_model_name_or_path, version, download_arguments)
        if tokenizer is None:
            files = (path.with_name(name) for name in ("tokenizer.json", "vocab.json"))
            tokenizer = path.parent if any(map(Path.is_file, files)) else TOKENIZER_REPOSITORY
        where = {key: value for key, value in download_arguments.items() if key != "revision"}
        words = AutoTokenizer.from_pretrained(str(tokenizer), **where)
        model = load_open_clip(path, config or vit_h_14_config(), dtype).to(device)
        return cls(model, words, version=version, antialias=antialias, batch_size=batch_size)

    def _pixel_values(self, images: Sequence[Image.Image]) -> torch.Tensor:
        size = self.model.config.vision_config.image_size
        return torch.stack([letterbox(i, size, antialias=self.antialias) for i in images])

    def _tensor_values(self, pixels: torch.Tensor) -> torch.Tensor:
        return letterbox_pixels(pixels, self.model.config.vision_config.image_size, antialias=self.antialias)

    def _tokens(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        length = self.model.config.text_config.max_position_embeddings
        return {"input_ids": token_ids(self.tokenizer, prompts, length)}
