"""The run of golden noise: pairs are made and judged, then a network is trained on them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch.utils._python_dispatch import _disable_current_modes

from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.losses import PairLoss, SequenceLoss
from diffusers_ext.golden_noise.networks.base import fitted_structure
from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel
from diffusers_ext.golden_noise.networks.npnet import NPNet, refuse_npnet
from diffusers_ext.golden_noise.networks.sequence_rnn import NoiseSequenceRNN
from diffusers_ext.golden_noise.networks.sequence_transformer import NoiseSequenceTransformer
from diffusers_ext.golden_noise.pairs.dataset import source_noise
from diffusers_ext.golden_noise.text_cache import CACHE_DTYPES, TextCache
from diffusers_ext.planning.golden_noise_targets import (
    PHASES,
    Drawing,
    draw_works,
    gradient_steps,
    reward_parts,
    target_works,
)
from diffusers_ext.planning.kept_text import kept_text_bytes, kept_text_work, text_notes, texts_of_a_prompt
from diffusers_ext.planning.models import BaseModel, ImageShapes, encode_prompts_work, module_bytes
from diffusers_ext.planning.settings import SEQUENCE_NETWORKS, GoldenNoisePlanSettings
from diffusers_ext.planning.tracing import REPORT_BYTES, checkpoint_bytes, safetensors_bytes
from diffusers_ext.planning.work import (
    OPTIMIZER,
    WEIGHT_DTYPES,
    Draft,
    Phase,
    Precision,
    Work,
    inference_work,
    training_works,
)

TEXT = "text embeddings (in the host's memory, or on disk)"
_KL_WEIGHT = 0.01
# Of the tables: a row beside its prompt's text, and a file with its columns.
_ROW_BYTES, _TABLES_BYTES = 56, 8 * 1024
_NETWORK, _COPY = "network", "copy of the weights while measuring"
_AVERAGED = "averaged weights"
_CLASSES: dict[str, type[torch.nn.Module]] = {
    "golden_noise_model": GoldenNoiseModel,
    "npnet": NPNet,
    "transformer": NoiseSequenceTransformer,
    "rnn": NoiseSequenceRNN,
}


def loaded_parts(base: BaseModel, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of what is loaded of the base model, by the words of a plan."""
    kept = {name: part for name, part in base.components.items() if name != "safety_checker"}
    return {name.replace("_", " "): part.bytes(dtype) for name, part in kept.items()}


def judged_table_bytes(candidates: int, shard_size: int) -> int:
    """Size of what is noted of pairs that were tried, in files of `shard_size`, and of the set's report."""
    return math.ceil(candidates / shard_size) * _TABLES_BYTES + candidates * _ROW_BYTES + REPORT_BYTES


def draft_golden_noise(base: BaseModel, setting: GoldenNoisePlanSettings, *, as_on_gpu: bool = True) -> Draft:
    """The phases of making pairs and training a network; `ValueError` for a setting that the model cannot take."""
    shapes = ImageShapes(base, setting.output_size)
    setting.output_size = shapes.resolution
    run = GoldenNoiseRun(shapes, setting, as_on_gpu)
    network = run.network()
    loaded = loaded_parts(base, run.precision.dtype)
    parts = {**loaded, _NETWORK: module_bytes(network)}
    if setting.use_ema:
        parts[_COPY] = parts[_NETWORK]
    if setting.use_ema and setting.objective == "reward":
        parts[_AVERAGED] = parts[_NETWORK]
    notes = []
    if setting.objective == "pairs":
        notes.append(f"{setting.kept_share:.0%} of the pairs that are tried are kept.")
    judges, unknown = reward_parts(setting.reward)
    phases, disk = run.phases((*loaded, *judges)), run.disk(network)
    notes += [*text_notes(shapes, setting.text_tokens), *unknown]
    return Draft("golden-noise", base, asdict(setting), {**parts, **judges}, phases, disk, notes)


