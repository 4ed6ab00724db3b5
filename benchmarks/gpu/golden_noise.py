"""Golden noise on a GPU: what the networks take in terms of the drawing that they prepare, at SDXL's size."""

from __future__ import annotations

import statistics

import torch
from diffusers import DiffusionPipeline

from benchmarks.gpu.device import WEIGHTS, Place
from benchmarks.gpu.models import SDXL, fill, make_pipeline, weight_bytes
from benchmarks.timing import seconds
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.golden_noise.networks.base import GoldenNoiseNetwork
from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel
from diffusers_ext.golden_noise.networks.npnet import NPNet

NETWORKS = {"NPNet": NPNet, "GoldenNoiseModel": GoldenNoiseModel}
# Steps and guidance of a usual drawing, and of a distilled model.
RUNS = {50: 5.0, 4: 1.0}
_TINY = {
    "NPNet": {
        "svd_hidden_dim": 4,
        "svd_output_dim": 16,
        "svd_num_heads": 2,
        "swin_image_size": 28,
        "swin_patch_size": 2,
        "swin_embed_dim": 12,
        "swin_depths": [1, 1],
        "swin_num_heads": [1, 2],
    },
    "GoldenNoiseModel": {"width": 32, "num_layers": 1, "num_heads": 2},
}


def make_network(name: str, pipeline: DiffusionPipeline, place: Place) -> GoldenNoiseNetwork:
    """A network for SDXL in float32, as it is used."""
    config = pipeline.unet.config
    fitted = {"sample_size": config.sample_size, "text_embed_dim": config.cross_attention_dim}
    with torch.device("meta"):
        network = NETWORKS[name](**fitted, **(_TINY[name] if place.toy else {}))
    return fill(network, place.device).eval().requires_grad_(False)


def networks_and_runs(place: Place) -> None:
    """Both networks, in float32 and in bf16, against a picture's 50 guided steps and 4 unguided ones."""
    place.within_memory("Golden noise", lambda: _measure(place), weight_bytes(SDXL, place.toy), WEIGHTS)


def _measure(place: Place) -> None:
    pipeline = make_pipeline(SDXL, place.toy, place.device)
    unet = pipeline.unet.config
    made = {"device": place.device, "dtype": torch.bfloat16}
    text = torch.randn(1, 77, unet.cross_attention_dim, **made)
    pooled = torch.randn(1, unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim, **made)
    given = {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "output_type": "latent"}
    given |= {"negative_prompt_embeds": -text, "negative_pooled_prompt_embeds": -pooled}
    runs = {}
    for steps, guidance in RUNS.items():
        asked = {"num_inference_steps": min(steps, 2) if place.toy else steps, "guidance_scale": guidance}

        def draw(asked: dict = asked) -> None:
            with quiet_run(pipeline):
                pipeline(**given, **asked)

        draw()
        runs[steps] = min(seconds(draw) for _ in range(place.repeats(2)))
        place.tell_time(f"SDXL: latents in {steps} steps with guidance {guidance:g}", runs[steps])
    noise = torch.randn(1, 4, unet.sample_size, unet.sample_size, device=place.device)
    for name in NETWORKS:
        network = make_network(name, pipeline, place)
        for dtype in (torch.float32, torch.bfloat16):
            torch.nn.Module.to(network, dtype)  # that of diffusers has a warning about every cast
            network.refine(noise, text)
            taken = statistics.median(seconds(lambda: network.refine(noise, text)) for _ in range(place.repeats(20)))  # noqa: B023
            for steps, run in runs.items():
                what = f"{name} in {str(dtype).removeprefix('torch.')}, one noise"
                place.tell_time(what, taken, run, f"{steps} steps")
