from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from examples.digits.pictures import draw_glyphs, tint
from tests.training.script_runs import command_line
from training.train_nullspace_dreambooth import main, parse_args


# Few words, so that a true null space is left.
KNOWN = ("a red seven", "a blue three")


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps its state in globals, which a second run in one process would inherit."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


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


@pytest.fixture
def subject_line(tmp_path, pictures, knowledge):
    """Command line of a short training; `None` takes an argument away."""

    def line(name: str = "out", **arguments) -> list[str]:
        usual = {
            "output_dir": tmp_path / name,
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
def teach(subject_line, fresh_accelerator):
    """Run the training script in this process; returns the folder it wrote."""

    def run(name: str = "out", **arguments) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return main(parse_args(subject_line(name, **arguments)))

    return run
