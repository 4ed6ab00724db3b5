from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from peft.utils import get_peft_model_state_dict
from PIL import Image

from diffusers_ext.evaluation.forgetting import ForgettingReport
from diffusers_ext.training import pairs as generate_npd
from diffusers_ext.training.nullspace import statistics as build_covariance
from diffusers_ext.training.nullspace.run import main, parse_args
from examples.digits.check_model import load_pipeline
from examples.digits.pictures import draw_glyphs, tint
from tests.tiny_lora import add_random_lora
from tests.training.killed_runs import ScriptServer
from tests.training.pair_runs import QUICK_PAIRS, write_prompt_file
from tests.training.script_runs import EVALUATED, QUICK, command_line, write_prompts
from training import evaluate_nullspace

# Few words, so that a true null space is left.
KNOWN = ("a red seven", "a blue three")


def reset_accelerator() -> None:
    """Accelerate keeps its state in globals, which a second run in one process would inherit."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def fresh_accelerator():
    """The next run starts with an accelerator of its own."""
    yield
    reset_accelerator()


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[ScriptServer]:
    """Starts scripts that are to be killed."""
    server = ScriptServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Three pictures of a glyph."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, ink in enumerate(draw_glyphs("triangle", 3, seed=0)):
        Image.fromarray(tint(ink, "white")).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def knowledge(tmp_path_factory) -> Path:
    """A prompts file."""
    path = tmp_path_factory.mktemp("knowledge") / "prompts.txt"
    path.write_text("\n".join(["# known", "", *KNOWN, ""]))
    return path


@pytest.fixture(scope="session")
def line_to(pictures, knowledge):
    """Command line of a short training into a folder; `None` takes an argument away."""

    def line(output_dir: Path, /, **arguments) -> list[str]:
        usual = {
            "output_dir": output_dir,
            "instance_data_dir": pictures,
            "instance_prompt": "a white sks",
            "knowledge_prompts": None if "statistics" in arguments else knowledge,
            "resolution": 32,
            "max_train_steps": 4,
            "train_batch_size": 2,
            "num_inference_steps": 3,
        }
        return command_line(**{**usual, **arguments})

    return line


@pytest.fixture
def subject_line(tmp_path, line_to):
    """The same into a folder of the test."""
    return lambda name="out", **arguments: line_to(tmp_path / name, **arguments)


@pytest.fixture
def teach(subject_line, fresh_accelerator):
    """Run the training script in this process; returns the folder it wrote."""

    def run(name: str = "out", **arguments) -> Path:
        reset_accelerator()
        return main(parse_args(subject_line(name, **arguments)))

    return run


@pytest.fixture
def prompts_file(tmp_path) -> Path:
    """A prompts file with a comment and blank lines."""
    return write_prompts(tmp_path / "knowledge.txt")


@pytest.fixture
def build(tmp_path, prompts_file, fresh_accelerator):
    """Run the collection script in this process; returns the folder it wrote."""

    def run(name: str = "out", **arguments) -> Path:
        arguments = {"knowledge_prompts": prompts_file, **QUICK, **arguments}
        line = command_line(output_dir=tmp_path / name, **arguments)
        return build_covariance.main(build_covariance.parse_args(line))

    return run


@pytest.fixture(scope="session")
def loras(tmp_path_factory) -> list[Path]:
    """Folders of two random LoRAs for the digits model."""
    folders = []
    for seed in (1, 2):
        pipeline = load_pipeline()
        add_random_lora(pipeline.unet, ["attn2.to_k", "attn2.to_v"], seed=seed)
        folders.append(tmp_path_factory.mktemp(f"lora_{seed}"))
        layers = get_peft_model_state_dict(pipeline.unet)
        pipeline.save_lora_weights(folders[-1], unet_lora_layers=layers)
    return folders


@pytest.fixture
def evaluate(tmp_path, loras, fresh_accelerator):
    """Run the evaluation script in this process; returns its report."""

    def run(name: str = "out", several: list[Path] | None = None, **arguments) -> ForgettingReport:
        arguments = {
            "output_dir": tmp_path / name,
            "overwrite_output_dir": True,
            "knowledge_prompts": write_prompts(tmp_path / "known.txt", EVALUATED),
            "lora": None if several else loras[0],
            "num_inference_steps": 2,
            "guidance_scale": 3.0,
            "num_images_per_prompt": 2,
            **arguments,
        }
        line = command_line(**arguments)
        for lora in several or ():
            line += ["--lora", str(lora)]
        return evaluate_nullspace.main(evaluate_nullspace.parse_args(line))

    return run


@pytest.fixture
def generate(tmp_path, fresh_accelerator):
    """Run the script that makes noise pairs in this process; returns the folder it wrote."""

    def run(name: str = "set", **arguments) -> Path:
        arguments = {
            "prompt_file": write_prompt_file(tmp_path / "prompts.txt"),
            "output_dir": tmp_path / name,
            **QUICK_PAIRS,
            **arguments,
        }
        return generate_npd.main(generate_npd.parse_args(command_line(**arguments)))

    return run
