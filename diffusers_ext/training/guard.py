"""Train a guard for a golden-noise network, on what the network gains from many prompts and seeds.

    accelerate launch -m diffusers_ext.training.guard --noise_model outputs/golden_noise_model \\
        --pretrained_model_name_or_path examples/digits/model --prompt_file prompts.txt \\
        --reward examples.digits.rewards:DigitsReward --num_inference_steps 4 --guidance_scale 1.5 \\
        --dataset_dir outputs/gains --output_dir outputs/guarded

The gains go into `--dataset_dir`, where a stopped run goes on and later ones find them. Without `--prompt_file` the
guard learns from the pairs that generate_npd.py judged there, kept and rejected ones. The output folder holds the
network with its guard.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from diffusers_ext.core.artifacts import fingerprint, same_fingerprint
from diffusers_ext.golden_noise.first_prediction import Predict, first_prediction
from diffusers_ext.golden_noise.losses import GuardLoss
from diffusers_ext.golden_noise.networks.base import GoldenNoiseNetwork, load_noise_model
from diffusers_ext.golden_noise.networks.guard import NoiseGuard, choose_threshold, gain_ranks, guard_figures
from diffusers_ext.golden_noise.pairs.dataset import download_pairs, source_noise
from diffusers_ext.golden_noise.pairs.shards import PairRecord, judged_pairs, read_config
from diffusers_ext.golden_noise.redenoise import encode_prompts
from diffusers_ext.golden_noise.text_cache import TextCache
from diffusers_ext.training.golden_noise.data import PromptSplit, split_by_prompt
from diffusers_ext.training.golden_noise.gains import measure_gains
from diffusers_ext.training.golden_noise.guard_settings import GuardTrainingSettings
from diffusers_ext.training.golden_noise.kept_text import drop_own_text, keep_text
from diffusers_ext.training.golden_noise.rendering import load_base_pipeline
from diffusers_ext.training.run.base_model import check_base_model, load_text_pipeline
from diffusers_ext.training.run.script import (
    ON_THE_WAY,
    one_run_a_folder,
    reported_arguments,
    run_script,
    staged_output,
)
from diffusers_ext.training.run.settings import parse_settings
from diffusers_ext.training.run.setup import (
    GOLDEN_NOISE_RUNS,
    WEIGHT_DTYPES,
    check_resume,
    make_accelerator,
    make_loop,
    make_output_dir,
    run_facts,
    start_trackers,
)

logger = get_logger(__name__)


def parse_args(input_args: Sequence[str] | None = None) -> GuardTrainingSettings:
    """Command line of this script, over the YAML file of `--config`."""
    return parse_settings(GuardTrainingSettings, __doc__, input_args, shared=GOLDEN_NOISE_RUNS)


class GuardSamples(Dataset):
    """What a guard reads of every judged pair, what it should expect of it, and the row of its prompt's text."""

    def __init__(
        self,
        records: Sequence[PairRecord],
        goals: torch.Tensor,
        latent_shape: Sequence[int],
        network: GoldenNoiseNetwork,
        guard: NoiseGuard,
        cache: TextCache,
        pipeline: DiffusionPipeline,
        *,
        batch_size: int,
    ) -> None:
        self.gains = gains_of(records)
        self.goals = goals
        self.rows = torch.tensor([cache.rows[record.prompt] for record in records])
        device, inputs = guard.device, []
        for start in tqdm(range(0, len(records), batch_size), desc="refine"):
            batch = records[start : start + batch_size]
            noise = torch.stack([source_noise(record.seed, latent_shape) for record in batch]).to(device)
            text = cache.take(self.rows[start : start + batch_size], device)
            golden = network.refine(
                noise,
                text.prompt_embeds,
                attention_mask=text.attention_mask,
                pooled_prompt_embeds=text.pooled_prompt_embeds,
            )
            inputs.append(guard.inputs(noise, golden, _prediction(guard, pipeline, batch)).cpu())
        self.inputs = torch.cat(inputs)

    def __len__(self) -> int:
        return len(self.gains)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input": self.inputs[index], "goal": self.goals[index], "text": self.rows[index]}


