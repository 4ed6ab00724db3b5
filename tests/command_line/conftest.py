from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict

from diffusers_ext.command_line.main import main
from diffusers_ext.nullspace.collect import collect_statistics
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_lora import add_random_lora

PROMPTS = ("a red seven", "a blue three")


class Ran(NamedTuple):
    """What a command line gave."""

    code: int
    out: str
    err: str

    @property
    def facts(self) -> dict[str, Any]:
        """The one JSON document on stdout."""
        return json.loads(self.out)


@pytest.fixture
def run(capsys) -> Callable[..., Ran]:
    """Run a command line in this process; keyword arguments become flags, lists several values."""

    def call(*words: str | Path, **flags: Any) -> Ran:
        line = [str(word) for word in words]
        for name, value in flags.items():
            values = value if isinstance(value, list) else [value]
            line += [f"--{name}", *(str(one) for one in values if one is not True)]
        capsys.readouterr()
        code = main(line)
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """Folder of a random pipeline of the digits example's sizes."""
    folder = tmp_path_factory.mktemp("digits") / "model"
    random_digits_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompts(tmp_path_factory) -> Path:
    """A prompts file with a comment and a blank line."""
    path = tmp_path_factory.mktemp("prompts") / "known.txt"
    path.write_text("\n".join(["# known", *PROMPTS, "", ""]))
    return path


@pytest.fixture(scope="session")
def lora(tmp_path_factory) -> Path:
    """Folder of a random LoRA on K and V of the digits model."""
    folder = tmp_path_factory.mktemp("lora")
    unet = random_digits_pipeline().unet
    add_random_lora(unet, ["attn2.to_k", "attn2.to_v"])
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    return folder


@pytest.fixture(scope="session")
def statistics(tmp_path_factory, digits) -> Path:
    """Folder of the statistics of `PROMPTS` on the digits model."""
    folder = tmp_path_factory.mktemp("statistics")
    collect_statistics(random_digits_pipeline(), PROMPTS).save_pretrained(folder)
    return folder
