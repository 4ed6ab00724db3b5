"""Pair generations that are stopped, killed or shared, and the same set in the end."""

from __future__ import annotations

import json

import pytest

from diffusers_ext.core.artifacts import write_atomically
from diffusers_ext.golden_noise.pairs import shards as pair_shards
from diffusers_ext.training import pairs as generate_npd
from examples.digits.check_model import load_pipeline
from tests.training.killed_runs import run_of
from tests.training.pair_runs import QUICK_PAIRS, set_content, write_prompt_file
from tests.training.script_runs import command_line

SETTINGS = {**QUICK_PAIRS, "noises_per_prompt": 3}  # shards of 6, 6 and 3 candidates


class Stop(BaseException):
    """An end that nothing catches."""


@pytest.mark.parametrize("written", [False, True])
def test_a_stop_at_any_write_loses_and_repeats_nothing(generate, monkeypatch, tmp_path, written):
    pipeline = load_pipeline()
    monkeypatch.setattr(generate_npd, "load_base_pipeline", lambda *_: pipeline)  # it is fast
    settings = {"max_prompts": 2, "noises_per_prompt": 3, "margin": -5.0}
    settings |= {"shard_size": 4, "batch_size": 3}
    whole = set_content(generate("whole", **settings))
    made = []
    calls = 0

    def stop_at_every_write(path, content):
        nonlocal calls
        if written:
            write_atomically(path, content)
        if path not in made:  # once at each file
            made.append(path)
            calls += 1
            raise Stop
        if not written:
            write_atomically(path, content)

    monkeypatch.setattr(pair_shards, "write_atomically", stop_at_every_write)
    resume = {}
    while True:
        try:
            folder = generate("stopped", **settings, **resume)
            break
        except Stop:
            exists = (tmp_path / "stopped/config.json").exists()
            resume = {"resume_from_checkpoint": "latest"} if exists else {}
    assert set_content(folder) == whole
    # README and config, 3 batches, 2 shards of 4 files: a stop at each.
    assert calls == 2 + 3 + 2 * 4


def test_a_finished_batch_is_not_made_again(generate, monkeypatch, tmp_path):
    made = []
    write_part = pair_shards.PairWriter.write_part

    def count(self, shard, part, *content):
        write_part(self, shard, part, *content)
        made.append((shard, part))
        if len(made) in (1, 3):
            raise Stop

    monkeypatch.setattr(pair_shards.PairWriter, "write_part", count)
    with pytest.raises(Stop):
        generate(**SETTINGS)
    with pytest.raises(Stop):
        generate(**SETTINGS, resume_from_checkpoint="latest")
    generate(**SETTINGS, resume_from_checkpoint="latest")
    assert made == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    report = json.loads((tmp_path / "set/report.json").read_text())
    assert (report["tried"], report["this_run"]["tried"]) == (15, 5)


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(generate, server, tmp_path):
    whole = generate("whole", **SETTINGS)
    folder = tmp_path / "killed"
    prompts = write_prompt_file(tmp_path / "prompts.txt")
    line = command_line(prompt_file=prompts, output_dir=folder, **SETTINGS)
    moments = (
        lambda: (folder / "config.json").exists(),
        lambda: any(folder.glob("progress/*/*.safetensors")),
        lambda: any(folder.glob("shards/*.json")),
    )
    for number, is_time in enumerate(moments):
        server.kill_when("generate_npd", line, is_time)
        assert not (folder / "report.json").exists()
        line += ["--resume_from_checkpoint", "latest"] if number == 0 else []
    generate("killed", **SETTINGS, resume_from_checkpoint="latest")
    assert set_content(folder) == set_content(whole)


def test_two_processes_make_the_set_of_one(generate, server, tmp_path):
    whole = generate("whole", **SETTINGS)
    prompts = write_prompt_file(tmp_path / "prompts.txt")
    line = command_line(prompt_file=prompts, output_dir=tmp_path / "two", **SETTINGS)
    server.run(run_of("generate_npd", line), ["training.generate_npd"], processes=2)
    assert set_content(tmp_path / "two") == set_content(whole)
    report = json.loads((tmp_path / "two/report.json").read_text())
    assert report["this_run"]["num_processes"] == 2
    assert report["this_run"]["tried"] == 15


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "`seed` must be the same to continue .*: it was 0, got 1"),
        ({"w1": 5.0}, "`w1` must be the same"),
        ({"margin": 1.0}, "`margin` must be the same"),
        ({"max_prompts": 2}, "`prompts.count` must be the same .*: it was 5, got 2"),
        ({"no_filter": True}, "must be the same to continue"),
        (
            {"reward": "tests.training.stub_rewards:Constant"},
            "`reward.name` must be the same .*: it was 'brightness', got 'constant'",
        ),
        ({"output_size": 48}, r"must hold noises of shape \(1, 4, 12, 12\) .* got \(1, 4, 8, 8\)"),
    ],
)
def test_another_set_is_not_continued(generate, changed, message):
    folder = generate(max_prompts=5)
    before = set_content(folder)
    with pytest.raises(ValueError, match=message):
        generate(**{"max_prompts": 5, **changed}, resume_from_checkpoint="latest")
    assert set_content(folder) == before


def test_an_earlier_set_is_not_overwritten(generate):
    folder = generate(max_prompts=1, no_filter=True)
    before = set_content(folder)
    with pytest.raises(ValueError, match="must hold no pairs of an earlier run, got some in"):
        generate(max_prompts=1, no_filter=True, seed=3)
    assert set_content(folder) == before


def test_a_finished_set_is_finished(generate):
    folder = generate()
    before = set_content(folder)
    generate(resume_from_checkpoint="latest")
    assert set_content(folder) == before
    assert json.loads((folder / "report.json").read_text())["this_run"]["tried"] == 0
