"""Train a golden-noise network: from pairs NPNet or GoldenNoiseModel, from sequences a transformer or an RNN.

    accelerate launch -m diffusers_ext.training.noise --model golden_noise_model \\
        --pretrained_model_name_or_path examples/digits/model \\
        --dataset_dir outputs/pairs --use_ema --output_dir outputs/golden_noise_model

The flags of sequence networks are shown by `--model transformer --help`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel
from torch.utils.data import Dataset

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.families import find_family
from diffusers_ext.golden_noise.losses import PairLoss, SequenceLoss
from diffusers_ext.golden_noise.networks.base import fitted_structure, load_noise_model
from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel
from diffusers_ext.golden_noise.networks.npnet import NPNet, refuse_npnet
from diffusers_ext.golden_noise.networks.sequence_rnn import NoiseSequenceRNN
from diffusers_ext.golden_noise.networks.sequence_transformer import NoiseSequenceTransformer
from diffusers_ext.golden_noise.redenoise import TOOL
from diffusers_ext.golden_noise.text_cache import TextCache
from diffusers_ext.training.golden_noise.by_reward import RewardTraining, RewardValidation
from diffusers_ext.training.golden_noise.data import (
    NoiseSamples,
    PromptSplit,
    count_steps,
    data_facts,
    read_pairs,
    sequence_steps,
    split_by_prompt,
    target_steps,
)
from diffusers_ext.training.golden_noise.kept_text import drop_own_text, keep_text
from diffusers_ext.training.golden_noise.result import (
    Measure,
    NoiseValidation,
    measure_pairs,
    measure_sequences,
    network_report,
    publish_network,
    save_network,
    trained_network_card,
)
from diffusers_ext.training.golden_noise.settings import (
    NoiseSettings,
    PairNetworkSettings,
    SequenceNetworkSettings,
    noise_settings_class,
)
from diffusers_ext.training.run.base_model import check_base_model, load_text_pipeline
from diffusers_ext.training.run.loop import LossFunction, TrainingLoop
from diffusers_ext.training.run.script import check_login, network_words, one_run_a_folder, prepare_upload, run_script
from diffusers_ext.training.run.settings import early_value, parse_settings
from diffusers_ext.training.run.setup import (
    GOLDEN_NOISE_RUNS,
    check_resume,
    make_accelerator,
    make_loop,
    make_output_dir,
    run_facts,
    start_trackers,
)

logger = get_logger(__name__)

NETWORKS: dict[str, type[torch.nn.Module]] = {
    "npnet": NPNet,
    "golden_noise_model": GoldenNoiseModel,
    "transformer": NoiseSequenceTransformer,
    "rnn": NoiseSequenceRNN,
}
_WEIGHT_FILES = (".pth", ".pt", ".safetensors")


def data_config(
    settings: NoiseSettings, latent_shape: Sequence[int], cache: TextCache, num_steps: int
) -> dict[str, Any]:
    """The config fields that follow from latents, text and length of the sequences."""
    text = cache.facts
    pooled = getattr(settings, "pooled_text", None)
    width = text["pooled_dim"] if pooled else text["text_embed_dim"]
    if width is None:
        raise ValueError(
            "`pooled_text` must not be given for a base model without pooled embeddings, got "
            f"{settings.pretrained_model_name_or_path}."
        )
    wanted = {"SDXL": 2048, "DreamShaper": 2048, "DiT": 1024}.get(settings.npnet_model_id)
    if wanted is not None and wanted != text["text_embed_dim"]:
        raise ValueError(
            f"`npnet_model_id` must be of the base model's family, got {settings.npnet_model_id} with "
            f"text {wanted} wide for a base model with {text['text_embed_dim']}."
        )
    if settings.text_embed_dim not in (None, width):
        other = "" if text["pooled_dim"] is None else f", {text['pooled_dim']} pooled"
        raise ValueError(
            f"`text_embed_dim` must be the base model's {text['text_embed_dim']}{other}, got "
            f"{settings.text_embed_dim}. It can be left out."
        )
    config = {"in_channels": latent_shape[0], "text_embed_dim": width}
    if settings.model == "npnet":
        if latent_shape[1] != latent_shape[2]:
            raise ValueError(
                "`dataset_dir` must hold square noises for NPNet, got "
                f"{latent_shape[1]} x {latent_shape[2]}. Train a GoldenNoiseModel."
            )
        return {**config, "sample_size": latent_shape[1], "text_length": text["tokens"]}
    config["sample_size"] = max(latent_shape[1:])
    if settings.model == "rnn":
        config["pooled_text"] = bool(pooled)
    return {**config, "num_steps": num_steps} if settings.model in ("transformer", "rnn") else config


def make_network(
    settings: NoiseSettings, latent_shape: Sequence[int], cache: TextCache, num_steps: int
) -> torch.nn.Module:
    """The network that trains, in float32: new, or `--init_from`, which must be as command line and data ask."""
    wanted = {**data_config(settings, latent_shape, cache, num_steps), **settings.structure()}
    if settings.init_from is None:
        torch.manual_seed(settings.seed)  # whatever has drawn numbers before
        fitted = fitted_structure(settings.model, wanted["in_channels"], wanted["text_embed_dim"])
        return NETWORKS[settings.model](**{**fitted, **wanted})
    network = _load(settings)
    for name, value in wanted.items():
        found = network.config[name]
        found = list(found) if isinstance(found, (list, tuple)) else found
        enough = name == "num_steps" and found >= value
        # A network that does not care about the size keeps the one it was made at.
        free = name == "sample_size" and settings.model != "npnet"
        if found != value and not enough and not free:
            raise ValueError(
                f"`init_from` must be a network with `{name}` = {value}, got {found} in {settings.init_from}."
            )
    return network


def _load(settings: NoiseSettings) -> torch.nn.Module:
    wanted = NETWORKS[settings.model]
    if Path(settings.init_from).suffix in _WEIGHT_FILES:
        if settings.model != "npnet":
            raise ValueError(
                f"`init_from` must be a folder or Hub name for `--model {settings.model}`, got "
                f"{settings.init_from}: single files are NPNet's."
            )
        return NPNet.from_single_file(settings.init_from).float()
    network = load_noise_model(settings.init_from, dtype=torch.float32)
    if not isinstance(network, wanted):
        raise ValueError(
            f"`init_from` must be a {wanted.__name__} for `--model {settings.model}`, got a "
            f"{type(network).__name__} in {settings.init_from}."
        )
    return network


@dataclass(frozen=True)
class NoiseTask:
    """What differs between networks of pairs and of sequences."""

    name: str  # of the run, for trackers
    choose_steps: Callable[[NoiseSettings, int], list[int]]  # of the data's steps, from 1, those that are targets
    make_loss: Callable[[NoiseSettings, TextCache, torch.device], LossFunction]
    make_measure: Callable[[NoiseSettings], Measure]
    open_pairs: Callable[[NoiseSettings, bool], Dataset] = read_pairs  # compares checksums where it is asked to
    validation: type[NoiseValidation] = NoiseValidation


# Only NPNet reads padding like other tokens.
PAIRS = NoiseTask(
    "golden-noise",
    target_steps,
    lambda settings, cache, device: PairLoss(cache, device, masked=settings.model != "npnet"),
    lambda settings: partial(measure_pairs, masked=settings.model != "npnet"),
)
# The RNN's loss has a term on the statistics of its output.
SEQUENCES = NoiseTask(
    "noise-sequence",
    sequence_steps,
    lambda settings, cache, device: SequenceLoss(cache, device, bool(settings.pooled_text), settings.kl_weight),
    lambda settings: partial(measure_sequences, pooled=bool(settings.pooled_text)),
)


def reward_task(settings: PairNetworkSettings, device: torch.device) -> NoiseTask:
    """Prompts and a reward in place of pairs; the base model and the reward are loaded."""
    training = RewardTraining.load(settings, device)
    return NoiseTask(
        "golden-noise", target_steps, training.loss, lambda _: training.measure, lambda given, _: training.data(given),
        RewardValidation,
    )  # fmt: skip


def parse_pair_args(input_args: Sequence[str] | None = None) -> PairNetworkSettings:
    """Command line for a network that learns pairs, over the YAML file of `--config`."""
    return parse_settings(PairNetworkSettings, __doc__, input_args, shared=GOLDEN_NOISE_RUNS)


def parse_sequence_args(input_args: Sequence[str] | None = None) -> SequenceNetworkSettings:
    """Command line for a network that learns sequences, over the YAML file of `--config`."""
    return parse_settings(SequenceNetworkSettings, __doc__, input_args, shared=GOLDEN_NOISE_RUNS)


def parse_args(input_args: Sequence[str] | None = None) -> NoiseSettings:
    """Command line for the network of `--model`, or of the YAML file; NPNet without either."""
    model = early_value(sys.argv[1:] if input_args is None else input_args, "model")
    return parse_settings(noise_settings_class(model), __doc__, input_args, shared=GOLDEN_NOISE_RUNS)


@dataclass(frozen=True)
class NoiseData:
    """The data of a run, before any text is encoded."""

    pairs: Dataset
    split: PromptSplit
    steps: list[int]
    facts: dict[str, Any]


def open_data(settings: NoiseSettings, task: NoiseTask, verify: bool = True) -> NoiseData:
    """Open, check and split the data of `--dataset_dir`; `verify` also compares checksums."""
    pairs = task.open_pairs(settings, verify)
    steps = task.choose_steps(settings, pairs.num_steps)
    split = split_by_prompt(pairs.prompts, settings.validation_split, settings.seed)
    return NoiseData(pairs, split, steps, data_facts(pairs, split, steps))


def resume_facts(settings: NoiseSettings, data: NoiseData) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued and is known before the text is encoded."""
    names = (
        "model", "use_ema", "ema_decay", "validation_split", "text_cache_dtype", "init_from",
        "text_batch_size", "kl_weight",
    )  # fmt: skip
    given = {name: getattr(settings, name, None) for name in names}
    return run_facts(settings, data=data.facts, **given)


