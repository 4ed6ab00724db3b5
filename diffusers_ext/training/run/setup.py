"""What every run starts with: the accelerator, the optimizer, the schedule, the log."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DynamoBackend, ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from torch.utils.data import Dataset

from diffusers_ext.core.settings import PRECISIONS, ModelSettings, RunSettings, TrainingRunSettings, named_values
from diffusers_ext.eraser.recipe import EraserSettings
from diffusers_ext.evaluation.settings import (
    EditingSettings,
    ErasureSettings,
    ForgettingSettings,
    GoldenNoiseEvaluationSettings,
)
from diffusers_ext.nullspace.settings import CollectionSettings, NullSpaceSettings
from diffusers_ext.training.golden_noise.guard_settings import GuardTrainingSettings
from diffusers_ext.training.golden_noise.settings import (
    GoldenSampleSettings,
    PairNetworkSettings,
    PairSettings,
    SequenceNetworkSettings,
)
from diffusers_ext.training.run.checkpoint_files import (
    check_no_checkpoints,
    check_same_facts,
    find_checkpoint,
    read_checkpoint,
)
from diffusers_ext.training.run.checkpoints import Checkpoints, KeepRule, Stateful, is_trainable
from diffusers_ext.training.run.loop import LoopSettings, LossFunction, TrainingLoop, check_steps_left
from diffusers_ext.training.run.optimizers import make_optimizer, make_schedule, set_memory_format
from diffusers_ext.training.run.script import check_output_dir, clear_output_dir

NULL_SPACE_RUNS = (NullSpaceSettings, CollectionSettings, ForgettingSettings, EditingSettings)
GOLDEN_NOISE_RUNS = (
    PairSettings,
    PairNetworkSettings,
    SequenceNetworkSettings,
    GuardTrainingSettings,
    GoldenSampleSettings,
    GoldenNoiseEvaluationSettings,
)
ERASER_RUNS = (EraserSettings, ErasureSettings)


_MIXED_PRECISION = "ACCELERATE_MIXED_PRECISION"
_DYNAMO_BACKEND = "ACCELERATE_DYNAMO_BACKEND"
_ZERO_STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
_GRADIENT_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
# They split or replace the weights that these scripts save, project and compare.
_SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sharded data parallelism",
}


def settle_launcher_settings(settings: argparse.Namespace, variables: Mapping[str, str] = os.environ) -> None:
    """Give `mixed_precision` and `gradient_accumulation_steps`, where flags leave them open, accelerate's values.

    `accelerate launch` puts its flags and those of its config file into the environment. Its "no" is also what it says
    without being asked, so a flag may replace it. Raises `ValueError` where a flag contradicts accelerate, or
    accelerate has what no script can do.
    """
    _refuse_sharding(variables)
    if hasattr(settings, "mixed_precision"):
        theirs = variables.get(_MIXED_PRECISION, "no").lower()
        if theirs not in PRECISIONS:
            raise ValueError(
                f"`mixed_precision` must be one of {', '.join(PRECISIONS)}, got {theirs!r} from accelerate "
                f"({_MIXED_PRECISION}). Pass `--mixed_precision` to `accelerate launch`."
            )
        _settle(settings, "mixed_precision", theirs, _MIXED_PRECISION, said=theirs != "no")
    if hasattr(settings, "gradient_accumulation_steps"):
        theirs = variables.get(_GRADIENT_ACCUMULATION)
        if theirs is not None and not (theirs.isdecimal() and int(theirs) >= 1):
            raise ValueError(
                f"`gradient_accumulation_steps` must be a number from 1, got {theirs!r} from accelerate "
                f"({_GRADIENT_ACCUMULATION})."
            )
        name, steps = "gradient_accumulation_steps", int(theirs or 1)
        _settle(settings, name, steps, _GRADIENT_ACCUMULATION, said=theirs is not None)


def _refuse_sharding(variables: Mapping[str, str]) -> None:
    for variable, name in _SHARDING.items():
        if variables.get(variable, "false").lower() != "true":
            continue
        name += {"FSDP": "2" * (variables.get("FSDP_VERSION") == "2")}.get(name, "")
        if name == "DeepSpeed" and variables.get(_ZERO_STAGE, "").isdecimal():
            name += f" ZeRO-{variables[_ZERO_STAGE]}"
        raise ValueError(
            f"`accelerate launch` must run these scripts on whole models, got {name}. Launch them with `--multi_gpu` "
            "or on one process, without this part of accelerate's config file. What trains is small beside the frozen "
            "model, and so are its gradients and its optimizer: what saves memory is `--gradient_checkpointing` and "
            "`--mixed_precision bf16`."
        )


def _settle(settings: argparse.Namespace, name: str, theirs: object, variable: str, *, said: bool) -> None:
    """Take accelerate's value where a flag gave none; one that accelerate has `said` must be the flag's."""
    ours = getattr(settings, name)
    if ours is None:
        setattr(settings, name, theirs)
    elif said and ours != theirs:
        raise ValueError(
            f"`{name}` must be the same for accelerate and the script, got {theirs} from accelerate "
            f"({variable}) and {ours} from the script's arguments. Give it to one of them."
        )


logger = get_logger(__name__)

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(settings: ModelSettings) -> Accelerator:
    """The run's accelerator; also seeds and sets up logging. It writes nothing."""
    given = vars(settings)  # scripts without a loop have no loop arguments
    logging_dir = Path(settings.output_dir, given.get("logging_dir", "logs"))
    accelerator = Accelerator(
        gradient_accumulation_steps=given.get("gradient_accumulation_steps", 1),
        mixed_precision=settings.mixed_precision,
        log_with=given.get("report_to"),
        project_config=ProjectConfiguration(settings.output_dir, str(logging_dir)),
        dynamo_backend=_compiler(given),
    )
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    compiler = accelerator.state.dynamo_plugin.backend
    if "max_train_steps" not in given and compiler != DynamoBackend.NO:
        logger.warning(
            f"This script trains nothing and compiles nothing: accelerate's {compiler.value} has no effect."
        )
    set_seed(settings.seed)
    if settings.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def _compiler(given: Mapping[str, Any]) -> str | None:
    """The backend of `--compile_model`, accelerate's where it has one; `None` leaves all to accelerate."""
    theirs = os.environ.get(_DYNAMO_BACKEND, "NO")
    return "inductor" if given.get("compile_model") and theirs.upper() == "NO" else None


