"""Settings of the null-space runs: of a training, and of collecting what a model knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers_ext.core.settings import (
    BELOW_ONE,
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    WITHOUT_IT,
    ImageReportingSettings,
    ModelSettings,
    Rule,
    RunSettings,
    SamplingSettings,
    Settings,
    TrainingRunSettings,
    as_in,
    check_package,
    required,
    setting,
)
from diffusers_ext.hub.facts import DIRECTIONS

# Frozen directions have unit energy, so B holds output changes; a plain LoRA's B is far smaller.
_RATES = {"generalized": 3e-2, "null": 3e-2, "soft": 1e-3, "plain": 1e-3}
_FULL_RATE = 1e-4
# Of a joint-attention model: rate and schedule. At twice the rate prompts that nobody protected suffer.
_JOINT = {"generalized": (5e-2, "cosine")}
# {name: (package, keywords of diffusers' config)}, of the denoiser that stays as it is.
QUANTIZATIONS = {
    "bnb_4bit": ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "bnb_8bit": ("bitsandbytes", {"load_in_8bit": True}),
}
# How timesteps of flow matching are drawn and weighed, by diffusers' names.
WEIGHTING_SCHEMES = ("logit_normal", "mode", "cosmap", "sigma_sqrt", "none")
SCOPES = ("text_stream", "text_only", "all")
RECOMBINATIONS = 5  # drawn a preserved prompt
GUIDANCE = 3.5  # that FLUX.1-dev is told while it trains, as in diffusers


@dataclass(kw_only=True)
class AttentionSettings(Settings):
    """How the UNet computes attention."""

    enable_xformers_memory_efficient_attention: bool = setting(
        False, "xFormers in place of PyTorch's own memory-efficient attention"
    )


@dataclass(kw_only=True)
class KnowledgeSettings(Settings, title="knowledge"):
    """What is preserved and how it is measured."""

    knowledge_prompts: str | None = setting(None, "text file, one prompt a line, # comments")
    other_instance_prompts: list[str] = setting(
        [], "of other subjects, to be kept free; may be repeated", repeated=True
    )
    scope: str | None = setting(
        None,
        "of a joint-attention model, what trains: text-only layers and the text stream's keys and values, text-only "
        f"layers alone (exact), or all attention; {SCOPES[0]} without it",
        choices=SCOPES,
    )
    features: list[str] = setting(["k", "v"], "inputs of which projections: k v q out")
    cross_attention_layers: str | list[int] = setting("all", "all, or indices", several=True)
    no_sub_phrases: bool = setting(False, "preserve the prompts alone, not their parts and recombinations")
    statistics_batch_size: int = setting(4, "prompts at once", rule=COUNT)
    nullspace_threshold: float | None = setting(
        None, "directions of larger eigenvalues are protected; absolute", rule=POSITIVE
    )

    def settle(self) -> None:
        """Layers as indices."""
        super().settle()
        self.cross_attention_layers = read_layers(self.cross_attention_layers)

    def check(self) -> None:
        """Also the names of the features."""
        from diffusers_ext.nullspace.slots import check_features  # here: help needs no torch

        super().check()
        check_features(self.features)


@dataclass(kw_only=True)
class KnownModelSettings(ModelSettings, AttentionSettings, SamplingSettings, KnowledgeSettings):
    """A base model, and what of it is preserved."""

    guidance_scale: float | None = as_in(
        SamplingSettings,
        "guidance_scale",
        default=None,
        help="of classifier-free guidance: how far past the prompt; 1 is none; without it 7.5, or what the pipeline "
        "of a flow-matching model has by itself",
    )

    quantization: str | None = setting(
        None,
        "of the frozen denoiser's Linears, which LoRAs train on; needs bitsandbytes",
        choices=tuple(QUANTIZATIONS),
    )

    def check(self) -> None:
        """Also what a quantised denoiser needs."""
        super().check()
        if self.quantization is None:
            return
        check_package("quantization", self.quantization, QUANTIZATIONS[self.quantization][0])
        if self.pretrained_model_name_or_path.endswith(".safetensors"):
            raise ValueError(
                f"`quantization` must be left out with a single file, got {self.quantization!r}. Give the model in "
                "the layout of diffusers."
            )

    def settle(self) -> None:
        """Also guidance, as of a UNet."""
        super().settle()
        self.guidance_is_open = self.guidance_scale is None  # until the model is known: see `settle_guidance`
        self.guidance_scale = 7.5 if self.guidance_scale is None else self.guidance_scale

    def settle_guidance(self, usual: float) -> None:
        """Take a model's usual guidance where none is given."""
        self.guidance_scale = usual if self.guidance_is_open else self.guidance_scale


