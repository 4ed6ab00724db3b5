"""`push_to_hub` of models and pipelines, with their card; takes the place of diffusers' own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import Module

from diffusers_ext.core.hub import Card, push_folder, split_arguments


_SAVE_ARGUMENTS = (
    "safe_serialization", "variant", "max_shard_size", "is_main_process", "save_function",
    "use_flashpack",
)  # fmt: skip


def check_no_adapters(pipeline: Any) -> None:
    """Refuse to save a pipeline with LoRAs loaded: its weights would be written under PEFT's names.

    diffusers writes them all the same, and what it then loads has neither the LoRA nor the weights
    beneath it.

    Raises:
        ValueError: a component with an adapter; it names the adapters and what to do.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        return
    for name, component in pipeline.components.items():
        adapted = isinstance(component, Module) and any(
            isinstance(part, BaseTunerLayer) for part in component.modules()
        )
        if adapted:
            adapters = sorted(getattr(component, "peft_config", {}))
            raise ValueError(
                f"A pipeline must hold no adapters when it is saved, got {adapters} in its `{name}`, "
                "which would be lost. Save them by themselves (LoRAs with `save_lora` or "
                "`push_lora`, erasers with `save_eraser`), then call `unload_lora_weights()` on the "
                "pipeline; or make LoRAs part of the weights by `fuse_lora()` before that call."
            )


class PushWithCard:
    """Mixin, before the class of diffusers: uploads go in one commit, together with a model card.

    A subclass makes its card in `_card`.
    """

    def _card(self, *, token: str | None, **facts: Any) -> Callable[..., Card]:
        """The card but for the repository's name; raises `ValueError` if a fact is missing."""
        raise TypeError(f"{type(self).__name__} must define `_card`.")

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **arguments: Any,
    ) -> None:
        """As in diffusers; with `push_to_hub=True` also upload it, and nothing else of that folder.

        Args:
            save_directory: folder, made when absent.
            safe_serialization: safetensors in place of pickles.
            variant: part of the file names, such as `"fp16"`.
            max_shard_size: of one weight file.
            push_to_hub: upload afterwards; a missing fact is an error before anything is written.
            repo_id: repository; the folder's name when `None`.
            arguments: with `push_to_hub` those of `push_to_hub`; else those of diffusers.

        Raises:
            ValueError: a pipeline with adapters loaded, which would be lost (`check_no_adapters`).
        """
        check_no_adapters(self)
        saving: dict[str, Any] = {"safe_serialization": safe_serialization, "variant": variant}
        if max_shard_size is not None:
            saving["max_shard_size"] = max_shard_size
        if not push_to_hub:
            super().save_pretrained(save_directory, **saving, **arguments)
            return
        saving |= {name: arguments.pop(name) for name in _SAVE_ARGUMENTS if name in arguments}
        hub, facts = split_arguments(arguments)
        card = self._card(token=hub.get("token"), **facts)
        super().save_pretrained(save_directory, **saving)
        self._push(card, repo_id or Path(save_directory).resolve().name, saving, hub)

    def push_to_hub(self, repo_id: str, **arguments: Any) -> str:
        """Upload to a model repository, made when absent, with a model card, in one commit.

        Args:
            repo_id: `"user/name"`.
            arguments: `private`, `token`, `revision`, `create_pr`, `commit_message`, `subfolder`;
                `safe_serialization`, `variant` and others of saving; and for the card, where the
                object does not know them, `base_model`, `license`, `trained_on`, `settings`,
                `results` and the facts of its kind.

        Returns:
            Address of the commit, or of the pull request.

        Raises:
            ValueError: a fact that is neither known nor given; nothing has been uploaded then.
        """
        check_no_adapters(self)
        saving = {n: arguments.pop(n) for n in _SAVE_ARGUMENTS if n in arguments}
        hub, facts = split_arguments(arguments)
        return self._push(self._card(token=hub.get("token"), **facts), repo_id, saving, hub)

    def _push(
        self,
        card: Callable[..., Card],
        repo_id: str,
        saving: dict[str, Any],
        hub: dict[str, Any],
    ) -> str:
        with tempfile.TemporaryDirectory() as folder:
            super().save_pretrained(folder, **saving)
            return push_folder(folder, repo_id, card, **hub)
