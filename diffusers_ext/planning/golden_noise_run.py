"""The run of golden noise: pairs are made and judged, then a network is trained on them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from diffusers_ext.core.tracing import tensor_bytes
from diffusers_ext.planning.base_model import BaseModel
from diffusers_ext.planning.disk_sizes import (
    REPORT_BYTES,
    checkpoint_bytes,
    kept_checkpoints,
    safetensors_bytes,
)
from diffusers_ext.planning.golden_noise_setting import REWARDS, GoldenNoiseSetting
from diffusers_ext.planning.image_shapes import ImageShapes
from diffusers_ext.planning.image_works import (
    decode_work,
    encode_prompts_work,
    guided_work,
    redenoise_work,
)
from diffusers_ext.planning.network_works import (
    kept_name,
    network_of,
    network_works,
    validation_work,
)
from diffusers_ext.planning.run_draft import Phase, RunDraft
from diffusers_ext.planning.work import WEIGHT_DTYPES, Job, Precision, Work
from diffusers_ext.rewards.open_clip_weights import vit_h_14_config


_REWARD_BATCH = 16
# Of the tables: a row beside its prompt's text, and a file with its columns.
_ROW_BYTES, _TABLES_BYTES = 56, 8 * 1024
_NETWORK, _COPY = "network", "copy of the weights while measuring"
_REWARD = "reward model"


def draft_golden_noise(base: BaseModel, *, as_on_gpu: bool = True, **setting: Any) -> RunDraft:
    """The phases of making pairs and training a network.

    Args:
        base: a pipeline that golden noise is known for.
        as_on_gpu: shapes are traced as a GPU runs them.
        setting: fields of `GoldenNoiseSetting`.

    Raises:
        ValueError: another pipeline, or a setting that the model cannot take.
    """
    run = GoldenNoiseSetting(**setting)
    shapes = ImageShapes(base, run.output_size)
    precision = Precision(WEIGHT_DTYPES[run.mixed_precision], as_on_gpu)
    network = network_of(shapes, run)
    weights = tensor_bytes([*network.parameters(), *network.buffers()])
    loaded = {
        name.replace("_", " "): part.bytes(precision.dtype)
        for name, part in base.components.items()
        if name != "safety_checker"
    }
    parts = {**loaded, _NETWORK: weights}
    if run.use_ema:
        parts[_COPY] = weights
    notes = [f"{run.kept_share:.0%} of the pairs that are tried are kept."]
    if run.reward in REWARDS:
        parts[_REWARD] = tensor_bytes(_reward_model(run.reward).parameters())
    elif run.reward is not None:
        notes.append(f"What the reward {run.reward!r} takes is not counted.")
    phases = _phases(shapes, run, precision, tuple(loaded), parts)
    filled = {**asdict(run), "output_size": shapes.resolution}
    return RunDraft("golden-noise", base, filled, parts, phases, _disk(shapes, run, network), notes)


def _phases(
    shapes: ImageShapes,
    run: GoldenNoiseSetting,
    precision: Precision,
    loaded: tuple[str, ...],
    parts: dict[str, int],
) -> list[Phase]:
    encoders = tuple(name.replace("_", " ") for name in shapes.base.text_encoders)
    judged = (_REWARD,) if _REWARD in parts else ()
    pairs = (*loaded, *judged)
    batches = math.ceil(run.candidates / run.batch_size)
    rows = min(run.batch_size, run.candidates)
    asked = 1 if shapes.embedded_guidance else 2  # the negative prompts are encoded too
    phases = [
        Phase(
            "re-denoising",
            pairs,
            [
                encode_prompts_work(shapes, rows, asked * batches, precision),
                redenoise_work(shapes, run, rows, batches, precision),
            ],
        )
    ]
    if run.reward is not None:
        phases.append(Phase("judging", pairs, _judging(shapes, run, precision, rows, batches)))
    text_rows = min(run.text_batch_size, run.num_prompts)
    text = encode_prompts_work(shapes, text_rows, asked * run.num_prompts / text_rows, precision)
    phases.append(Phase("encoding text", encoders, [text]))
    trains = (_NETWORK, kept_name(run))
    phases.append(Phase("training", trains, network_works(shapes, run, precision)))
    times = math.ceil(run.max_train_steps / (run.validation_steps or run.max_train_steps))
    measured = min(run.train_batch_size, run.pairs)
    work = validation_work(shapes, run, measured, times * run.validation_pairs / measured)
    copied = (*trains, _COPY) if run.use_ema else trains
    return [*phases, Phase("validation", copied, [work])]


def _judging(
    shapes: ImageShapes, run: GoldenNoiseSetting, precision: Precision, rows: int, batches: int
) -> list[Work]:
    """Pictures of both noises are drawn together, decoded one by one, then judged."""
    dtype = precision.dtype
    if dtype == torch.float16 and shapes.base.components["vae"].whole_config().force_upcast:
        dtype = torch.float32
    calls = batches * run.num_inference_steps
    works = [
        guided_work(shapes, 2 * rows, run.guidance_scale, calls, precision),
        decode_work(shapes, 1, 2 * rows * batches, dtype),
    ]
    if run.reward in REWARDS:
        works.append(_reward_work(run.reward, 2 * rows, batches))
    return works


def _reward_model(reward: str) -> CLIPModel:
    config = vit_h_14_config()
    if reward == "clip_score":  # ViT-L-14
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
        vision |= {"num_attention_heads": 16, "patch_size": 14}
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)
    with torch.device("meta"):
        return CLIPModel(config).requires_grad_(False).eval()


def _reward_work(reward: str, pictures: int, batches: int) -> Work:
    rows = min(_REWARD_BATCH, pictures)

    def make() -> Job:
        model = _reward_model(reward)
        side = model.config.vision_config.image_size

        def begin(device: torch.device) -> Callable[[], object]:
            pixels = torch.randn(rows, 3, side, side, device=device)
            tokens = torch.zeros(rows, 77, dtype=torch.long, device=device)

            @torch.no_grad()
            def repeat() -> None:
                model.get_image_features(pixel_values=pixels)
                model.get_text_features(input_ids=tokens)

            return repeat

        return Job([model], begin)

    return Work("reward's activations", batches * pictures / rows, make)


def _disk(shapes: ImageShapes, run: GoldenNoiseSetting, network: torch.nn.Module) -> dict[str, int]:
    """Files that both scripts leave, and the embeddings that the training keeps."""
    numbers = math.prod(shapes.latents)
    shards = math.ceil(run.candidates / run.shard_size)
    tables = shards * _TABLES_BYTES + run.candidates * _ROW_BYTES
    disk = {"pairs": 2 * numbers * run.num_steps * run.pairs + tables + REPORT_BYTES}
    text = shapes.text.tokens * shapes.text.width + (shapes.text.pooled or 0)
    size = 2 if run.text_cache_dtype == "fp16" else 4
    disk["text embeddings (in the host's memory, or on disk)"] = run.num_prompts * text * size
    weights = dict(network.state_dict())
    structure = len(json.dumps(dict(network.config), default=str))
    disk["network"] = safetensors_bytes(weights) + structure + 2 * REPORT_BYTES
    count = kept_checkpoints(
        run.max_train_steps, run.checkpointing_steps, run.checkpoints_total_limit
    )
    if count:
        trained = [p for p in network.parameters() if p.requires_grad]
        disk["checkpoints"] = count * checkpoint_bytes(trained, trained, ema=run.use_ema)
    return disk