@dataclass(kw_only=True)
class StatisticsSettings(Settings, title="statistics"):
    """What is made of collected statistics."""

    compress: float | None = setting(
        None,
        "keep this share of the energy, e.g. 0.999",
        rule=Rule("a share of the energy in (0, 1]", lambda value: 0 < value <= 1),
    )
    store_spectra: bool = setting(
        False, "also write eigendecompositions, which whoever loads them need not compute; twice the size"
    )
    export_layout: bool = setting(False, "also as a tree of npy files", with_no=True)
    layout_timesteps: str | list[int] | None = setting(
        None, "of the tree: all (that the run visits), or numbers; 0 without it", several=True
    )
    layout_dir: str = setting(
        "layout",
        "folder of the tree, below the output folder",
        rule=Rule(
            "below the output folder", lambda value: not Path(value).is_absolute() and ".." not in Path(value).parts
        ),
    )
    visual_attention_map: bool = setting(False, "draw attention maps, of every timestep and layer")
    num_attention_maps: int = setting(4, "prompts whose maps are drawn, the first ones", rule=COUNT)

    def settle(self) -> None:
        """Timesteps as numbers."""
        super().settle()
        if self.layout_timesteps is not None:
            self.layout_timesteps = read_timesteps(self.layout_timesteps)


@dataclass(kw_only=True)
class SubjectSettings(Settings, title="subject"):
    """What is taught."""

    instance_data_dir: str = required("folder with pictures of the subject")
    instance_prompt: str = required('e.g. "a photo of sks dog"')
    resolution: int | None = setting(
        None,
        f"pixels a side of pictures; {WITHOUT_IT}",
        rule=Rule("a multiple of 8", lambda value: value >= 8 and value % 8 == 0),
    )
    no_center_crop: bool = setting(False, "squeeze in place of cropping")
    aspect_buckets: bool = setting(
        False, "pictures keep about their aspect ratio, from 1:2 to 2:1, at about the area of the square"
    )
    random_flip: bool = setting(False, "mirror half of the pictures")
    snr_gamma: float | None = setting(None, "Min-SNR weighting of the loss, usually 5; none without it", rule=POSITIVE)
    weighting_scheme: str | None = setting(
        None,
        "how a flow-matching model draws and weighs timesteps, as in diffusers; logit_normal without it",
        choices=WEIGHTING_SCHEMES,
    )
    guidance_embedding: float | None = setting(
        None, f"guidance scale that a model is told while it trains which takes it as an input; {GUIDANCE} without it"
    )
    with_prior_preservation: bool = setting(False, "also train on pictures of the class")
    class_data_dir: str | None = setting(None, "their folder; missing ones are drawn")
    class_prompt: str | None = setting(None, 'e.g. "a photo of a dog"')
    num_class_images: int = setting(100, "pictures of the class", rule=COUNT)
    prior_loss_weight: float = setting(1.0, "how much the loss on pictures of the class counts", rule=NOT_NEGATIVE)

    def check(self) -> None:
        """Also what belongs together."""
        super().check()
        if not self.instance_prompt.strip():
            raise ValueError(f"`instance_prompt` must not be empty, got {self.instance_prompt!r}.")
        if not self.with_prior_preservation:
            return
        if not (self.class_data_dir and self.class_prompt):
            raise ValueError("`--class_data_dir` and `--class_prompt` must be given with `--with_prior_preservation`.")
        if Path(self.class_data_dir).is_file():
            raise ValueError(f"`class_data_dir` must be a folder, got the file {self.class_data_dir}.")


@dataclass(kw_only=True)
class DirectionSettings(Settings, title="null space"):
    """Which directions train."""

    statistics: str | None = setting(None, "folder or Hub name of feature statistics")
    directions: str = setting("generalized", "which ones may change", choices=DIRECTIONS)
    rank: int = setting(1, "directions a layer", rule=COUNT)
    eps: float = setting(1e-4, "the larger, the more generalized directions may move what is known", rule=POSITIVE)
    null_energy: float | None = setting(None, "share of energy left unprotected", rule=BELOW_ONE)
    preservation_weight: float = setting(
        100.0, "how much soft directions pay for moving what is known", rule=NOT_NEGATIVE
    )
    lora_dropout: float = setting(0.0, "share of the LoRA's input that is zeroed", rule=BELOW_ONE)
    lora_bias: str = setting("none", "only none: a bias breaks preservation")
    use_dora: bool = setting(False, "refused: it breaks preservation")
    full_finetune: bool = setting(False, "train whole weights, projected")
    enable: bool = setting(True, "--no-enable is ordinary DreamBooth")

    def settle(self) -> None:
        """Without the null space all directions may change."""
        super().settle()
        if not self.enable:
            self.directions = "plain"


