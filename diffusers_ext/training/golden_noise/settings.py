"""Settings of the golden-noise runs: making pairs, training networks on them, drawing with a network."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from diffusers_ext.core.settings import (
    BELOW_ONE,
    COUNT,
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    WITHOUT_IT,
    ModelSettings,
    ReportingSettings,
    Rule,
    RunSettings,
    SamplingSettings,
    Settings,
    TrainingRunSettings,
    TrainingSettings,
    as_in,
    at_least,
    required,
    setting,
)

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
# Of noise pairs: a guided step and a less guided one back, the gradient of a reward, what it likes best of several,
# noise that spreads what is drawn for a prompt.
TARGETS = ("guidance", "reward", "best_of_n", "diversity")
OBJECTIVES = ("pairs", "reward")
WEIGHT_DECAY = 1e-2
_KL_WEIGHT = 0.01


@dataclass(kw_only=True)
class BaseModelSettings(ModelSettings, title="model"):
    """The base model by the shorter name that it has for golden noise, too."""

    pretrained_model_name_or_path: str = as_in(
        ModelSettings, "pretrained_model_name_or_path", old_names=("base_model_id",)
    )


@dataclass(kw_only=True)
class CandidateSettings(Settings, title="pairs"):
    """Which prompts and noises, and how golden noise is made."""

    prompt_file: str = required("text, one prompt a line, or csv")
    prompt_column: str = setting("prompt", "of a csv file")
    max_prompts: int | None = setting(None, "the first ones; all without it", rule=COUNT)
    output_size: int | None = setting(None, f"pixels; {WITHOUT_IT}", rule=COUNT)
    num_steps: int = setting(1, "more than 1 makes sequences", rule=COUNT)
    target: str = setting("guidance", "where golden noise comes from", choices=TARGETS)
    redenoise_steps: int = setting(10, "the fewer, the further golden noise is", rule=COUNT)
    w1: float = setting(5.5, "guidance of the step down", rule=FINITE)
    w2: float = setting(1.0, "guidance of the step up", rule=FINITE)
    noises_per_prompt: int = setting(1, "seeds a prompt", rule=COUNT)
    batch_size: int = setting(8, "pairs made at once", rule=COUNT)
    shard_size: int = setting(256, "pairs tried for one file", rule=COUNT)
    legacy_inversion: bool = setting(False, "the published form, off by one level")


@dataclass(kw_only=True)
class RewardTargetSettings(Settings, title="reward targets"):
    """How far golden noise follows a reward, or spreads pictures."""

    ascent_steps: int = setting(10, "along the gradient, with `--target reward` and `diversity`", rule=COUNT)
    ascent_rate: float = setting(0.05, "length of each, as a share of the noise's deviation", rule=POSITIVE)
    gradient_steps: int | None = setting(
        None, "last denoising steps with the denoiser's gradient; all without it", rule=COUNT
    )
    best_of: int = setting(8, "noises to choose from, with `--target best_of_n`", rule=at_least(2))
    spread: float = setting(
        0.5,
        "how far they lie from the seed's noise; 1 is other seeds",
        rule=Rule("in (0, 1]", lambda value: 0 < value <= 1),
    )
    diversity_gain: float = setting(
        2.0, "how much further from the prompt's mean a prediction is to lie, with `--target diversity`", rule=POSITIVE
    )


@dataclass(kw_only=True)
class FilterSettings(Settings, title="filter"):
    """Which pairs stay."""

    reward: str = setting("hpsv2", "hpsv2, pickscore, clip_score, or module:attribute (see training/plugins.py)")
    reward_model: str | None = setting(None, "folder, file or Hub name of its weights")
    reward_version: str | None = setting(None, "e.g. v2.1 of hpsv2")
    margin: float = setting(0.0, "a pair stays if it gains more; below 0 it may lose a little", rule=FINITE)
    no_filter: bool = setting(False, "keep all pairs; guidance and diversity then need no reward")


@dataclass(kw_only=True)
class PairSettings(SamplingSettings, CandidateSettings, RewardTargetSettings, FilterSettings, RunSettings):
    """How noise pairs are made and which are kept."""

    pretrained_model_name_or_path: str = as_in(BaseModelSettings, "pretrained_model_name_or_path", default=SDXL)

    @property
    def needs_reward(self) -> bool:
        """Whether a reward makes the pairs or chooses among them."""
        return self.target in ("reward", "best_of_n") or not self.no_filter

    def check(self) -> None:
        """Also that no one checkpoint is asked for: a set goes on where it stopped."""
        super().check()
        if self.resume_from_checkpoint not in (None, "latest"):
            raise ValueError(
                f"`resume_from_checkpoint` must be 'latest' for noise pairs, got {self.resume_from_checkpoint!r}."
            )


@dataclass(kw_only=True)
class NoiseDataSettings(Settings, title="noise data"):
    """Which pairs or sequences, and the text that belongs to them."""

    dataset_dir: str = required("noise pairs or sequences: folder or Hub name")
    dataset_revision: str | None = setting(None, "revision of the noises on the Hub")
    npnet_model_id: str | None = setting(
        None, "checks that the base model's text has this model's width", choices=("SDXL", "DreamShaper", "DiT")
    )
    text_embed_dim: int | None = setting(None, "width of the text; checked, read from the base model", rule=COUNT)
    noise_resolution: int | None = setting(None, "side of the noises; checked, read from the data")
    remove_prompt_mean: float = setting(
        0.0, "share of a prompt's mean change taken out of the targets; keeps pictures diverse"
    )
    validation_split: float = setting(0.05, "share of the prompts", rule=BELOW_ONE)
    text_batch_size: int = setting(32, "prompts encoded at once", rule=COUNT)
    text_cache_dtype: str = setting("fp16", "of kept embeddings", choices=("fp16", "fp32"))
    text_cache_dir: str | None = setting(
        None,
        "keep embeddings in files there, for later runs too; else in memory, or in the output folder until the end "
        "of a run with checkpoints or several processes",
    )


@dataclass(kw_only=True)
class NoiseTrainingSettings(TrainingSettings, title="noise training"):
    """What the training of these networks has besides the ordinary group."""

    # These follow from the kind of network.
    train_batch_size: int | None = as_in(TrainingSettings, "train_batch_size", default=None, aliases=("batch_size",))
    max_train_steps: int | None = as_in(TrainingSettings, "max_train_steps", default=None)
    adam_weight_decay: float | None = as_in(TrainingSettings, "adam_weight_decay", default=None)
    num_epochs: int | None = setting(
        None,
        "how often every pair is seen; --max_train_steps goes before it",
        aliases=("num_train_epochs",),
        rule=COUNT,
    )
    use_ema: bool = setting(False, "save averaged weights")
    ema_decay: float = setting(0.999, "the nearer to 1, the more steps are averaged", rule=BELOW_ONE)
    init_from: str | None = setting(None, "saved network to go on from; NPNet's also as .pth")


@dataclass(kw_only=True)
class NoiseReportingSettings(ReportingSettings, title="reporting"):
    """Logs and figures on held-out prompts."""

    num_validation_pairs: int = setting(256, "held-out pairs that are measured at most", rule=COUNT)


@dataclass(kw_only=True)
class NPNetSettings(Settings, title="NPNet"):
    """Structure of NPNet; what is not given is the network's own default."""

    svd_dropout: bool | None = setting(None, "norms and dropout in the SVD branch")
    nt_adapter: bool | None = setting(None, "convolutions before Swin")
    nt_finetune: bool | None = setting(None, "train the last two stages of Swin")
    nt_dropout: bool | None = setting(None, "dropout on the output of Swin")
    cross_attention: bool | None = setting(None, "attend from Swin's output to the text")
    svd_signs: str | None = setting(None, "of singular vectors", choices=("canonical", "backend"))
    svd_hidden_dim: int | None = setting(None, "width of the SVD branch's tokens")
    svd_output_dim: int | None = setting(None, "width of the network of the pooled tokens")
    svd_num_heads: int | None = setting(None, "attention heads in it")
    swin_image_size: int | None = setting(None, "side to which noise is brought for Swin")
    swin_patch_size: int | None = setting(None, "side of Swin's patches")
    swin_embed_dim: int | None = setting(None, "width of its first stage")
    swin_window_size: int | None = setting(None, "patches a side of an attention window")
    swin_depths: list[int] | None = setting(None, "layers, one number per stage")
    swin_num_heads: list[int] | None = setting(None, "attention heads, one number per stage")


