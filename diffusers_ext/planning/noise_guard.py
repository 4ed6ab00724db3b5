"""The run of a guard: a golden-noise network is judged, then a guard learns where it gains."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property

import torch

from diffusers_ext.golden_noise.losses import GuardLoss
from diffusers_ext.golden_noise.networks.guard import NoiseGuard
from diffusers_ext.golden_noise.text_cache import CACHE_DTYPES, TextCache
from diffusers_ext.planning.golden_noise import TEXT, GoldenNoiseRun, judged_table_bytes, loaded_parts
from diffusers_ext.planning.golden_noise_targets import draw_works, reward_parts
from diffusers_ext.planning.kept_text import kept_text_bytes, kept_text_work, text_notes, texts_of_a_prompt
from diffusers_ext.planning.models import BaseModel, ImageShapes, encode_prompts_work, guided_work, module_bytes
from diffusers_ext.planning.settings import GoldenNoisePlanSettings, GuardPlanSettings
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

_NETWORK, _GUARD = "network", "guard"
_VALIDATED = 256  # noises measured at once


def draft_guard(base: BaseModel, setting: GuardPlanSettings, *, as_on_gpu: bool = True) -> Draft:
    """The phases of judging a network and training its guard; `ValueError` for a setting that they cannot take."""
    shapes = ImageShapes(base, setting.output_size)
    setting.output_size = shapes.resolution
    run = GuardRun(shapes, setting, as_on_gpu)
    loaded = loaded_parts(base, run.precision.dtype)
    judges, notes = reward_parts(None if setting.judged else setting.reward)
    parts = {**loaded, _NETWORK: module_bytes(run.network()), _GUARD: module_bytes(run.guard()), **judges}
    notes += text_notes(shapes, setting.text_tokens)
    phases = run.phases(tuple(loaded), tuple(judges))
    return Draft("guard", base, asdict(setting), parts, phases, run.disk(), notes)


@dataclass(frozen=True)
class GuardRun:
    """A base model, a network that is judged with it and a guard that is trained, as shapes."""

    shapes: ImageShapes
    setting: GuardPlanSettings
    as_on_gpu: bool = True

    @property
    def precision(self) -> Precision:
        """Of the calls of all models but the network and the guard, which are in float32."""
        return Precision(WEIGHT_DTYPES[self.setting.mixed_precision], self.as_on_gpu)

    @cached_property
    def _training_of_the_network(self) -> GoldenNoiseRun:
        names = ("network", "structure", "num_steps", "text_cache_dtype")
        chosen = {name: getattr(self.setting, name) for name in names}
        return GoldenNoiseRun(self.shapes, GoldenNoisePlanSettings(**chosen, reward=None))

    def network(self) -> torch.nn.Module:
        """The network on the meta device."""
        return self._training_of_the_network.network().eval()

    def guard(self) -> NoiseGuard:
        """The guard on the meta device."""
        names = ("bands", "patch_size", "width", "num_layers", "num_heads", "reads")
        sizes = {name: getattr(self.setting, name) for name in names}
        with torch.device("meta"):
            return NoiseGuard(self.shapes.latents[0], self.shapes.text.width, **sizes).train()

    def phases(self, loaded: tuple[str, ...], judges: tuple[str, ...]) -> list[Phase]:
        """In order; `loaded` are the parts of the base model, `judges` those of the reward."""
        setting, shapes, precision = self.setting, self.shapes, self.precision
        encoders = tuple(name.replace("_", " ") for name in shapes.base.text_encoders)
        whole = not setting.judged or setting.reads == "prediction"
        resident = (*(loaded if whole else encoders), _NETWORK)
        phases = [] if setting.judged else [Phase("judging", (*resident, *judges), self._judging_works())]
        text = kept_text_work(shapes, setting.num_prompts, setting.text_batch_size, precision)
        phases.append(Phase("encoding text", resident, [text]))
        phases.append(Phase("reading", (*resident, _GUARD), self._reading_works()))
        phases.append(Phase("training", (_NETWORK, _GUARD, OPTIMIZER), self.training_works()))
        measured = min(_VALIDATED, setting.validation_pairs)
        validation = self.validation_work(measured, setting.validations * setting.validation_pairs / measured)
        return [*phases, Phase("validation", (_NETWORK, _GUARD, OPTIMIZER), [validation])]

    def _judging_works(self) -> list[Work]:
        """Pictures of both noises are drawn together."""
        setting, shapes, precision = self.setting, self.shapes, self.precision
        rows = min(setting.batch_size, setting.pairs)
        batches, prompts = setting.pairs / rows, math.ceil(rows / setting.noises_per_prompt)
        return [
            encode_prompts_work(shapes, prompts, texts_of_a_prompt(shapes) * batches, precision),
            self._refining_work(rows, batches),
            *draw_works(shapes, setting, 2 * rows, batches, precision),
        ]

    def _reading_works(self) -> list[Work]:
        """The network changes every noise, and the model is asked once where the guard reads what it predicts."""
        setting, shapes, precision = self.setting, self.shapes, self.precision
        rows = min(setting.text_batch_size, setting.pairs)
        batches, prompts = setting.pairs / rows, math.ceil(rows / setting.noises_per_prompt)
        works = [self._refining_work(rows, batches)]
        if setting.reads == "prediction":
            works.append(encode_prompts_work(shapes, prompts, texts_of_a_prompt(shapes) * batches, precision))
            works.append(guided_work(shapes, rows, 1.0, batches, precision))
        return works

    def _refining_work(self, rows: int, times: float) -> Work:
        """The network's call for so many noises."""
        shapes = self.shapes

        def begin(network: torch.nn.Module, device: torch.device) -> Callable[[], object]:
            text = shapes.conditioning(rows, device, torch.float32).positive()
            read = {name: getattr(text, name) for name in ("attention_mask", "pooled_prompt_embeds")}
            noise = torch.randn(rows, *shapes.latents, device=device)
            return lambda: network.golden_noise(noise, text.prompt_embeds, **read)

        return inference_work("network's activations", times, self.network, begin)

    def training_works(self) -> list[Work]:
        """The training's own step over inputs without content."""
        setting = self.setting

        def begin(guard: torch.nn.Module, device: torch.device) -> Callable[[], torch.Tensor]:
            step, rows = GuardLoss(self._one_prompt(), device, 1.0), setting.train_batch_size
            batch = {
                "input": self._inputs(rows),
                "goal": torch.zeros(rows),
                "text": torch.zeros(rows, dtype=torch.long),
            }
            return lambda: step(guard, batch, torch.Generator())["loss"]

        work = Work("guard's activations and gradients", setting.max_train_steps, self.guard, OPTIMIZER)
        options = {"optimizer": setting.optimizer, "weight_decay": 1e-2}
        return training_works(work, setting.gradient_accumulation_steps, self.precision, begin, **options)

    def validation_work(self, rows: int, times: float) -> Work:
        """What is expected of so many noises."""

        def begin(guard: torch.nn.Module, device: torch.device) -> Callable[[], object]:
            cache, inputs = self._one_prompt(), self._inputs(rows)

            def repeat() -> None:
                text = cache.take(torch.zeros(rows, dtype=torch.long), device)
                guard(inputs.to(device), text.prompt_embeds, text.attention_mask)

            return repeat

        return inference_work("validation", times, lambda: self.guard().eval(), begin)

    def _inputs(self, rows: int) -> torch.Tensor:
        channels, height, width = self.shapes.latents
        bands = self.setting.bands
        return torch.zeros(rows, 2 * channels, min(bands, height), min(bands, width))

    def _one_prompt(self) -> TextCache:
        return self._training_of_the_network.one_prompt()

    def disk(self) -> dict[str, int]:
        """Files that a run leaves, and the embeddings that it keeps."""
        setting, guard = self.setting, self.guard()
        disk = {} if setting.judged else {"gains": judged_table_bytes(setting.pairs, setting.shard_size)}
        disk[TEXT] = kept_text_bytes(
            self.shapes, setting.num_prompts, CACHE_DTYPES[setting.text_cache_dtype],
            batch_size=setting.text_batch_size, tokens=setting.text_tokens,
        )  # fmt: skip
        models = (self.network(), guard)
        structures = sum(len(json.dumps(dict(model.config), default=str)) for model in models)
        disk["network and guard"] = sum(safetensors_bytes(model.state_dict()) for model in models) + structures
        disk["network and guard"] += REPORT_BYTES
        if setting.num_checkpoints:
            size = checkpoint_bytes(guard.parameters(), guard.parameters(), optimizer=setting.optimizer)
            disk["checkpoints"] = setting.num_checkpoints * size
        return disk