@dataclass(kw_only=True)
class NullSpaceSettings(
    KnownModelSettings, SubjectSettings, DirectionSettings, ImageReportingSettings,
    TrainingRunSettings,
):  # fmt: skip
    """How a subject is taught in the null space of what a model knows."""

    # With fewer or smaller steps the digits model reads new glyphs in nine pictures of ten only.
    max_train_steps: int | None = as_in(TrainingRunSettings, "max_train_steps", default=1000)
    train_batch_size: int | None = as_in(TrainingRunSettings, "train_batch_size", default=8)
    learning_rate: float | None = as_in(
        TrainingRunSettings,
        "learning_rate",
        default=None,
        help="step size of the optimizer; chosen by the directions and the kind of model without it",
    )
    lr_scheduler: str | None = as_in(
        TrainingRunSettings,
        "lr_scheduler",
        default=None,
        help="name of a diffusers schedule of the rate; constant without it, cosine where a joint-attention model "
        "chooses the rate, too",
    )

    def settle(self) -> None:
        """Also the learning rate of these directions, and the schedule, as of a UNet."""
        super().settle()
        # Until the model is known: `settle_rate` may choose otherwise.
        self.rate_is_open = self.learning_rate is None and self.lr_scheduler is None
        self.lr_scheduler = self.lr_scheduler or "constant"
        if self.learning_rate is None:
            self.learning_rate = _FULL_RATE if self.full_finetune else _RATES[self.directions]
            if self.optimizer == "prodigy":
                self.learning_rate = 1.0  # a factor of the rate that it finds

    def settle_rate(self, *, joint: bool) -> None:
        """Choose rate and schedule by the kind of model where neither is given."""
        if self.rate_is_open and joint and self.optimizer != "prodigy" and not self.full_finetune:
            default = self.learning_rate, self.lr_scheduler
            self.learning_rate, self.lr_scheduler = _JOINT.get(self.directions, default)
            if self.optimizer == "schedule_free":
                self.lr_scheduler = "constant"
        self.rate_is_open = False

    def check(self) -> None:
        """Also what full fine-tuning allows."""
        super().check()
        if self.full_finetune and self.optimizer in ("prodigy", "schedule_free"):
            raise ValueError(
                f"`optimizer` must be one of AdamW's with `--full_finetune`, got {self.optimizer!r}: its weights are "
                "not sums of updates that can be projected."
            )
        if self.full_finetune and self.directions == "plain":
            raise ValueError("`--full_finetune` must be constrained, got `--directions plain`.")
        if self.full_finetune and self.quantization:
            raise ValueError(f"`--full_finetune` must be of a base that is not quantised, got {self.quantization!r}.")
        if self.full_finetune and self.adam_weight_decay:
            raise ValueError(
                f"`adam_weight_decay` must be 0 with `--full_finetune`, got {self.adam_weight_decay}: "
                "it pulls the pretrained weights themselves towards zero."
            )
        if Path(self.instance_data_dir).resolve() == Path(self.output_dir).resolve():
            raise ValueError(f"`output_dir` must not be the folder of the pictures, got {self.output_dir} for both.")


@dataclass(kw_only=True)
class CollectionSettings(KnownModelSettings, StatisticsSettings, RunSettings):
    """How statistics of what a model knows are collected."""

    knowledge_prompts: str = as_in(KnowledgeSettings, "knowledge_prompts")

    def settle(self) -> None:
        """Features in one order."""
        from diffusers_ext.nullspace.slots import check_features

        super().settle()
        self.features = list(check_features(self.features))


def read_layers(value: str | Sequence[int | str], name: str = "cross_attention_layers") -> str | list[int]:
    """The layers of a flag as `"all"` or a list of indices."""
    return _all_or_numbers(value, name, "indices")


def read_timesteps(value: str | Sequence[int | str]) -> str | list[int]:
    """`--layout_timesteps` as `"all"`, or different numbers that are not negative."""
    timesteps = _all_or_numbers(value, "layout_timesteps", "numbers")
    if timesteps != "all" and (min(timesteps) < 0 or len(set(timesteps)) < len(timesteps)):
        raise ValueError(f"`layout_timesteps` must be different and not negative, got {timesteps}.")
    return timesteps


def _all_or_numbers(value: str | Sequence[int | str], name: str, numbers: str) -> str | list[int]:
    if value == "all" or list(value) == ["all"]:
        return "all"
    try:
        return [int(number) for number in value]
    except ValueError as error:
        raise ValueError(f"`{name}` must be 'all' or {numbers}, got {value}.") from error
