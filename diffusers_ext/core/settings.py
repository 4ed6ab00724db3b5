"""Settings as dataclasses, declared once: how one is declared, and those that runs of more than one tool share."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar


def by_name(modules: Mapping[str, str]) -> dict[str, str]:
    """`{name: module}` of `{module: "names between spaces"}`."""
    return {name: module for module, names in modules.items() for name in names.split()}


def imported_name(package: str, sources: Mapping[str, str], name: str) -> Any:
    """What the `__getattr__` of a package returns for a name of `sources` `{name: module}`; the package keeps it."""
    if name not in sources:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    found = getattr(import_module(sources[name]), name)
    setattr(sys.modules[package], name, found)
    return found


def did_you_mean(given: str | Iterable[str], known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for an error, with the nearest known name of each; empty without any."""
    names = [given] if isinstance(given, str) else list(given)
    options = {str(name).lower(): str(name) for name in known}
    found = [get_close_matches(str(name).lower(), options, n=1, cutoff=0.6) for name in names]
    meant = dict.fromkeys(options[match] for matches in found for match in matches)
    return f" Did you mean {' and '.join(map(repr, meant))}?" if meant else ""


def check_keywords(arguments: Iterable[str], known: Iterable[str], function: str, takes: str | None = None) -> None:
    """Raise `TypeError`, as Python does, for a keyword that would be passed over in silence.

    `takes` is a clause with the most useful of the known names, such as `"it takes rank"`.
    """
    known = list(known)
    for name in arguments:
        if name not in known:
            told = f": {takes}." if takes else "."
            raise TypeError(
                f"{function}() got an unexpected keyword argument {name!r}{told}{did_you_mean(name, known)}"
            )


@dataclass(frozen=True)
class Rule:
    """What a value must be, in the words of an error, and whether one is it."""

    text: str
    holds: Callable[[Any], bool]


def at_least(least: int) -> Rule:
    """For counts and weights; infinity is none."""
    return Rule(f"at least {least}", lambda value: least <= value < math.inf)


COUNT = at_least(1)
NOT_NEGATIVE = at_least(0)
POSITIVE = Rule("positive", lambda value: 0 < value < math.inf)
FINITE = Rule("a finite number", math.isfinite)
BELOW_ONE = Rule("in [0, 1)", lambda value: 0 <= value < 1)
SHARE = Rule("in [0, 1]", lambda value: 0 <= value <= 1)


@dataclass(frozen=True)
class Declaration:
    """What is known of a setting besides its name, its type and its default.

    Attributes:
        help: what a value does, or which one is taken without it.
        rule: for values that are given.
        aliases: other spellings of the flag alone.
        old_names: of earlier versions: on the command line, in YAML files and in what runs have saved.
        flag: its name on the command line where that is not the field's.
        repeated: a list whose items have a flag each, in place of one flag with all items.
        several: one flag with several words, for a type that does not say so.
        with_no: there is a `--no-` form too, as where the default is not false.
    """

    help: str
    rule: Rule | None = None
    choices: tuple[Any, ...] | None = None
    aliases: tuple[str, ...] = ()
    old_names: tuple[str, ...] = ()
    flag: str | None = None
    repeated: bool = False
    several: bool = False
    with_no: bool = False


def setting(default: Any, help: str, **declared: Any) -> Any:
    """A field of `Settings` with its default; `declared` are the other attributes of `Declaration`."""
    return _field(default, Declaration(help, **declared))


def required(help: str, **declared: Any) -> Any:
    """A field of `Settings` that must be given."""
    return _field(MISSING, Declaration(help, **declared))


def as_in(settings_class: type[Settings], name: str, **changed: Any) -> Any:
    """The field of another class, with another `default`, or parts of its `Declaration` changed."""
    found = next(other for other in fields(settings_class) if other.name == name)
    default = changed.pop("default", MISSING)
    return _field(default, replace(declaration(found), **changed))