def encode_text(settings: NoiseSettings, data: NoiseData, accelerator: Accelerator) -> tuple[TextCache, str]:
    """The text of all prompts, and the class of the base pipeline; no text encoder stays."""
    pipeline = load_text_pipeline(settings, accelerator.device)
    if settings.model == "npnet":
        refuse_npnet(find_family(pipeline, TOOL), data.pairs.latent_shape[0])
    facts = data.facts["generation"] or {}
    check_base_model(settings, pipeline, facts.get("models"))
    return keep_text(settings, pipeline, data.pairs.prompts, accelerator), type(pipeline).__name__


def build_loop(
    settings: NoiseSettings, accelerator: Accelerator, task: NoiseTask, data: NoiseData, cache: TextCache
) -> tuple[TrainingLoop, NoiseValidation]:
    """The loop over a network, and what measures it."""
    network = make_network(settings, data.pairs.latent_shape, cache, len(data.steps))
    if settings.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    facts = {
        **resume_facts(settings, data),
        "text": cache.facts,
        "network": network_config(network),
        "start": fingerprint(network),
    }
    network.to(accelerator.device)
    ema = EMAModel(network.parameters(), decay=settings.ema_decay) if settings.use_ema else None
    samples = {
        name: NoiseSamples(data.pairs, indices, cache.rows, data.steps)
        for name, indices in data.split._asdict().items()
    }
    validation = task.validation(
        accelerator, network, ema, samples, cache.take, task.make_measure(settings),
        batch_size=settings.train_batch_size, most=settings.num_validation_pairs,
    )  # fmt: skip
    loop = make_loop(
        settings,
        accelerator,
        network,
        samples["train"],
        task.make_loss(settings, cache, accelerator.device),
        facts,
        f"{settings.model} training",
        validate=validation.run,
        parts=[validation],
        ema=ema,
    )
    return loop, validation