def gains_of(records: Sequence[PairRecord]) -> torch.Tensor:
    """By how much golden noise raised the reward, `(records,)`."""
    return torch.tensor([record.reward_golden - record.reward_source for record in records])


def _prediction(guard: NoiseGuard, pipeline: DiffusionPipeline, batch: Sequence[PairRecord]) -> Predict | None:
    """What the model makes of a batch of noises, with all of the text that it reads, where the guard reads that."""
    if guard.config.reads == "noise":
        return None
    prompts = list(dict.fromkeys(record.prompt for record in batch))
    text = encode_prompts(pipeline, prompts)
    return first_prediction(pipeline, text[[prompts.index(record.prompt) for record in batch]])


def read_judged_pairs(settings: GuardTrainingSettings) -> tuple[list[PairRecord], dict[str, Any]]:
    """The rows of `--dataset_dir` and its config; `ValueError` where nothing was judged."""
    folder = Path(settings.dataset_dir)
    if not folder.is_dir():
        folder = download_pairs(settings.dataset_dir, argument="dataset_dir", revision=settings.dataset_revision)
    config, records = read_config(folder), judged_pairs(folder)
    if not records:
        raise ValueError(
            f"`dataset_dir` must hold pairs with rewards, got none in {settings.dataset_dir}. Make pairs with a "
            "`--reward`, without `--no_filter`, or give a `--prompt_file` and an empty folder."
        )
    return records, config


def check_network(network: GoldenNoiseNetwork, facts: dict[str, Any], source: str) -> None:
    """Raise `ValueError` for gains of another network than the one that is to be guarded."""
    judged = facts.get("network")
    if judged is not None and not same_fingerprint(judged, fingerprint(network)):
        raise ValueError(
            f"`dataset_dir` must hold gains of `noise_model`, got those of another network in {source}. Give another "
            "folder with `--prompt_file`, to judge this one."
        )


def make_guard(
    settings: GuardTrainingSettings, channels: int, text_width: int, goals: torch.Tensor, steps: int
) -> NoiseGuard:
    """A new guard that expects the mean of these goals, in units of their deviation."""
    scale = goals.std().item()
    if not scale > 0:
        raise ValueError(f"`dataset_dir` must hold pairs whose gains differ, got a deviation of {scale}.")
    torch.manual_seed(settings.seed)
    sizes = {name: getattr(settings, name) for name in ("bands", "patch_size", "width", "num_layers", "num_heads")}
    guard = NoiseGuard(
        in_channels=channels, text_embed_dim=text_width, gain_scale=scale, reads=settings.reads,
        target=settings.expects, prediction_steps=steps, **sizes,
    )  # fmt: skip
    torch.nn.init.constant_(guard.head.bias, goals.mean().item() / scale)
    return guard


class GuardValidation:
    """Chooses the threshold by held-out prompts and says what the guard then does to their pairs."""

    def __init__(self, guard: NoiseGuard, samples: Subset, cache: TextCache, gain_lost: float) -> None:
        self.guard, self.samples, self.cache, self.gain_lost = guard, samples, cache, gain_lost
        self.history: list[dict[str, float]] = []

    @torch.no_grad()
    def run(self, step: int) -> None:
        """Measure after a step and set the guard's threshold."""
        whole, indices, device = self.samples.dataset, self.samples.indices, self.guard.device
        training = self.guard.training
        self.guard.eval()
        expected = []
        for part in torch.tensor(indices).split(256):
            text = self.cache.take(whole.rows[part], device)
            expected.append(self.guard(whole.inputs[part].to(device), text.prompt_embeds, text.attention_mask).cpu())
        self.guard.train(training)
        gains, expected = whole.gains[indices], torch.cat(expected)
        threshold = choose_threshold(gains, expected, self.gain_lost)
        self.guard.register_to_config(threshold=threshold)
        correlation = torch.corrcoef(torch.stack([gains, expected]))[0, 1].item()
        figures = {**guard_figures(gains, expected, threshold)._asdict(), "correlation": correlation}
        self.history = [entry for entry in self.history if entry["step"] < step] + [{"step": step, **figures}]
        logger.info(f"Step {step}: {figures}")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.history = state["history"]


