"""One of each thing that people share: how to make it, push it, load it and tell it from another."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline, StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict

from diffusers_ext import (
    EraserConfig,
    FeatureStatistics,
    GoldenNoisePipeline,
    NullSpaceDreamBoothPipeline,
    NullSpaceDreamBoothXLPipeline,
    PairDataset,
    PairWriter,
    add_null_space_lora,
    check_loaded_lora,
    collect_statistics,
    export_lora,
    load_eraser,
    load_noise_model,
    open_pairs,
    push_lora,
    save_eraser,
    save_lora,
)
from diffusers_ext.eraser.files import eraser_tensors
from tests.golden_noise.golden_pipelines import FAMILIES, NETWORKS, golden_pipeline, random_network
from tests.golden_noise.pair_sets import SHAPE, STEPS, deltas_of, record
from tests.hub.digests import PROMPT, digest, module_digest, picture, shown_pipeline
from tests.installed_versions import lacking
from tests.tiny_pipelines import sdxl_pipeline

BASE, VIDEO_BASE = "tester/base", "tester/video"
FACTS = {"base_model": BASE, "trained_on": "Random numbers.", "license": "apache-2.0"}


@dataclass(frozen=True)
class Shared:
    """One kind of thing; `digest` of what is loaded equals that of what was pushed."""

    make: Callable[[int], Any]
    push: Callable[..., str]
    load: Callable[..., Any]
    digest: Callable[[Any], str]
    subfolders: bool = True


@cache
def base() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(BASE)


@cache
def video_base() -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel.from_pretrained(VIDEO_BASE, subfolder="transformer")


def network(name: str) -> Callable[[int], torch.nn.Module]:
    """Makes a network with other weights for another seed."""

    def make(seed: int) -> torch.nn.Module:
        made = random_network(GoldenNoisePipeline.from_pipe(base()), name)
        with torch.no_grad():
            next(made.parameters()).add_(seed)
        return made

    return make


def _statistics(seed: int) -> FeatureStatistics:
    return collect_statistics(base(), [PROMPT, "a blue one"][: seed + 1])


def _eraser(seed: int) -> CogVideoXTransformer3DModel:
    transformer = deepcopy(video_base())
    torch.manual_seed(seed)
    config = EraserConfig(r=4, init_weights=False, concept="seven", anchor_concept="digit")
    transformer.add_adapter(config, adapter_name="default")
    return transformer


def push_eraser(
    transformer: CogVideoXTransformer3DModel, repo_id: str, base_model: str = VIDEO_BASE, **arguments: Any
) -> None:
    """Push the eraser `default`."""
    facts = {"trained_on": "Random numbers.", "preserved_concepts": ["one"], "license": "mit"}
    save_eraser(
        transformer, mkdtemp(), base_model_name_or_path=base_model,
        push_to_hub=True, repo_id=repo_id, **facts, **arguments,
    )  # fmt: skip


def _load_eraser(repo_id: str, **arguments: Any) -> CogVideoXTransformer3DModel:
    transformer = deepcopy(video_base())
    load_eraser(transformer, repo_id, **arguments)
    return transformer


def _lora(seed: int) -> StableDiffusionPipeline:
    """A pipeline as its training leaves it."""
    pipeline = StableDiffusionPipeline.from_pretrained(BASE)
    statistics = collect_statistics(pipeline, ["a blue one"], expand_sub_phrases=False)
    add_null_space_lora(pipeline.unet, statistics, instance_prompts=[PROMPT], pipeline=pipeline, rank=2)
    torch.manual_seed(seed)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    pipeline.trained_under = statistics  # for `_push_lora`
    return pipeline


def _push_lora(pipeline: StableDiffusionPipeline, repo_id: str, **arguments: Any) -> str:
    trained, file = mkdtemp(), Path(mkdtemp(), "exported.safetensors")
    save_lora(type(pipeline), pipeline.unet, trained)
    export_lora(trained, output_path=file)
    return push_lora(
        file, repo_id, instance_prompt=PROMPT, pipeline=StableDiffusionPipeline,
        directions="generalized", trained_on="Random numbers.", base_model=BASE, license="mit",
        statistics=pipeline.trained_under, **arguments,
    )  # fmt: skip


def _load_lora(repo_id: str, **arguments: Any) -> StableDiffusionPipeline:
    pipeline = base()
    pipeline.unload_lora_weights()
    # diffusers looks for another name only while it may ask the Hub.
    pipeline.load_lora_weights(repo_id, weight_name="pytorch_lora_weights.safetensors", **arguments)
    check_loaded_lora(pipeline)
    return pipeline


def _lora_digest(pipeline: StableDiffusionPipeline) -> str:
    name = next(iter(pipeline.unet.peft_config))
    layers = get_peft_model_state_dict(pipeline.unet, adapter_name=name)
    return f"{digest(layers)} {picture(pipeline)}"


def _pairs(seed: int) -> PairDataset:
    folder = Path(mkdtemp(), "pairs")
    writer = PairWriter(folder, SHAPE, STEPS, num_shards=1, facts={"w1": 5.5})
    writer.create()
    deltas = deltas_of([0, 1, 2]) + seed
    writer.write_part(0, 0, deltas, [record(0), record(1), record(2)], [record(3)])
    writer.finish_shard(0, 1)
    return open_pairs(folder)


def _push_pairs(pairs: PairDataset, repo_id: str, **arguments: Any) -> str:
    facts = {**FACTS, "pipeline": "StableDiffusionPipeline", "reward": ""}
    return pairs.push_to_hub(repo_id, **facts, **arguments)


def _pairs_digest(pairs: PairDataset) -> str:
    items = [pairs[index] for index in range(len(pairs))]
    values = {f"{index} {item['prompt']}": item["golden"] for index, item in enumerate(items)}
    return digest(values)


def _golden(seed: int) -> GoldenNoisePipeline:
    pipeline = GoldenNoisePipeline.from_pipe(base())
    pipeline.set_noise_model(network("model")(seed))
    return pipeline


def _null_space(seed: int) -> NullSpaceDreamBoothPipeline:
    return NullSpaceDreamBoothPipeline.from_pipe(base(), statistics=_statistics(seed))


def push_pipeline(pipeline: DiffusionPipeline, repo_id: str, **arguments: Any) -> str:
    """With the facts that its card needs."""
    facts = dict(FACTS)
    if "statistics" in pipeline.components:
        facts["instance_prompt"] = PROMPT
    return pipeline.push_to_hub(repo_id, **facts, **arguments)


SHARED = {
    **{
        name: Shared(
            network(name),
            lambda made, repo_id, **arguments: made.push_to_hub(repo_id, **FACTS, **arguments),
            load_noise_model,
            module_digest,
        )
        for name in NETWORKS
    },
    "statistics": Shared(
        _statistics,
        lambda made, repo_id, **arguments: made.push_to_hub(repo_id, license="mit", **arguments),
        FeatureStatistics.from_pretrained,
        lambda made: digest(made._to_artifact()[1]),
    ),
    "eraser": Shared(_eraser, push_eraser, _load_eraser, lambda made: digest(eraser_tensors(made, "default"))),
    "lora": Shared(_lora, _push_lora, _load_lora, _lora_digest),
    "pairs": Shared(_pairs, _push_pairs, open_pairs, _pairs_digest),
    "golden": Shared(_golden, push_pipeline, GoldenNoisePipeline.from_pretrained, shown_pipeline, subfolders=False),
    "null": Shared(
        _null_space, push_pipeline, NullSpaceDreamBoothPipeline.from_pretrained, shown_pipeline, subfolders=False
    ),
}
# The pipelines of the other families are pushed once and loaded once.
PIPELINES = {
    **{
        family: (known.golden, lambda family=family: golden_pipeline(family))
        for family, known in FAMILIES.items()
        if family != "sd" and lacking(family) is None
    },
    "null-xl": (
        NullSpaceDreamBoothXLPipeline,
        lambda: NullSpaceDreamBoothXLPipeline.from_pipe(
            xl := sdxl_pipeline(), statistics=collect_statistics(xl, [PROMPT])
        ),
    ),
}
