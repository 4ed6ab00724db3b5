"""Train a guard for a golden-noise network, on all pairs that generate_npd.py judged: kept and rejected ones.

    accelerate launch -m diffusers_ext.training.guard --noise_model outputs/golden_noise_model \\
        --pretrained_model_name_or_path examples/digits/model \\
        --dataset_dir outputs/pairs --output_dir outputs/guarded

The output folder holds the network with its guard.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.golden_noise.networks.base import GoldenNoiseNetwork, load_noise_model
from diffusers_ext.golden_noise.networks.guard import NoiseGuard, choose_threshold, guard_figures
from diffusers_ext.golden_noise.pairs.dataset import download_pairs, source_noise
from diffusers_ext.golden_noise.pairs.shards import PairRecord, judged_pairs, read_config
from diffusers_ext.golden_noise.text_cache import TextCache
from diffusers_ext.training.golden_noise.data import split_by_prompt
from diffusers_ext.training.golden_noise.settings import GuardTrainingSettings
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
    """What a guard reads of every judged pair, what the pair gained and the row of its prompt's text."""

    def __init__(
        self,
        records: Sequence[PairRecord],
        latent_shape: Sequence[int],
        network: GoldenNoiseNetwork,
        guard: NoiseGuard,
        cache: TextCache,
        *,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.gains = torch.tensor([record.reward_golden - record.reward_source for record in records])
        self.rows = torch.tensor([cache.rows[record.prompt] for record in records])
        reads = []
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
            reads.append(guard.reads(noise, golden).cpu())
        self.reads = torch.cat(reads)

    def __len__(self) -> int:
        return len(self.gains)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"read": self.reads[index], "gain": self.gains[index], "text": self.rows[index]}


@dataclass(frozen=True)
class GuardLoss:
    """Squared error of the expected gain, in units of the gains' deviation `gain_scale`."""

    cache: TextCache
    device: torch.device
    gain_scale: float

    def __call__(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """`loss`: 1 is the mean gain for all, 0 is perfect."""
        text = self.cache.take(batch["text"], self.device)
        expected = model(batch["read"].to(self.device), text.prompt_embeds, text.attention_mask)
        return {"loss": F.mse_loss(expected, batch["gain"].to(self.device)) / self.gain_scale**2}


def read_judged_pairs(settings: GuardTrainingSettings) -> tuple[list[PairRecord], dict[str, Any]]:
    """The rows of `--dataset_dir` and its config; `ValueError` where nothing was judged."""
    folder = Path(settings.dataset_dir)
    if not folder.is_dir():
        folder = download_pairs(settings.dataset_dir, argument="dataset_dir", revision=settings.dataset_revision)
    config, records = read_config(folder), judged_pairs(folder)
    if not records:
        raise ValueError(
            f"`dataset_dir` must hold pairs with rewards, got none in {settings.dataset_dir}. Make pairs with a "
            "`--reward`, without `--no_filter`."
        )
    return records, config


def make_guard(settings: GuardTrainingSettings, channels: int, text_width: int, gains: torch.Tensor) -> NoiseGuard:
    """A new guard that expects nothing yet, in units of the deviation of these gains."""
    scale = gains.std().item()
    if not scale > 0:
        raise ValueError(f"`dataset_dir` must hold pairs whose gains differ, got a deviation of {scale}.")
    torch.manual_seed(settings.seed)
    sizes = {name: getattr(settings, name) for name in ("bands", "patch_size", "width", "num_layers", "num_heads")}
    return NoiseGuard(in_channels=channels, text_embed_dim=text_width, gain_scale=scale, **sizes)


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
            expected.append(self.guard(whole.reads[part].to(device), text.prompt_embeds, text.attention_mask).cpu())
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


@one_run_a_folder
def main(settings: GuardTrainingSettings) -> Path:
    """Train, choose the threshold and save the network with its guard; returns the output folder."""
    accelerator = make_accelerator(settings)
    device = accelerator.device
    records, config = read_judged_pairs(settings)
    prompts = [record.prompt for record in records]
    split = split_by_prompt(prompts, settings.validation_split, settings.seed)
    given = {name: getattr(settings, name) for name in ("noise_model", "validation_split", "gain_lost")}
    facts = run_facts(settings, pairs=len(records), **given)
    check_resume(settings, facts)
    network = load_noise_model(settings.noise_model).to(device)
    network.set_guard(None)
    pipeline = load_text_pipeline(settings, device)
    check_base_model(settings, pipeline, (config["facts"] or {}).get("models"))
    cache = TextCache.encode(pipeline, prompts, batch_size=settings.text_batch_size, dtype=torch.float32)
    gains = torch.tensor([records[i].reward_golden - records[i].reward_source for i in split.train])
    guard = make_guard(settings, config["latent_shape"][0], cache.facts["text_embed_dim"], gains)
    samples = GuardSamples(
        records, config["latent_shape"], network, guard, cache, batch_size=settings.text_batch_size, device=device
    )
    facts |= {"text": cache.facts, "network": fingerprint(network), "start": fingerprint(guard)}
    validation = GuardValidation(guard.to(device), Subset(samples, split.validation), cache, settings.gain_lost)
    loss = GuardLoss(cache, device, guard.config.gain_scale)
    loop = make_loop(
        settings, accelerator, guard, Subset(samples, split.train), loss, facts, "guard training",
        validate=validation.run, parts=[validation],
    )  # fmt: skip
    make_output_dir(settings, accelerator)
    start_trackers(accelerator, settings, "noise-guard")
    loop.run()
    if accelerator.is_main_process:
        network.set_guard(guard.eval())
        report = {
            "arguments": reported_arguments(settings),
            "pairs": len(records),
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