@dataclass(kw_only=True)
class GoldenNoiseModelSettings(Settings, title="GoldenNoiseModel"):
    """Structure of GoldenNoiseModel; what is not given is the network's own default."""

    patch_size: int | None = setting(None, "side of a patch of noise")
    width: int | None = setting(None, "of its tokens")
    num_layers: int | None = setting(None, "of the transformer")
    num_heads: int | None = setting(None, "of its attention")
    bands: int | None = setting(None, "act on this many of the lowest frequencies a side alone", rule=COUNT)
    text_projection_dim: int | None = setting(
        None, "width that text is brought to first; 64 where it is wider than 4096", rule=COUNT
    )


@dataclass(kw_only=True)
class SequenceSettings(Settings, title="sequence networks"):
    """What both sequence networks have."""

    max_seq_len: int | None = setting(None, "states with the first; cuts longer data")
    predict_variance: bool | None = setting(None, "also predict how sure a number is")
    predict_residual: bool | None = setting(None, "predict the change, not the state")
    dropout: float | None = setting(None, "share of the network's activations that is zeroed", rule=BELOW_ONE)


@dataclass(kw_only=True)
class SequenceTransformerSettings(Settings, title="NoiseSequenceTransformer"):
    """Structure of NoiseSequenceTransformer; what is not given is the network's own default."""

    patch_size: int | None = setting(None, "side of a patch of noise")
    d_model: int | None = setting(None, "width of its tokens")
    nhead: int | None = setting(None, "attention heads")
    num_encoder_layers: int | None = setting(None, "that read the text")
    num_decoder_layers: int | None = setting(None, "that read the noises")
    dim_feedforward: int | None = setting(None, "inner width of the feed-forward layers")


