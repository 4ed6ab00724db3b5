"""Every example is short and is on the examples' page, with a command whose options exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from diffusers_ext.core.settings import setting_names
from diffusers_ext.eraser.recipe import EraserSettings

FOLDER = Path(__file__).resolve().parents[2] / "examples"
PAGE = (FOLDER / "README.md").read_text()
PARTS = ("__init__.py", "arguments.py", "app.py")  # and what is named after them or the demo
EXAMPLES = sorted(
    path.name for path in FOLDER.glob("*.py") if path.name not in PARTS and not path.name.startswith(("app_", "demo"))
)


def commands() -> list[list[str]]:
    """Script and arguments of every command on the page."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    return [words[1:] for words in lines if words[0] == "python"]


def test_there_is_one_example_for_each_common_wish():
    assert EXAMPLES == [
        "combine_eraser_with_lora.py",
        "erase_a_concept.py",
        "golden_noise_in_sdxl.py",
        "prompts_with_table.py",
        "protect_a_lora.py",
        "share_everything.py",
        "teach_a_subject.py",
    ]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_has_at_most_60_lines_and_can_be_run_as_a_file(name):
    text = (FOLDER / name).read_text()
    assert len(text.splitlines()) <= 60
    assert text.endswith('if __name__ == "__main__":\n    main()\n')


def test_every_example_is_on_the_page_with_a_line_and_a_command(subtests):
    for name in [*EXAMPLES, "app.py"]:
        with subtests.test(name=name):
            assert f"[{name}]({name})" in PAGE
            assert f"examples/{name}" in [script for script, *_ in commands()]


def test_the_options_of_the_commands_exist(subtests):
    for script, arguments in [(s, a) for s, *a in commands()]:
        with subtests.test(script=script, arguments=arguments):
            text = (FOLDER.parent / script).read_text()
            for option in (a for a in arguments if a.startswith("--")):
                name, _, value = option.removeprefix("--").partition("=")
                assert re.search(rf'\b{name}=|"--{name}"|"{name}"', text), option
                if name == "training":
                    names = {word[2:] for word in shlex.split(value) if word.startswith("--")}
                    assert names <= setting_names([EraserSettings])