def _field(default: Any, declared: Declaration) -> Any:
    metadata = {"setting": declared}
    if isinstance(default, list):
        return field(default_factory=partial(list, default), metadata=metadata)
    return field(default=default, metadata=metadata)


def declaration(of: Field) -> Declaration:
    """What was declared of a field."""
    return of.metadata["setting"]


def flag_name(of: Field) -> str:
    """The name of a field on the command line, without dashes."""
    return declaration(of).flag or of.name


@dataclass(kw_only=True)
class Settings:
    """Base of all settings: `title` is that of the group on the command line; values are checked."""

    title: ClassVar[str | None] = None

    def __init_subclass__(cls, title: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.title = title

    def __post_init__(self) -> None:
        self.settle()
        self.check()

    def settle(self) -> None:
        """Fill in what is not given and follows from other settings."""

    def check(self) -> None:
        """Raise `ValueError` for what is wrong without looking at files and models."""
        for one in fields(self):
            declared, value = declaration(one), getattr(self, one.name)
            if value is None:
                continue
            if declared.rule is not None and not declared.rule.holds(value):
                raise ValueError(f"`{one.name}` must be {declared.rule.text}, got {value}.")
            if declared.choices is not None and value not in declared.choices:
                meant = did_you_mean(str(value), map(str, declared.choices))
                raise ValueError(f"`{one.name}` must be one of {list(declared.choices)}, got {value!r}.{meant}")


def setting_names(classes: Iterable[type[Settings]]) -> set[str]:
    """Names of all settings of some classes, as flags and YAML files have them, old ones too."""
    found = [one for each in classes for one in fields(each)]
    return {name for one in found for name in (flag_name(one), *declaration(one).old_names)}


def named_values(settings: Settings) -> dict[str, Any]:
    """All values by the names that the command line has for them."""
    return {flag_name(one): getattr(settings, one.name) for one in fields(settings)}


def with_new_names(values: dict[str, Any], settings_class: type[Settings]) -> dict[str, Any]:
    """Values of a file with the names that settings have today; `ValueError` for one beside its old name."""
    values = dict(values)
    for one in fields(settings_class):
        name = flag_name(one)
        for old in declaration(one).old_names:
            if old not in values:
                continue
            if name in values:
                raise ValueError(f"`{name}` must not stand beside its other name `{old}`.")
            values[name] = values.pop(old)
    return values


PRECISIONS = ("no", "fp16", "bf16")
SEED = Rule("from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)
A_FOLDER = Rule("a folder", lambda value: not Path(value).is_file())
WITHOUT_IT = "the model's own without it"


@dataclass(kw_only=True)
class ModelSettings(Settings, title="model"):
    """Which base model, how it runs and where the results go."""

    config: str | None = setting(None, "YAML file of arguments, one for all scripts; flags override it")
    pretrained_model_name_or_path: str = required(
        "base model: folder, Hub name, or .safetensors file of Stable Diffusion or SDXL"
    )
    single_file_config: str | None = setting(
        None,
        "folder or Hub name of a diffusers model whose configs and tokenizer a .safetensors file is read "
        "with; what diffusers infers without it",
    )
    revision: str | None = setting(None, "revision of the base model on the Hub")
    variant: str | None = setting(None, "variant of the weight files, e.g. fp16")
    output_dir: str = required("folder for everything this run writes", rule=A_FOLDER)
    overwrite_output_dir: bool = setting(
        False, "replace a finished result, which is refused without it; other files stay"
    )
    seed: int = setting(0, "seed of everything random", rule=SEED)
    mixed_precision: str | None = setting(
        None, "of the frozen weights and of what is computed; accelerate's without it, else no", choices=PRECISIONS
    )
    traceback: bool = setting(False, "show where an error came from")
    allow_tf32: bool = setting(False, "round the inputs of float32 products to 10 bits: faster on Ampere and newer")


# {name: (package, class)}; AdamW is torch's own.
OPTIMIZERS = {
    "adamw": ("torch", "optim.AdamW"),
    "adamw_fused": ("torch", "optim.AdamW"),
    "adamw_8bit": ("bitsandbytes", "optim.AdamW8bit"),
    "prodigy": ("prodigyopt", "Prodigy"),
    "schedule_free": ("schedulefree", "AdamWScheduleFree"),
}
_LEAST_PRODIGY_RATE = 0.1


def check_package(name: str, value: str, package: str) -> None:
    """Raise `ValueError` where the package that the value of a setting stands on is not installed."""
    if find_spec(package) is None:
        raise ValueError(
            f"`{name}` must have its package {package}, got {value!r} without it. Install it "
            f"(`pip install {package}`), or leave the flag out."
        )


@dataclass(kw_only=True)
class TrainingSettings(Settings, title="training"):
    """Loop, optimizer and checkpoints."""

    max_train_steps: int | None = setting(600, "optimizer steps", rule=COUNT)
    train_batch_size: int | None = setting(4, "samples of a step in each process", rule=COUNT)
    gradient_accumulation_steps: int | None = setting(
        None,
        "batches whose gradients are averaged for one optimizer step; accelerate's without it, else 1",
        rule=COUNT,
    )
    gradient_checkpointing: bool = setting(
        False, "compute activations again instead of keeping them: less memory, more time"
    )
    channels_last: bool = setting(False, "lay out the convolutions of a UNet for tensor cores")
    compile_model: bool = setting(
        False, "compile what trains, the denoiser or the network, by `torch.compile`; its backend is accelerate's"
    )
    dataloader_num_workers: int = setting(0, "processes that load data", rule=NOT_NEGATIVE)
    dataloader_pin_memory: bool = setting(
        False, "load into page-locked memory, from which a GPU copies while it computes"
    )
    optimizer: str = setting(
        "adamw",
        "of what trains; adamw_8bit needs bitsandbytes, prodigy prodigyopt, which finds its rate itself, "
        "schedule_free schedulefree, which averages weights in place of a schedule",
        choices=tuple(OPTIMIZERS),
    )
    learning_rate: float | None = setting(
        None, "step size of the optimizer; the script has its own without it", rule=POSITIVE
    )
    scale_lr: bool = setting(False, "multiply the learning rate by processes, batch size and accumulated batches")
    lr_scheduler: str | None = setting("constant", "name of a diffusers schedule of the rate")
    lr_warmup_steps: int = setting(0, "steps in which the rate rises to its full value", rule=NOT_NEGATIVE)
    adam_beta1: float = setting(0.9, "momentum: the nearer to 1, the longer past gradients count", rule=BELOW_ONE)
    adam_beta2: float = setting(0.999, "the nearer to 1, the longer past squared gradients count", rule=BELOW_ONE)
    adam_weight_decay: float | None = setting(
        0.0, "share of the rate by which a step shrinks trained weights", rule=NOT_NEGATIVE
    )
    adam_epsilon: float = setting(
        1e-8, "added to the divisor of a step; larger ones damp steps of tiny gradients", rule=NOT_NEGATIVE
    )
    max_grad_norm: float = setting(
        1.0,
        "gradients are scaled down to this norm where theirs is larger",
        rule=Rule("positive", lambda value: value > 0),
    )
    checkpointing_steps: int | None = setting(
        None, "steps between two checkpoints; none are written without it", rule=COUNT
    )
    checkpoints_total_limit: int | None = setting(
        None, "checkpoints that are kept, the newest; all without it", rule=COUNT
    )

    def check(self) -> None:
        """Also the name of the schedule, and what the optimizer needs."""
        from diffusers.optimization import SchedulerType

        super().check()
        self._check_optimizer()
        # A piecewise schedule needs rules that no setting gives.
        known = [kind.value for kind in SchedulerType if kind.value != "piecewise_constant"]
        if self.lr_scheduler is not None and self.lr_scheduler not in known:
            raise ValueError(f"`lr_scheduler` must be one of {known}, got {self.lr_scheduler}.")

    def _check_optimizer(self) -> None:
        name = self.optimizer
        check_package("optimizer", name, OPTIMIZERS[name][0])
        if name == "prodigy" and self.learning_rate is not None and self.learning_rate < _LEAST_PRODIGY_RATE:
            raise ValueError(
                f"`learning_rate` must be near 1 with `optimizer` prodigy, which multiplies the rate that it finds, "
                f"got {self.learning_rate}. Pass `--learning_rate 1`."
            )
        if name == "schedule_free" and self.lr_scheduler not in (None, "constant", "constant_with_warmup"):
            raise ValueError(
                "`lr_scheduler` must be constant or constant_with_warmup with `optimizer` schedule_free, which takes "
                f"the place of one, got {self.lr_scheduler}."
            )


@dataclass(kw_only=True)
class ResumeSettings(Settings):
    """How a stopped run goes on."""

    resume_from_checkpoint: str | None = setting(None, "'latest', or one of the folders that a run leaves")


@dataclass(kw_only=True)
class ReportingSettings(Settings, title="reporting"):
    """Logs, and how often a run is validated."""

    report_to: str | None = setting(None, "tensorboard, wandb, ...; nothing without it")
    logging_dir: str = setting("logs", "below the output folder")
    logging_steps: int = setting(10, "steps between two log lines", rule=COUNT)
    validation_steps: int | None = setting(
        None, "steps between two validations; only at the end without it", rule=COUNT
    )

    def check(self) -> None:
        """Also that accelerate has the tracker: it passes over others without a word."""
        super().check()
        if self.report_to in (None, "all"):
            return
        from accelerate.tracking import get_available_trackers

        trackers = [str(tracker) for tracker in get_available_trackers()]
        if self.report_to not in trackers:
            raise ValueError(
                f"`report_to` must be an installed tracker, 'all' or one of {trackers}, got {self.report_to}."
            )


@dataclass(kw_only=True)
class ImageReportingSettings(ReportingSettings, title="reporting"):
    """Logs and validation pictures."""

    validation_prompt: list[str] = setting([], "prompt of validation pictures; may be repeated", repeated=True)
    num_validation_images: int = setting(4, "validation pictures of a prompt", rule=COUNT)


@dataclass(kw_only=True)
class HubSettings(Settings, title="hub"):
    """Upload of the result."""

    push_to_hub: bool = setting(False, "upload the result with a model card")
    hub_model_id: str | None = setting(None, "repository; the output folder's name without it")
    hub_token: str | None = setting(None, "token of the Hub; taken from the login without it")
    hub_private_repo: bool = setting(False, "make a new repository private")
    hub_license: str | None = setting(None, "licence of the result, e.g. apache-2.0; the base model's own without it")
    hub_license_name: str | None = setting(None, "name of a licence that is `other` on the Hub")
    hub_license_link: str | None = setting(None, "address of such a licence")
    hub_base_model: str | None = setting(None, "Hub name of the base model, where that is a folder here")


@dataclass(kw_only=True)
class SamplingSettings(Settings, title="sampling"):
    """How pictures are drawn, wherever a script draws any."""

    negative_prompt: str = setting("", "what pictures are guided away from")
    num_inference_steps: int = setting(50, "denoising steps of a picture", rule=COUNT)
    guidance_scale: float = setting(
        7.5, "of classifier-free guidance: how far past the prompt; 1 is none", rule=FINITE
    )


@dataclass(kw_only=True)
class RunSettings(ModelSettings, ResumeSettings, HubSettings):
    """What every run has that makes something of a base model."""


@dataclass(kw_only=True)
class TrainingRunSettings(RunSettings, TrainingSettings, ReportingSettings):
    """What every training has."""