@dataclass(kw_only=True)
class SequenceRNNSettings(Settings, title="NoiseSequenceRNN"):
    """Structure of NoiseSequenceRNN and its second loss."""

    cnn_base_filters: int | None = setting(None, "channels of the first stage")
    cnn_num_blocks: list[int] | None = setting(None, "one number per stage")
    cnn_feat_dim: int | None = setting(None, "width of a state's features")
    gru_hidden_size: int | None = setting(None, "width of the recurrent state")
    gru_num_layers: int | None = setting(None, "recurrent layers")
    num_attention_heads: int | None = setting(None, "of the attention to the text")
    num_attention_layers: int | None = setting(None, "before the recurrent ones")
    num_text_layers: int | None = setting(None, "that read the text")
    pooled_text: bool | None = setting(None, "read the pooled text embedding alone")
    kl_weight: float | None = setting(
        None, "how much the output's statistics count in the loss; 0.01 by default",
        rule=NOT_NEGATIVE,
    )  # fmt: skip


def _names(group: type[Settings], *but: str) -> tuple[str, ...]:
    return tuple(one.name for one in fields(group) if one.name not in but)


# Fields of each network's config that settings of the same name give; those left out follow otherwise.
_OF_SEQUENCES = _names(SequenceSettings, "max_seq_len")
STRUCTURES: dict[str, tuple[str, ...]] = {
    "npnet": _names(NPNetSettings),
    "golden_noise_model": _names(GoldenNoiseModelSettings),
    "transformer": _names(SequenceTransformerSettings) + _OF_SEQUENCES,
    "rnn": _names(SequenceRNNSettings, "pooled_text", "kl_weight") + _OF_SEQUENCES,
}
_OF_ONE_NETWORK = {**STRUCTURES, "rnn": (*STRUCTURES["rnn"], "kl_weight")}


@dataclass(kw_only=True)
class NoiseSettings(
    BaseModelSettings, NoiseTrainingSettings, NoiseDataSettings, NoiseReportingSettings,
    TrainingRunSettings,
):  # fmt: skip
    """How a network of golden noise is trained; the two kinds of data have a class each."""

    model: str = required("kind of network")

    def settle(self) -> None:
        """Batch, rate and epochs of the kind of network; `ValueError` for a setting of another one."""
        from diffusers_ext.golden_noise.networks.base import NETWORK_DEFAULTS  # here: help needs no torch

        super().settle()
        of_model = _OF_ONE_NETWORK[self.model]
        for model, names in _OF_ONE_NETWORK.items():
            for name in names:
                value = getattr(self, name, None)
                if name not in of_model and value is not None:
                    raise ValueError(
                        f"`{name}` must not be given with `--model {self.model}`, got {value}: it "
                        f"belongs to `--model {model}`."
                    )
        defaults = {**NETWORK_DEFAULTS[self.model], "adam_weight_decay": WEIGHT_DECAY}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def check(self) -> None:
        """Also that weights are averaged once."""
        super().check()
        if self.use_ema and self.optimizer == "schedule_free":
            raise ValueError("`use_ema` must be left out with `optimizer` schedule_free, an average itself, got True.")

    def structure(self) -> dict[str, Any]:
        """The fields of the network's config that are given."""
        given = {name: getattr(self, name) for name in STRUCTURES[self.model]}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(kw_only=True)