def save_guarded(settings: GuardTrainingSettings, network: GoldenNoiseNetwork, report: dict[str, Any]) -> None:
    """Write the network with its guard and the report, all at once."""
    with staged_output(settings.output_dir, ("config.json",), ON_THE_WAY) as folder:
        network.save_pretrained(folder)
        (folder / "training_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    logger.info(f"Network and guard: {settings.output_dir}")


def prepare_samples(
    settings: GuardTrainingSettings, network: GoldenNoiseNetwork, accelerator: Accelerator
) -> tuple[GuardSamples, PromptSplit, NoiseGuard, TextCache]:
    """The judged pairs, which of them are held out, a new guard for them, and their text."""
    device, measured = accelerator.device, settings.prompt_file is not None
    whole = measured or settings.reads == "prediction"
    dtype = WEIGHT_DTYPES[settings.mixed_precision]
    pipeline = load_base_pipeline(settings, device, dtype) if whole else load_text_pipeline(settings, device)
    if measured:
        measure_gains(settings, pipeline, network, accelerator)
    records, config = read_judged_pairs(settings)
    made = config["facts"] or {}
    check_base_model(settings, pipeline, made.get("models"))
    check_network(network, made, settings.dataset_dir)
    prompts = [record.prompt for record in records]
    split = split_by_prompt(prompts, settings.validation_split, settings.seed)
    cache = keep_text(settings, pipeline, prompts, accelerator)
    gains = gains_of(records)
    known = gains[torch.tensor(split.train)]
    goals = gain_ranks(gains, known) if settings.expects == "rank" else gains
    steps = made.get("num_inference_steps", settings.num_inference_steps)
    shape, width = config["latent_shape"], cache.facts["text_embed_dim"]
    guard = make_guard(settings, shape[0], width, goals[torch.tensor(split.train)], steps).to(device)
    samples = GuardSamples(records, goals, shape, network, guard, cache, pipeline, batch_size=settings.text_batch_size)
    return samples, split, guard, cache


@one_run_a_folder
def main(settings: GuardTrainingSettings) -> Path:
    """Train, choose the threshold and save the network with its guard; returns the output folder."""
    accelerator = make_accelerator(settings)
    given = ("noise_model", "validation_split", "gain_lost", "reads", "expects", "text_cache_dtype")
    facts = run_facts(settings, **{name: getattr(settings, name) for name in given})
    check_resume(settings, facts)
    network = load_noise_model(settings.noise_model).to(accelerator.device)
    network.set_guard(None)
    samples, split, guard, cache = prepare_samples(settings, network, accelerator)
    facts |= {"pairs": len(samples), "text": cache.facts, "network": fingerprint(network), "start": fingerprint(guard)}
    validation = GuardValidation(guard, Subset(samples, split.validation), cache, settings.gain_lost)
    loss = GuardLoss(cache, accelerator.device, guard.config.gain_scale)
    loop = make_loop(
        settings, accelerator, guard, Subset(samples, split.train), loss, facts, "guard training",
        validate=validation.run, parts=[validation],
    )  # fmt: skip
    make_output_dir(settings, accelerator)
    start_trackers(accelerator, settings, "noise-guard")
    loop.run()
    if accelerator.is_main_process:
        drop_own_text(settings)
        network.set_guard(guard.eval())
        report = {
            "arguments": reported_arguments(settings),
            "pairs": len(samples),
            "training_pairs": len(split.train),
            "validation_pairs": len(split.validation),
            "parameters": sum(parameter.numel() for parameter in guard.parameters()),
            "validation": validation.history,
            "history": loop.history,
            "seconds": loop.seconds,
        }
        save_guarded(settings, network, report)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return Path(settings.output_dir)


if __name__ == "__main__":
    run_script(parse_args, main)
