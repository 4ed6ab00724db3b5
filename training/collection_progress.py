"""What a collection of statistics has done so far, so that a killed one can go on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger

from diffusers_ext.core.artifacts import CONFIG_NAME, write_atomically
from diffusers_ext.core.text_files import read_json
from diffusers_ext.nullspace.settings import CollectionSettings
from training.checkpoint_folders import check_same_facts


logger = get_logger(__name__)

_FOLDER, _RUN_FILE = "progress", "run.json"


def collection_facts(
    args: CollectionSettings, prompts: list[str], num_processes: int
) -> dict[str, Any]:
    """What must be equal for a collection to be continued."""
    names = (
        "pretrained_model_name_or_path", "revision", "variant", "mixed_precision", "features",
        "cross_attention_layers", "no_sub_phrases", "negative_prompt", "num_inference_steps",
        "guidance_scale", "statistics_batch_size", "seed",
    )  # fmt: skip
    facts = {name: getattr(args, name) for name in names}
    if (
        getattr(args, "single_file_config", None) is not None
    ):  # of progress written before there was none
        facts["single_file_config"] = args.single_file_config
    facts["knowledge_prompts"] = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    facts["num_processes"] = num_processes
    return json.loads(json.dumps(facts))


def check_resume(args: CollectionSettings, facts: dict[str, Any]) -> None:
    """Raise `ValueError` if `--resume_from_checkpoint` asks for what is not there."""
    which, folder = args.resume_from_checkpoint, Path(args.output_dir, _FOLDER)
    if which is None:
        return
    if which != "latest":
        raise ValueError(
            f"`resume_from_checkpoint` must be 'latest' for statistics, got {which!r}."
        )
    if not (folder / _RUN_FILE).is_file():
        done = Path(args.output_dir, CONFIG_NAME).is_file()
        hint = " It holds finished statistics." if done else " Start without the flag."
        raise ValueError(
            "`resume_from_checkpoint` must find the progress of a stopped collection, got 'latest' "
            f"but {args.output_dir} holds none.{hint}"
        )
    check_same_facts(read_json(folder / _RUN_FILE, allow_nan=True), facts, folder)


@contextmanager
def collection_progress(
    args: CollectionSettings, facts: dict[str, Any], accelerator: Accelerator
) -> Iterator[Path]:
    """The progress folder of a collection; it goes when the block has ended well.

    Without `--resume_from_checkpoint` a stopped collection's progress is thrown away. It stays
    after an interruption that came later than the first saved totals; after a `ValueError`, which
    says that the collection itself was wrong, nothing of a new one stays.

    Yields:
        The folder, for `collect_statistics(progress_dir=)`.
    """
    folder = Path(args.output_dir, _FOLDER)
    is_new = not folder.parent.exists()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and args.resume_from_checkpoint is None:
        if folder.exists():
            logger.warning(f"Removing {folder}: --resume_from_checkpoint latest would continue it.")
            _remove(folder, False)
        folder.mkdir(parents=True)
        write_atomically(folder / _RUN_FILE, json.dumps(facts, indent=2) + "\n")
    accelerator.wait_for_everyone()
    try:
        yield folder
    except BaseException as error:
        wrong = isinstance(error, ValueError) and args.resume_from_checkpoint is None
        if accelerator.is_main_process and (wrong or not any(folder.glob("part-*/batches-*"))):
            _remove(folder, is_new)
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _remove(folder, False)


def _remove(folder: Path, with_parent: bool) -> None:
    # Under its new name a half removed folder is no progress.
    removed = folder.with_name(f".removed-{_FOLDER}")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)
    if with_parent:
        with suppress(OSError):  # another process may have written there
            folder.parent.rmdir()
