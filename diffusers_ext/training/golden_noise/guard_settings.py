"""Settings of the training of a guard: what its network is judged on, what the guard reads, how careful it is."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers_ext.core.settings import (
    BELOW_ONE,
    COUNT,
    ReportingSettings,
    ResumeSettings,
    Rule,
    SamplingSettings,
    Settings,
    TrainingSettings,
    as_in,
    required,
    setting,
)
from diffusers_ext.training.golden_noise.settings import (
    WEIGHT_DECAY,
    BaseModelSettings,
    CandidateSettings,
    FilterSettings,
    NoiseDataSettings,
)


@dataclass(kw_only=True)
class GainSettings(Settings, title="gains"):
    """On what a network is judged for its guard, where that is not done yet."""

    prompt_file: str | None = setting(
        None, "text, one prompt a line, or csv: judge the network on them, into `--dataset_dir`"
    )
    prompt_column: str = as_in(CandidateSettings, "prompt_column", default="prompt")
    noises_per_prompt: int = as_in(CandidateSettings, "noises_per_prompt", default=8)
    output_size: int | None = as_in(CandidateSettings, "output_size", default=None)
    batch_size: int = setting(8, "noises judged at once, two pictures each", rule=COUNT)
    shard_size: int = setting(256, "noises judged for one file", rule=COUNT)
    reward: str = as_in(FilterSettings, "reward", default="hpsv2")
    reward_model: str | None = as_in(FilterSettings, "reward_model", default=None)
    reward_version: str | None = as_in(FilterSettings, "reward_version", default=None)


@dataclass(kw_only=True)
class NoiseGuardSettings(Settings, title="guard"):
    """Which network gets a guard, what the guard learns from and how careful it is."""

    noise_model: str = required("network that gets the guard: folder or Hub name")
    dataset_dir: str = required("judged noises: folder, also of generate_npd.py, or Hub name of its pairs")
    dataset_revision: str | None = setting(None, "revision of the noises on the Hub")
    gain_lost: float = setting(
        0.1, "share of the gain on held-out prompts that may be lost; sets the threshold", rule=BELOW_ONE
    )
    validation_split: float = setting(
        0.2, "share of the prompts that set the threshold", rule=Rule("in (0, 1)", lambda value: 0 < value < 1)
    )
    text_batch_size: int = setting(32, "prompts encoded, and noises refined, at once", rule=COUNT)
    text_cache_dtype: str = as_in(NoiseDataSettings, "text_cache_dtype", default="fp32")
    text_cache_dir: str | None = as_in(NoiseDataSettings, "text_cache_dir", default=None)
    reads: str = setting(
        "prediction", "besides the change: the model's first prediction (one call of it), or the noise",
        choices=("prediction", "noise"),
    )  # fmt: skip
    expects: str = setting(
        "rank", "what it learns: the gain's rank, or the gain, which few pictures decide", choices=("rank", "gain")
    )
    bands: int = setting(8, "lowest frequencies a side that the guard sees", rule=COUNT)
    patch_size: int = setting(2, "of them, a side of a patch", rule=COUNT)
    width: int = setting(64, "of its tokens", rule=COUNT)
    num_layers: int = setting(2, "of its transformer", rule=COUNT)
    num_heads: int = setting(4, "of its attention", rule=COUNT)


@dataclass(kw_only=True)
class GuardTrainingSettings(
    BaseModelSettings, TrainingSettings, SamplingSettings, GainSettings, NoiseGuardSettings, ReportingSettings,
    ResumeSettings,
):  # fmt: skip
    """How a guard of a network of golden noise is trained."""

    train_batch_size: int = as_in(TrainingSettings, "train_batch_size", default=64)
    learning_rate: float = as_in(TrainingSettings, "learning_rate", default=1e-3)
    adam_weight_decay: float = as_in(TrainingSettings, "adam_weight_decay", default=WEIGHT_DECAY)
    lr_scheduler: str | None = as_in(TrainingSettings, "lr_scheduler", default="cosine")