@dataclass(frozen=True)
class GoldenNoiseRun:
    """A base model, how pairs are made with it and how a network is trained on them, as shapes."""

    shapes: ImageShapes
    setting: GoldenNoisePlanSettings
    as_on_gpu: bool = True

    @property
    def precision(self) -> Precision:
        """Of the calls of all models."""
        return Precision(WEIGHT_DTYPES[self.setting.mixed_precision], self.as_on_gpu)

    @property
    def sequences(self) -> bool:
        """Whether the network learns sequences, not pairs."""
        return self.setting.network in SEQUENCE_NETWORKS

    def network(self) -> torch.nn.Module:
        """The network on the meta device, in float32 as it trains."""
        setting, text = self.setting, self.shapes.text
        channels, height, width = self.shapes.latents
        config = {"in_channels": channels, "text_embed_dim": text.width}
        config["sample_size"] = max(height, width)
        config |= fitted_structure(setting.network, channels, text.width)
        if setting.network == "npnet":
            refuse_npnet(self.shapes.family, channels)
            config["text_length"] = text.tokens
        if self.sequences:
            config["num_steps"] = setting.num_steps
        with torch.device("meta"):
            network = _CLASSES[setting.network](**{**config, **setting.structure})
        if setting.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        return network.train()

    def phases(self, pairs: tuple[str, ...]) -> list[Phase]:
        """In order; `pairs` are the parts that are there while pairs are made."""
        setting, shapes, precision = self.setting, self.shapes, self.precision
        phases = [] if setting.objective == "reward" else self._pair_phases(pairs)
        text = kept_text_work(shapes, setting.num_prompts, setting.text_batch_size, precision)
        encoders = tuple(name.replace("_", " ") for name in shapes.base.text_encoders)
        trains: tuple[str, ...] = (_NETWORK, self._kept_name)
        if setting.objective == "reward":  # the base model and the reward are there from the beginning
            trains, encoders = (*trains, *pairs), pairs
            trains += (_AVERAGED,) if setting.use_ema else ()
        phases.append(Phase("encoding text", encoders, [text]))
        phases.append(Phase("training", trains, self.training_works()))
        measured = min(setting.train_batch_size, setting.pairs)
        times = setting.validations * setting.validation_pairs / measured
        works = [self.validation_work(measured, times)]
        if setting.objective == "reward":  # pictures of the plain and of the golden noise, one batch after the other
            works += draw_works(shapes, setting, measured, 2 * times, precision)
        copied = (*trains, _COPY) if setting.use_ema else trains
        return [*phases, Phase("validation", copied, works)]

    def _pair_phases(self, pairs: tuple[str, ...]) -> list[Phase]:
        """Pairs are made, then judged: pictures of both noises are drawn together."""
        setting, shapes, precision = self.setting, self.shapes, self.precision
        batches = math.ceil(setting.candidates / setting.batch_size)
        rows = min(setting.batch_size, setting.candidates)
        made = [
            encode_prompts_work(shapes, rows, texts_of_a_prompt(shapes) * batches, precision),
            *target_works(shapes, setting, rows, batches, precision),
        ]
        phases = [Phase(PHASES[setting.target], pairs, made)]
        if setting.reward is not None:
            phases.append(Phase("judging", pairs, draw_works(shapes, setting, 2 * rows, batches, precision)))
        return phases

    @property
    def _kept_name(self) -> str:
        """What stays from step to step besides the network."""
        averaged = self.setting.use_ema and self.setting.objective == "pairs"
        return f"{OPTIMIZER} and averaged weights" if averaged else OPTIMIZER

    def training_works(self) -> list[Work]:
        """The training's own step over pairs or sequences without content, or with pictures drawn for the reward."""
        setting = self.setting
        if setting.objective == "reward":
            return self._reward_training_works()

        def begin(network: torch.nn.Module, device: torch.device) -> Callable[[], torch.Tensor]:
            step = self._loss(self.one_prompt(), device)
            rows = setting.train_batch_size
            return lambda: step(network, self._batch(rows, device), torch.Generator())["loss"]

        name = "network's activations and gradients"
        work = Work(name, setting.max_train_steps, self.network, self._kept_name)
        options = {"optimizer": setting.optimizer, "weight_decay": 1e-2, "ema": setting.use_ema}
        batches = setting.gradient_accumulation_steps
        return training_works(work, batches, self.precision, begin, **options)

    def _reward_training_works(self) -> list[Work]:
        """The network's graph is there while pictures are drawn, with a gradient of their own."""
        setting, shapes, dtype = self.setting, self.shapes, self.precision.dtype
        steps = gradient_steps(setting)

        def make(num_layers: int = steps) -> torch.nn.Module:
            both = Drawing(shapes, setting, num_layers, dtype)
            both.network = self.network()
            both.forward = both.network.forward
            return both

        def begin(both: torch.nn.Module, device: torch.device) -> Callable[[], torch.Tensor]:
            rows = setting.train_batch_size
            text = shapes.conditioning(rows, device, dtype)
            masked = setting.network != "npnet" and text.attention_mask is not None
            read = {"attention_mask": text.attention_mask} if masked else {}

            def loss() -> torch.Tensor:
                noise = torch.randn(rows, *shapes.latents, device=device)
                golden = both(noise, text.prompt_embeds.float(), **read).float()
                return (golden * both.slope(golden, text)).mean() + (golden - noise).square().mean()

            return loss

        name = "activations and gradients of all models"
        work = Work(name, setting.max_train_steps, make, OPTIMIZER, layers=steps)
        options = {"optimizer": setting.optimizer, "weight_decay": 1e-2}
        return training_works(work, setting.gradient_accumulation_steps, self.precision, begin, **options)

    def validation_work(self, rows: int, times: float) -> Work:
        """A batch of pairs is measured."""

        def begin(network: torch.nn.Module, device: torch.device) -> Callable[[], object]:
            cache = self.one_prompt()
            step = self._loss(cache, device)

            def repeat() -> None:
                batch = self._batch(rows, device)
                step(network, batch, torch.Generator())
                if self.sequences:
                    text = cache.take(batch["text"], device)
                    network.generate_sequence(
                        batch["noise"], text.prompt_embeds, self.setting.num_steps, attention_mask=text.attention_mask
                    )

            return repeat

        return inference_work("validation", times, lambda: self.network().eval(), begin)

    def _loss(self, cache: TextCache, device: torch.device) -> PairLoss | SequenceLoss:
        """As the training script has it for the network."""
        if self.sequences:
            weight = _KL_WEIGHT if self.setting.network == "rnn" else 0.0
            return SequenceLoss(cache, device, kl_weight=weight)
        return PairLoss(cache, device, masked=self.setting.network != "npnet")

    def one_prompt(self) -> TextCache:
        """The text of one prompt, which is in the host's memory and with data."""
        dtype = CACHE_DTYPES[self.setting.text_cache_dtype]
        with _disable_current_modes():
            text = self.shapes.conditioning(1, torch.device("cpu"), dtype)
        return TextCache([""], TextConditioning(text.prompt_embeds, attention_mask=text.attention_mask))

    def _batch(self, rows: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Noises from their seeds, golden noises without content, and rows of the text."""
        size = self.shapes.latents
        noises = torch.stack([source_noise(seed, size) for seed in range(rows)])
        return {
            "noise": noises.to(device),
            "golden": torch.zeros(rows, self.setting.num_steps, *size, device=device),
            "text": torch.zeros(rows, dtype=torch.long),
        }

    def disk(self, network: torch.nn.Module) -> dict[str, int]:
        """Files that both scripts leave, and the embeddings that the training keeps."""
        setting = self.setting
        numbers = math.prod(self.shapes.latents) * setting.num_steps * setting.pairs
        tables = judged_table_bytes(setting.candidates, setting.shard_size)
        disk = {"pairs": 2 * numbers + tables} if setting.objective == "pairs" else {}
        disk[TEXT] = kept_text_bytes(
            self.shapes, setting.num_prompts, CACHE_DTYPES[setting.text_cache_dtype],
            batch_size=setting.text_batch_size, tokens=setting.text_tokens,
        )  # fmt: skip
        structure = len(json.dumps(dict(network.config), default=str))
        weights = safetensors_bytes(network.state_dict())
        disk["network"] = weights + structure + 2 * REPORT_BYTES
        if setting.num_checkpoints:
            trained = [p for p in network.parameters() if p.requires_grad]
            size = checkpoint_bytes(trained, trained, ema=setting.use_ema, optimizer=setting.optimizer)
            disk["checkpoints"] = setting.num_checkpoints * size
        return disk
