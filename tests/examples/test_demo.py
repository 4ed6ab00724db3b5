from __future__ import annotations

import io
import json
import logging
import pickle
import shlex
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image

from examples import demo, demo_eraser, demo_golden_noise, demo_new_glyph
from examples.demo_report import Gallery
from examples.digits import golden_noise
from examples.moving_digits import check_model
from tests.examples.browser import open_browser

PARTS = [demo_new_glyph.NewGlyphDemo, demo_golden_noise.GoldenNoiseDemo, demo_eraser.EraserDemo]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All parts of the demo with next to no training: the folder, and what was printed."""
    folder, printed = tmp_path_factory.mktemp("demo"), io.StringIO()
    threads, logger = torch.get_num_threads(), logging.getLogger("diffusers")
    level = logger.level
    try:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
            shorten(patch)
            demo.main(["--output_dir", str(folder), "--processes", "1"])
    finally:
        torch.set_num_threads(threads)
        logger.setLevel(level)
    return folder, printed.getvalue()


def shorten(patch: pytest.MonkeyPatch) -> None:
    prompts = {group: given[:3] for group, given in demo_new_glyph.PROMPTS.items()}
    patch.setattr(demo_new_glyph, "PROMPTS", prompts)
    flags = {name: (*f, "--max_train_steps", "2") for name, f in demo_new_glyph.LORAS.items()}
    patch.setattr(demo_new_glyph, "LORAS", flags)
    patch.setattr(demo_new_glyph, "draw", partial(demo_new_glyph.draw, num_inference_steps=3))
    patch.setattr(golden_noise, "TRAINING_PROMPTS", golden_noise.TRAINING_PROMPTS[:4])
    patch.setattr(demo_golden_noise, "HELD_OUT_PROMPTS", golden_noise.HELD_OUT_PROMPTS[:3])
    patch.setattr(demo_golden_noise, "_STEPS", 1)
    patch.setattr(demo_golden_noise, "_TYPICAL_STRIDE", 2)
    recipe = replace(
        demo_eraser.RECIPE, max_train_steps=1, train_batch_size=4, num_inference_steps=2,
        num_target_trajectories=2, num_preserved_trajectories=2,
    )  # fmt: skip
    patch.setattr(demo_eraser, "_RECIPE", recipe)
    train = partial(demo_eraser.train_digits_eraser, anchor_concept="nine")
    patch.setattr(demo_eraser, "train_digits_eraser", train)
    patch.setitem(check_model.SAMPLING, "num_inference_steps", 3)
    clips = {"num_target": 4, "num_preserved": 4, "num_robust": 4}
    patch.setattr(demo_eraser, "_CLIPS", clips)


def test_the_whole_demo_writes_its_page_and_sheets(finished):
    folder, printed = finished
    page = (folder / "report.html").read_text()
    assert len(page) < 5_000_000
    assert "Still running" not in page
    assert "All of it took" in page
    for part in PARTS:
        assert f'<h2 id="{part.name}-title">{part.title}</h2>' in page
        assert f"\n## {part.title}" in printed
    for name in demo.PARTS:
        assert Image.open(folder / name / "sheet.png").width > 500
        assert (folder / name / "table.md").is_file()
    lines = printed.splitlines()
    assert lines[0].endswith((folder / "report.html").as_uri())
    assert len([line for line in lines if "] took " in line]) == 12
    assert json.loads((folder / "golden_noise" / "pairs" / "report.json").read_text())["tried"] == 16


def test_the_page_of_the_real_parts_can_be_looked_at(finished, tmp_path):
    folder, _ = finished
    with open_browser(tmp_path / "profile") as browser:
        browser.open(folder / "report.html", width=390)
        images = browser.run("return [...document.images].map(i => [i.naturalWidth, i.alt.length > 20])")
        assert len(images) > 25
        assert {width for width, _ in images} == {16, 32}
        assert all(described for _, described in images)
        assert browser.run("return document.documentElement.scrollWidth") <= 390
        requested, complaints = browser.logs()
        assert [url for url in requested if not url.startswith(("file:", "data:"))] == []
        assert complaints == []


def test_one_thread_unless_the_environment_says_otherwise(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        demo.use_one_thread()
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        demo.use_one_thread()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_part_can_be_run_alone(tmp_path):
    (part,) = demo.load_parts(["eraser"], tmp_path)
    assert isinstance(part, demo_eraser.EraserDemo)
    assert part.output_dir == tmp_path / "eraser"
    with pytest.raises(SystemExit):
        demo.main(["--parts", "everything"])


def test_parts_can_go_to_another_process_where_their_chains_are_the_same(tmp_path):
    for part in demo.load_parts(list(demo.PARTS), tmp_path):
        steps, copied = part.steps(), pickle.loads(pickle.dumps(part)).steps()
        assert [(one.title, one.chain) for one in steps] == [(o.title, o.chain) for o in copied]
        assert len({one.title for one in steps}) == len(steps)


@pytest.mark.parametrize("part", PARTS)
def test_the_commands_on_the_page_are_accepted(part):
    commands = part.commands.replace("\\\n", " ").splitlines()
    assert commands
    for command in commands:
        launcher, launch, script, *arguments = shlex.split(command)
        assert (launcher, launch) == ("accelerate", "launch")
        module = import_module(script.removesuffix(".py").replace("/", "."))
        module.parse_args(arguments)


def test_shots_are_chosen_from_each_group_and_their_clips_judged(tmp_path):
    part = demo_eraser.EraserDemo(tmp_path)
    indices = demo_eraser.shown_indices(part.shots, demo_eraser._SHOWN)
    assert len(indices) == len(set(indices)) == sum(demo_eraser._SHOWN.values())
    colors = {part.shots[index].prompt.split()[1] for index in indices[:6]}
    assert len(colors) >= 3
    blank = np.zeros((len(part.shots), 9, 16, 16, 3), np.uint8)
    found = demo_eraser.galleries(part.shots, {"base": blank, "erased": blank}, indices)
    assert [len(one.comparisons) for one in found] == [6, 6, 3]
    assert all(isinstance(one, Gallery) for one in found)
    first, kept = (found[i].comparisons[0].pictures for i in (0, 1))
    assert [len(picture.frames) for picture in first.values()] == [9, 9]
    # A clip of nothing is wrong, but for prompts of what was erased.
    assert [picture.right for picture in first.values()] == [False, True]
    assert [picture.right for picture in kept.values()] == [False, False]