def network_config(network: torch.nn.Module) -> dict[str, Any]:
    """The fields of a network's config that make up its structure; a `None` is as if there were no such field."""
    config = network.config.items()
    return {name: value for name, value in config if not name.startswith("_") and value is not None}


@one_run_a_folder
def main(settings: NoiseSettings) -> Path:
    """Train and save; returns the output folder."""
    task = SEQUENCES if isinstance(settings, SequenceNetworkSettings) else PAIRS
    accelerator = make_accelerator(settings)
    if getattr(settings, "objective", "pairs") == "reward":
        task = reward_task(settings, accelerator.device)
    with accelerator.local_main_process_first():  # which alone reads all of it
        data = open_data(settings, task, accelerator.is_local_main_process)
    settings.max_train_steps = count_steps(settings, len(data.split.train), accelerator.num_processes)
    check_resume(settings, resume_facts(settings, data))
    shared = settings.push_to_hub and accelerator.is_main_process
    if shared:
        check_login(settings)
    cache, pipeline_class = encode_text(settings, data, accelerator)
    loop, validation = build_loop(settings, accelerator, task, data, cache)
    if shared:  # a fact that the card lacks stops the run here, not after it
        facts = {"data": data.facts, "pipeline_class": pipeline_class, "validation": []}
        prepare_upload(settings, trained_network_card(settings, validation.network, **facts))
    make_output_dir(settings, accelerator)
    start_trackers(accelerator, settings, task.name)
    network = loop.run()
    if loop.ema is not None:
        loop.ema.copy_to(network.parameters())
    network.eval()
    if accelerator.is_main_process:
        drop_own_text(settings)
        report = network_report(
            settings,
            network,
            config=network_config(network),
            data=data.facts,
            text=cache.facts,
            pipeline_class=pipeline_class,
            history=loop.history,
            validation=validation.history,
            seconds=loop.seconds,
        )
        save_network(settings, network, report)
        logger.info(network_words(settings, report))
        if shared:
            publish_network(settings, network, report)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return Path(settings.output_dir)


if __name__ == "__main__":
    run_script(parse_args, main, NoiseSettings)