def make_output_dir(settings: RunSettings, accelerator: Accelerator) -> None:
    """Make the folder of a run, once nothing can be wrong with its arguments any more."""
    if accelerator.is_main_process:
        Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
        clear_output_dir(settings)
    accelerator.wait_for_everyone()


def start_trackers(accelerator: Accelerator, settings: TrainingRunSettings, name: str) -> None:
    """Start `--report_to` with the run's arguments, the token left out."""
    if settings.report_to is not None and accelerator.is_main_process:
        config = {k: v for k, v in named_values(settings).items() if isinstance(v, (int, float, str, bool))}
        config.pop("hub_token", None)
        accelerator.init_trackers(name, config=config)


def loop_settings(settings: TrainingRunSettings, description: str) -> LoopSettings:
    """The loop's settings from the command line."""
    names = [one.name for one in fields(LoopSettings) if one.name != "description"]
    return LoopSettings(**{name: getattr(settings, name) for name in names}, description=description)


def make_loop(
    settings: TrainingRunSettings,
    accelerator: Accelerator,
    model: torch.nn.Module,
    dataset: Dataset,
    loss_function: LossFunction,
    facts: dict[str, Any],
    description: str,
    *,
    parameters: Iterable[torch.nn.Parameter] | None = None,
    validate: Callable[[int], None] | None = None,
    keep: KeepRule = is_trainable,
    parts: Iterable[Stateful] = (),
    ema: EMAModel | None = None,
    buckets: Sequence[int] | None = None,
) -> TrainingLoop:
    """The loop of a script, with its optimizer, schedule and checkpoints.

    Args:
        facts: all that a checkpoint must agree with, but for the number of processes.
        parameters: what trains; all of the model that require a gradient when `None`.
        validate: called with the step every `--validation_steps` and at the end.
        keep, parts: as of `Checkpoints`.
        buckets: as of `TrainingLoop`.

    Raises:
        ValueError: as `check_resume`.
    """
    facts = {**facts, "num_processes": accelerator.num_processes}
    check_resume(settings, facts)
    trained = [p for p in model.parameters() if p.requires_grad] if parameters is None else parameters
    set_memory_format(settings, model)
    optimizer = make_optimizer(settings, trained, accelerator.num_processes)
    checkpoints = Checkpoints(
        accelerator,
        settings.output_dir,
        facts,
        settings.checkpointing_steps,
        settings.checkpoints_total_limit,
        keep,
        parts,
    )
    return TrainingLoop(
        accelerator,
        model,
        optimizer,
        dataset,
        loss_function,
        loop_settings(settings, description),
        make_schedule(settings, optimizer),
        buckets=buckets,
        checkpoints=checkpoints,
        resume_from_checkpoint=settings.resume_from_checkpoint,
        ema=ema,
        callbacks=[(settings.validation_steps or settings.max_train_steps, validate)] if validate else [],
    )


def run_facts(settings: TrainingRunSettings, **facts: Any) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued: settings of the mathematics, and `facts`."""
    names = (
        "seed", "train_batch_size", "gradient_accumulation_steps", "mixed_precision",
        "learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2",
        "adam_weight_decay", "adam_epsilon", "max_grad_norm", "scale_lr",
    )  # fmt: skip
    values = {name: getattr(settings, name) for name in names}
    # Left out where they are as before there were these settings.
    values |= {"optimizer": settings.optimizer} if settings.optimizer != "adamw" else {}
    values |= {"channels_last": True} if settings.channels_last else {}
    if settings.lr_scheduler not in ("constant", "constant_with_warmup"):
        values["max_train_steps"] = settings.max_train_steps
    return {**values, **facts}


def check_resume(settings: TrainingRunSettings, facts: dict[str, Any]) -> None:
    """Raise `ValueError` if a run cannot go on, or start, in its output folder; `facts` are those known so far."""
    if settings.resume_from_checkpoint is None:
        check_output_dir(settings)
        if settings.checkpointing_steps is not None and not settings.overwrite_output_dir:
            check_no_checkpoints(settings.output_dir)
        return
    folder = find_checkpoint(settings.output_dir, settings.resume_from_checkpoint)
    step, stored = read_checkpoint(folder)
    check_same_facts({name: stored.get(name) for name in facts}, facts, folder)
    check_steps_left(step, settings.max_train_steps)