class RewardTrainingSettings(Settings, title="training by reward"):
    """How a network is trained without pairs, by what a reward says of the pictures."""

    objective: str = setting("pairs", "what the network learns: pairs, or to raise a reward", choices=OBJECTIVES)
    prompt_file: str | None = setting(None, "text, one prompt a line, or csv; for a reward, in place of data")
    prompt_column: str = as_in(CandidateSettings, "prompt_column", default="prompt")
    output_size: int | None = as_in(CandidateSettings, "output_size", default=None)
    reward: str = setting("hpsv2", "hpsv2, pickscore, clip_score, or module:attribute of one with a gradient")
    reward_model: str | None = as_in(FilterSettings, "reward_model", default=None)
    reward_version: str | None = as_in(FilterSettings, "reward_version", default=None)
    reward_regularization: float = setting(
        1.0, "the larger, the less noise is changed; see the page on golden noise", rule=POSITIVE
    )
    gradient_steps: int | None = as_in(RewardTargetSettings, "gradient_steps", default=None)


@dataclass(kw_only=True)
class PairNetworkSettings(
    NoiseSettings, RewardTrainingSettings, SamplingSettings, NPNetSettings, GoldenNoiseModelSettings
):
    """How a network that learns pairs, or by a reward, is trained."""

    dataset_dir: str | None = as_in(NoiseDataSettings, "dataset_dir", default=None)

    model: str = setting("npnet", "kind of network", choices=("npnet", "golden_noise_model"))
    target_step: str = setting("last", "step of sequence data that is the target, from 1")

    def check(self) -> None:
        """Also that there is the data of the objective."""
        super().check()
        wanted = "prompt_file" if self.objective == "reward" else "dataset_dir"
        if getattr(self, wanted) is None:
            raise ValueError(f"`{wanted}` must be given with `--objective {self.objective}`, got None.")


@dataclass(kw_only=True)
class SequenceNetworkSettings(NoiseSettings, SequenceSettings, SequenceTransformerSettings, SequenceRNNSettings):
    """How a network that learns sequences is trained."""

    model: str = setting("transformer", "kind of network", choices=("transformer", "rnn"))

    def settle(self) -> None:
        """Also the weight of the RNN's second loss."""
        super().settle()
        if self.kl_weight is None:
            self.kl_weight = _KL_WEIGHT if self.model == "rnn" else 0.0


def noise_settings_class(model: str | None) -> type[NoiseSettings]:
    """What trains a kind of network; networks of pairs where none is named."""
    return SequenceNetworkSettings if model in ("transformer", "rnn") else PairNetworkSettings


@dataclass(kw_only=True)
class DrawnNoiseSettings(Settings, title="golden noise"):
    """Which network, which prompt and how many pictures."""

    noise_model: str = required(
        "folder, Hub name, or NPNet's single file (.pth or .safetensors)", aliases=("npnet_weights_path",)
    )
    prompt: str = required("what to draw")
    num_images_per_prompt: int = setting(1, "seeds from --seed on", rule=COUNT)
    generate_standard: bool = setting(False, "also from the plain noise of each seed")
    golden_noise_scale: float = setting(1.0, "how much of the network's change of the noise is taken", rule=FINITE)
    output_size: int | None = setting(None, f"pixels a side; {WITHOUT_IT}", rule=COUNT)
    height: int | None = setting(None, "--output_size without it", rule=COUNT)
    width: int | None = setting(None, "--output_size without it", rule=COUNT)


@dataclass(kw_only=True)
class GoldenSampleSettings(BaseModelSettings, SamplingSettings, DrawnNoiseSettings):
    """How pictures are drawn from golden noise."""
