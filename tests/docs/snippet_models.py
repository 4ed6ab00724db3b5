"""Tiny models under the names that the pages use, on the local Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from diffusers import (
    CogVideoXPipeline,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusers_ext import GoldenNoiseModel, collect_statistics, save_eraser
from examples.digits.prompts import make_tokenizer
from examples.digits.train_model import build_scheduler, build_vae
from tests.hub_server import HubServer
from tests.hub_storage import Repository
from tests.tiny_clip import save_tiny_clip
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.tiny_erasers import add_random_eraser

BASES = {
    "sd": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "video": "THUDM/CogVideoX-5b",
}
_TOKENS = 77


def _text_encoder(kind: type, width: int) -> torch.nn.Module:
    tokenizer = make_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, projection_dim=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=_TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return kind(config).eval()


def _unet(text_width: int, **config: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(16, 16), norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=text_width,
        **config,
    ).eval()  # fmt: skip


def _tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = _TOKENS
    return tokenizer


def stable_diffusion() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's classes and text of 768 numbers, 32 x 32 pixels."""
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        build_vae().eval(), _text_encoder(CLIPTextModel, 768), _tokenizer(), _unet(768),
        build_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    """SDXL's classes and text of 768 + 1280 numbers, so that published networks fit."""
    torch.manual_seed(0)
    unet = _unet(
        2048, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16, use_linear_projection=True,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        build_vae().eval(), _text_encoder(CLIPTextModel, 768),
        _text_encoder(CLIPTextModelWithProjection, 1280), _tokenizer(), _tokenizer(), unet,
        DDIMScheduler(steps_offset=1, clip_sample=False), add_watermarker=False,
    )  # fmt: skip


def video() -> CogVideoXPipeline:
    """CogVideoX's classes, 9 frames of 16 x 16 pixels."""
    return tiny_video_pipeline()


def save_random_eraser(folder: Path, format: str = "peft", kind: str = "gelu") -> None:
    """An eraser of "dog" for `video()`."""
    transformer = video().transformer
    add_random_eraser(transformer, concept="dog", kind=kind)
    save_eraser(transformer, folder, format=format, base_model_name_or_path=BASES["video"])


def _save_network(folder: Path) -> None:
    GoldenNoiseModel(
        in_channels=4, text_embed_dim=2048, sample_size=8, width=16, num_layers=1, num_heads=2
    ).save_pretrained(folder)


def _save_statistics(folder: Path) -> None:
    prompts = ["a photo of a dog", "a red fox"]
    statistics = collect_statistics(stable_diffusion(), prompts, show_progress=False)
    statistics.facts["base_model"] = BASES["sd"]
    statistics.save_pretrained(folder)


def random_lora(
    component: str, modules: Iterable[tuple[str, torch.nn.Module]], ends: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 on all Linears whose names end so."""
    generator, lora = torch.Generator().manual_seed(0), {}
    for name, module in modules:
        if name.endswith(ends):
            rows, columns = module.weight.shape
            down = torch.randn(2, columns, generator=generator) / 10
            lora[f"{component}.{name}.lora_A.weight"] = down
            lora[f"{component}.{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator) / 10
    return lora


def save_subject(folder: Path, base: StableDiffusionPipeline | StableDiffusionXLPipeline) -> None:
    """A LoRA of the keys and values of a base model's cross-attention."""
    lora = random_lora("unet", base.unet.named_modules(), ("attn2.to_k", "attn2.to_v"))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(lora, folder / "pytorch_lora_weights.safetensors")


def _save_style(folder: Path) -> None:
    modules = video().transformer.named_modules()
    lora = random_lora("transformer", modules, ("attn1.to_q", "attn1.to_v"))
    save_file(lora, folder / "pytorch_lora_weights.safetensors")


SAVED: dict[str, Callable[[Path], object]] = {
    # As published: stored in half precision.
    BASES["sd"]: lambda folder: stable_diffusion().to(torch.float16).save_pretrained(folder),
    BASES["sdxl"]: lambda folder: stable_diffusion_xl().to(torch.float16).save_pretrained(folder),
    BASES["video"]: lambda folder: video().to(torch.bfloat16).save_pretrained(folder),
    "THUDM/CogVideoX-2b": lambda folder: video().to(torch.float16).save_pretrained(folder),
    "openai/clip-vit-large-patch14": save_tiny_clip,
    "yuvalkirstain/PickScore_v1": save_tiny_clip,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": save_tiny_clip,
    "user/network": _save_network,
    "user/statistics": _save_statistics,
    "user/no-dog": save_random_eraser,
    "user/no-logo": save_random_eraser,
    "user/no-watermark": lambda folder: save_random_eraser(folder, kind="linear"),
    "user/style": _save_style,
    "user/some-lora": lambda folder: save_subject(folder, stable_diffusion_xl()),
}


def publish(hub: HubServer, name: str) -> None:
    """Put one of `SAVED` onto the local Hub."""
    with tempfile.TemporaryDirectory() as folder:
        SAVED[name](Path(folder))
        repository = Repository(name, "model", private=False)
        repository.put(Path(folder))
        hub.repos[name] = repository
