"""What `pip install` of a wheel gives to someone who has no checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from diffusers_ext.command_line.train import TRAININGS

ROOT = Path(__file__).parents[1]
BUILD = """
import sys, warnings
warnings.simplefilter("ignore")
from setuptools import build_meta
target, *kinds = sys.argv[1:]  # which a build replaces
for kind in kinds:
    getattr(build_meta, f"build_{kind}")(target)
"""
USES = """
import contextlib, io, json, runpy, sys
from pathlib import Path
sys.argv[0] = "/somewhere/bin/diffusers-ext"
import diffusers_ext
from diffusers_ext.command_line.main import COMMANDS, main
commands = [command.name.split() for command in COMMANDS]
trainings = json.loads(sys.argv[1])
with contextlib.redirect_stdout(io.StringIO()):
    codes = [main([*line, "--help"]) for line in [[], *commands, *(["train", name] for name in trainings)]]
launched = {}
for name in trainings:
    sys.argv = [f"diffusers_ext.training.{name}", "--help"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            launched[name] = [stop.code or 0, "--output_dir" in said.getvalue()]
sys.argv = ["demo"]
from diffusers_ext.command_line.demo import demo_script
script = demo_script()
sys.path.insert(0, str(script.parents[1]))
from examples import demo, demo_report_page
from examples.digits.check_model import load_pipeline
from examples.moving_digits.check_model import load_pipeline as load_clips
parts = demo.load_parts(list(demo.PARTS), Path("out"))
modules = ("examples", "benchmarks", "training", "diffusers_ext")
print(json.dumps({
    "help": codes,
    "launched": launched,
    "script": str(script),
    "files": [sys.modules[name].__file__ for name in modules],
    "steps": [len(part.steps()) for part in parts],
    "pipelines": [type(load()).__name__ for load in (load_pipeline, load_clips)],
    "template": (script.parent / demo_report_page.TEMPLATE).is_file(),
}))
"""


def build(source: Path, target: Path, *kinds: str) -> None:
    """Build `sdist` and `wheel` of a source tree as pip does."""
    target.mkdir(exist_ok=True)
    subprocess.run(
        [sys.executable, "-c", BUILD, str(target), *kinds],
        check=True, capture_output=True, cwd=source, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """A wheel of this tree, that of its source distribution, and the first one's files."""
    folder = tmp_path_factory.mktemp("wheel")
    leave_out = shutil.ignore_patterns(".*", "build", "dist", "outputs", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, folder / "tree", ignore=leave_out)
    build(folder / "tree", folder / "first", "sdist", "wheel")
    with tarfile.open(next((folder / "first").glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    build(next((folder / "unpacked").iterdir()), folder / "second", "wheel")
    wheels = [next((folder / name).glob("*.whl")) for name in ("first", "second")]
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(folder / "installed")
    return {"first": wheels[0], "second": wheels[1], "installed": folder / "installed"}


def test_the_wheel_of_the_source_distribution_is_that_of_the_tree(built):
    names = []
    for wheel in (built["first"], built["second"]):
        with zipfile.ZipFile(wheel) as archive:
            names.append({name for name in archive.namelist() if ".dist-info/" not in name})
    assert names[0] == names[1]
    assert {name.split("/")[0] for name in names[0]} == {"diffusers_ext"}
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "diffusers_ext").rglob("*.py")}
    assert ours | {"diffusers_ext/py.typed"} <= names[0]
    assert built["first"].stat().st_size < 15e6


def test_commands_trainings_and_demo_need_no_checkout(built, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(built["installed"]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USES, json.dumps(list(TRAININGS))],
        capture_output=True, text=True, timeout=280, check=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert not any(found["help"])
    assert found["launched"] == {name: [0, True] for name in TRAININGS}
    assert all(Path(file).is_relative_to(built["installed"]) for file in [found["script"], *found["files"]])
    assert min(found["steps"]) > 0
    assert found["pipelines"] == ["StableDiffusionPipeline", "CogVideoXPipeline"]
    assert found["template"]
