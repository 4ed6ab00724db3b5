"""The upload of what a run makes: what is asked before it begins, and the cards of the null-space scripts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from diffusers_ext.core.pipelines import plain_class_name
from diffusers_ext.core.settings import RunSettings, Settings, named_values
from diffusers_ext.hub.card import Card, make_card
from diffusers_ext.hub.kinds import find_licence, named_licence, public_name
from diffusers_ext.hub.push import check_card, make_repository, push_folder
from diffusers_ext.nullspace.lora_files import KOHYA_NAME, measured_drift
from diffusers_ext.nullspace.settings import CollectionSettings, NullSpaceSettings
from diffusers_ext.nullspace.statistics import FeatureStatistics, statistics_card
from diffusers_ext.training.nullspace.data import list_images, read_captions


def card_arguments(settings: RunSettings) -> dict[str, Any]:
    """What every card needs and the command line says; `ValueError` where no licence is known."""
    base = settings.hub_base_model or settings.pretrained_model_name_or_path
    try:
        given = named_licence(settings.hub_license, settings.hub_license_name, settings.hub_license_link)
        licence = find_licence(base, given, token=settings.hub_token)
    except ValueError as error:
        raise ValueError(f"{error} The flag is `--hub_license`.") from error
    return {"base_model": base, "license": licence, "token": settings.hub_token}


def check_login(settings: RunSettings) -> None:
    """Raise `ValueError` where nobody is logged in: before the run, not after it."""
    try:
        HfApi(token=settings.hub_token).whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError(
            "`hub_token` must be given with `push_to_hub` where nobody is logged in, got None. Run `hf auth login`."
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise ValueError(
            "`hub_token` must be a token of the Hub, got one that it refuses. Make a new one there."
        ) from error


def repository_name(settings: RunSettings) -> str:
    """The repository of `--hub_model_id`, or one with the name of the output folder."""
    return settings.hub_model_id or Path(settings.output_dir).resolve().name


def upload_arguments(settings: RunSettings) -> dict[str, Any]:
    """What the command line says about the upload itself."""
    return {"private": settings.hub_private_repo or None, "token": settings.hub_token}


def reported_arguments(settings: Settings) -> dict[str, Any]:
    """What a report keeps of the command line: all but the token."""
    return {name: value for name, value in named_values(settings).items() if name != "hub_token"}


logger = get_logger(__name__)


# Of the arguments, what a card shows.
_SHOWN = (
    "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler", "mixed_precision", "seed", "random_flip", "snr_gamma",
    "with_prior_preservation", "eps", "null_energy", "nullspace_threshold", "lora_dropout",
)  # fmt: skip


def prepare_upload(settings: RunSettings, card: Callable[..., Card]) -> None:
    """Make the repository and let the Hub read a card before a run: at its end it would be too late.

    Args:
        settings: of a script.
        card: with what is known by now.

    Raises:
        ValueError: the Hub refuses the card.
    """
    check_card(card("user/name"))
    make_repository(repository_name(settings), **upload_arguments(settings))


def subject_facts(
    settings: NullSpaceSettings,
    pipeline: DiffusionPipeline,
    statistics: FeatureStatistics | None = None,
    pictures: Sequence[Path] = (),
) -> dict[str, Any]:
    """What the card of a trained subject tells besides base model and licence, JSON-able.

    Args:
        settings: of the training script.
        pipeline: that trains or was trained.
        statistics: of what was preserved.
        pictures: one per validation prompt, below the output folder.
    """
    facts = {
        "trained_on": _trained_on(settings, statistics),
        "settings": shown_settings({name: getattr(settings, name) for name in _SHOWN}),
        "widget": widget_of(settings, settings.validation_prompt, pictures),
        "instance_prompt": settings.instance_prompt,
        "pipeline": plain_class_name(pipeline),
    }
    return facts if settings.full_finetune else {**facts, "directions": settings.directions}


def subject_card(
    settings: NullSpaceSettings,
    pipeline: DiffusionPipeline,
    statistics: FeatureStatistics | None = None,
    report: Mapping[str, Any] | None = None,
    pictures: Sequence[Path] = (),
) -> Callable[..., Card]:
    """The card of a trained subject but for the name of its repository.

    Args:
        settings, pipeline, statistics, pictures: as in `subject_facts`.
        report: as in `training_report.json`; before the training there is none.

    Raises:
        ValueError: a fact is not known, such as the licence.
    """
    drifts = (report or {}).get("predicted_drift")
    return make_card(
        "subject_pipeline" if settings.full_finetune else "null_space_lora",
        **subject_facts(settings, pipeline, statistics, pictures),
        **({} if settings.full_finetune else {"rank": settings.rank, "kohya_file": KOHYA_NAME}),
        results=measured_drift(drifts, statistics) if drifts else (),
        statistics=statistics is not None,
        **card_arguments(settings),
    )


def _trained_on(settings: NullSpaceSettings, statistics: FeatureStatistics | None) -> str:
    count = len(list_images(settings.instance_data_dir))
    pictures = "1 picture" if count == 1 else f"{count} pictures"
    parts = [f"{pictures} of the subject at {settings.resolution} x {settings.resolution} pixels."]
    if captions := read_captions(settings.instance_data_dir):
        parts.append(f"{len(captions)} of {count} were trained with captions of their own.")
    if settings.with_prior_preservation:
        parts.append(
            f"Beside them {settings.num_class_images} pictures of its class that the base model drew "
            "itself (prior preservation)."
        )
    if statistics is not None and statistics.facts["prompts"]:
        count = len(statistics.facts["prompts"])
        prompts = "1 prompt" if count == 1 else f"{count} prompts"
        parts.append(f"What the base model reads for {prompts} was preserved.")
    return " ".join(parts)


def publish(
    settings: NullSpaceSettings,
    pipeline: DiffusionPipeline,
    statistics: FeatureStatistics | None,
    report: Mapping[str, Any],
    pictures: Sequence[Path],
) -> str:
    """Upload the output folder of a training (weights, statistics, report, card, last pictures).

    Checkpoints, logs and the pictures that were trained on stay here. A pipeline comes to the root of the repository,
    where `from_pretrained` looks for it.

    Returns:
        Address of the commit.
    """
    inputs = (settings.instance_data_dir, settings.class_data_dir)
    return push_output(
        settings,
        subject_card(settings, pipeline, statistics, report, pictures),
        ["class_*", *left_here(settings, *inputs)],
        at_root="pipeline" if settings.full_finetune else None,
    )


def collection_card(
    settings: CollectionSettings, pipeline: DiffusionPipeline, prompts: Sequence[str]
) -> Callable[..., Card]:
    """What is known of the card of statistics before they are collected."""
    return make_card(
        "feature_statistics",
        trained_on="Prompts.",
        pipeline=plain_class_name(pipeline),
        num_prompts=len(prompts),
        example_prompts=list(prompts[:1]),
        layers=1,
        megabytes=1.0,
        **card_arguments(settings),
    )


def publish_statistics(
    settings: CollectionSettings, pipeline: DiffusionPipeline, statistics: FeatureStatistics
) -> str:
    """Upload the output folder of a collection (statistics, report, plots, card).

    Returns:
        Address of the commit.
    """
    card = statistics_card(statistics, pipeline=plain_class_name(pipeline), **card_arguments(settings))
    return push_output(settings, card, [".*", "progress/*"])


def push_output(
    settings: RunSettings, card: Callable[..., Card], ignored: Sequence[str] = (), at_root: str | None = None
) -> str:
    """Upload the output folder but for some patterns; returns the address of the commit.

    Args:
        settings: of the script.
        card: of the result.
        ignored: patterns of files that stay here.
        at_root: a folder in it whose files come to the root of the repository.
    """
    commit = push_folder(
        settings.output_dir,
        repository_name(settings),
        card,
        commit_message="Upload results of the training scripts",
        ignore_patterns=ignored,
        at_root=at_root,
        **upload_arguments(settings),
    )
    logger.info(f"Uploaded to {commit}")
    return commit


def card_record(settings: RunSettings, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a report keeps for a later upload by `push_artifact`: facts of the card, JSON-able."""
    base = settings.hub_base_model or public_name(settings.pretrained_model_name_or_path)
    # One that the Hub does not list is more than a word, and is to be given again.
    licence = None if settings.hub_license_name else settings.hub_license
    return {"base_model": base, "license": licence, **facts}


def widget_of(settings: RunSettings, prompts: Sequence[str], files: Sequence[Path]) -> list[tuple[str, str]]:
    """Prompts with their pictures or clips below the output folder, as a card names them."""
    return [(p, path.relative_to(settings.output_dir).as_posix()) for p, path in zip(prompts, files)]


def shown_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that are not set, which a card leaves out."""
    return {name: value for name, value in settings.items() if value is not None}


def left_here(settings: RunSettings, *inputs: str | None) -> list[str]:
    """Patterns for what an upload of the output folder leaves out: checkpoints, logs and the inputs.

    Args:
        settings: of a training script.
        inputs: folders of the training data, wherever they are.
    """
    root = Path(settings.output_dir).resolve()
    folders = [Path(folder).resolve() for folder in inputs if folder is not None]
    folders.append(Path(settings.output_dir, settings.logging_dir).resolve())
    below = [f.relative_to(root).as_posix() for f in folders if f.is_relative_to(root)]
    # The names of TensorBoard's files hold that of the machine.
    return ["checkpoint-*", ".partial-*", "*tfevents*", *(f"{folder}/*" for folder in below)]
