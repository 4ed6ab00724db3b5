"""Every snippet of the front page and of the guides runs, on tiny models under the real names."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState

from diffusers_ext.planning import plan
from tests.docs.snippet_files import write_files
from tests.docs.snippet_models import BASES, SAVED, publish, stable_diffusion
from tests.docs.snippets import PAGES, ROOT, Snippet, commands, snippets
from tests.installed_versions import in_its_words

# What makes a run short and fit for a CPU; nothing else is changed in a command.
_TRAINING = ["--max_train_steps", "1", "--train_batch_size", "1"]
_SAMPLING = ["--num_inference_steps", "2"]
_ERASER = ["--num_target_trajectories", "1", "--num_preserved_trajectories", "1",
           "--points_per_trajectory", "2"]  # fmt: skip
_CPU = ["--mixed_precision", "no"]
_GPU_FLAGS = {"--model_cpu_offload"}
SHORTER = {
    "train_nullspace_dreambooth": [*_TRAINING, "--resolution", "32"],
    "build_covariance": [],
    "evaluate_nullspace": [*_SAMPLING, "--num_images_per_prompt", "1"],
    # A random judge would refuse most pairs.
    "generate_npd": [*_SAMPLING, "--redenoise_steps", "2", "--margin", "-100"],
    "train_npnet": [*_TRAINING, "--width", "32", "--num_layers", "1", "--num_heads", "2"],
    "train_noise_sequence": _TRAINING,
    "evaluate_golden_noise": [*_SAMPLING, "--num_images_per_prompt", "1", "--best_of", "1"],
    "train_eraser": [*_TRAINING, *_SAMPLING, *_ERASER, "--eraser_rank", "2", *_CPU],
    "evaluate_eraser": [*_SAMPLING, *_CPU],
    "plan_eraser": [],
}
SHORTER_CONSOLE = {"evaluate erasure": [*_SAMPLING, "--attack_steps", "2"]}
_EXAMPLE_ERASER = "--training=--max_train_steps 1 --eraser_rank 2 --auto_preserved_concepts " + " ".join(
    [*_SAMPLING, *_ERASER]
)
SHORTER_EXAMPLES = {
    "teach_a_subject": ["--max_train_steps", "1", *_SAMPLING],
    "erase_a_concept": [*_SAMPLING, _EXAMPLE_ERASER],
    "share_everything": [],
}
# What no test runs from a page, and why.
NOT_RUN = {
    "make setup": "installs",
    "python -m pytest": "a file of these tests",
    "make demo": "five minutes; its parts are tested in tests/examples",
    "make test": "runs this",
    "make lint test": "runs this",
    "make bench": "hours",
    "pip install": "changes the environment",
    "python -m pip wheel": "builds; tests/test_wheel.py does",
    'python -c "from setuptools': "builds; tests/test_wheel.py does",
    "python3 -m venv": "makes an environment",
    "source .venv": "a command of the shell",
    "python examples/app.py": "does not end; tests/examples runs the app",
    "printf": "writes files for the next line",
    "python examples/moving_digits/train_style_lora.py": "a minute; tested in tests/examples",
    "python examples/demo.py": "five minutes; its parts are tested in tests/examples",
    "python docs/settings_tables.py": "writes these pages; compared in test_settings_tables.py",
    "python benchmarks/": "measures for minutes or hours",
}
# Start from what `make demo` leaves, or take the digits alone; tests of their own run these scripts.
OF_THE_DEMO = ("digits/model", "digits_flux2/model", "digits_distilled/model", "digits_wan/model", "outputs/demo")
PLANNED: set[frozenset[str]] = set()
CHINESE = ROOT / "README_zh.md"
# A reader is told to make a file of the block before.
SAVED_IN = re.compile(r"```\s+Saved in `(\w+\.py)`")


def run_command(words: list[str]) -> None:
    """Run one command of a page in this process; a plan that another page shows too is not made again."""
    line = " ".join(words)
    if line.startswith(tuple(NOT_RUN)) or any(part in line for part in OF_THE_DEMO):
        return
    if words[:2] == ["diffusers-ext", "plan"]:
        if frozenset(words) in PLANNED:
            return
        PLANNED.add(frozenset(words))
    if words[0] == "diffusers-ext":
        console = importlib.import_module("diffusers_ext.command_line.main")
        assert console.main([*words[1:], *SHORTER_CONSOLE.get(" ".join(words[1:3]), [])]) == 0, line
        return
    script = words[2] if words[:2] == ["accelerate", "launch"] else words[1]
    arguments = [w for w in words[words.index(script) + 1 :] if w not in _GPU_FLAGS]
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if not script.startswith("training/"):
        module.main([*arguments, *SHORTER_EXAMPLES.get(Path(script).stem, _SAMPLING)])
        return
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    module.main(module.parse_args([*arguments, *SHORTER[script[9:-3]]]))


def run_snippet(snippet: Snippet, page: str, namespace: dict) -> None:
    """Run one block; `namespace` is what the page has defined so far."""
    if snippet.language == "python":
        # The line numbers of an error are those of the page.
        text = "\n" * (snippet.line - 1) + snippet.text.replace('"cuda"', '"cpu"')
        code = compile(in_its_words(text), page, "exec")
        exec(code, namespace)  # the page is ours
    elif snippet.language == "bash":
        for words in commands(snippet.text):
            run_command(words)
    elif snippet.language == "yaml":
        assert yaml.safe_load(snippet.text)
    else:
        pytest.fail(f"{page}:{snippet.line} must be python, bash or yaml, got {snippet.language}.")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # PEFT's, of two adapters
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_snippet_of_a_page_runs(page, hub, tmp_path, monkeypatch):
    text = page.read_text(encoding="utf-8")
    for name in SAVED:
        if page.parent.name == "examples" or name in text or name.startswith(("yuvalkirstain", "laion", "openai")):
            publish(hub, name)
    write_files(tmp_path)
    monkeypatch.setattr(plan, "_MOST_ROWS", 1)  # of the settings that the planner tries
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # What the guides speak of without saying where it comes from.
    namespace = {
        "__name__": "snippet",
        "pipe": stable_diffusion().to(torch.bfloat16),
        "base": BASES["sdxl"],
        "knowledge_prompts": ["a photo of a cat", "a red fox"],
    }
    for snippet in snippets(page):
        saved = SAVED_IN.match(text.split(snippet.text, 1)[1])
        if saved:
            (tmp_path / saved[1]).write_text(snippet.text)
        run_snippet(snippet, page.name, namespace)


def test_every_page_with_code_is_run():
    found = set(ROOT.glob("*.md")) | set(ROOT.glob("docs/*.md"))
    with_code = {page for page in found if "```" in page.read_text(encoding="utf-8")}
    assert with_code - {CHINESE} <= set(PAGES)


def test_the_chinese_front_page_has_the_same_code_and_figures():
    english, chinese = (page.read_text(encoding="utf-8") for page in (PAGES[0], CHINESE))
    code = [[re.sub(r"#.*", "", s.text) for s in snippets(page)] for page in (PAGES[0], CHINESE)]
    assert code[0] == code[1]
    figures = [re.findall(r"-?\d\.\d+", text) for text in (english, chinese)]
    # Sizes of networks are counted in another unit.
    assert [f for f in figures[1] if f not in ("1.6", "1.0")] == [f for f in figures[0] if f not in ("1.6", "1.0")]
    assert re.findall(r"arXiv [\d.]+", chinese) == re.findall(r"arXiv [\d.]+", english)


def test_blocks_that_are_no_code_are_indented():
    for page in PAGES:
        fences = re.findall(r"^```.*$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert len(fences) == 2 * len(snippets(page)), page.name
