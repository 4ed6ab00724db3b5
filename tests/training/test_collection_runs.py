from __future__ import annotations

import json

from diffusers_ext.nullspace.statistics import FeatureStatistics
from tests.training.killed_runs import run_of
from tests.training.script_runs import QUICK, assert_same_totals, command_line, files_below, write_prompts

RESULTS = {"config.json", "model.safetensors", "report.json", "plots/spectrum.png",
           "plots/null_dimensions.png"}  # fmt: skip


def test_two_processes_give_the_statistics_of_one(build, server, tmp_path, prompts_file):
    one = FeatureStatistics.from_pretrained(build("one", features=["q", "k", "v", "out"]))
    line = command_line(
        knowledge_prompts=prompts_file, output_dir=tmp_path / "two", features=["q", "k", "v", "out"], **QUICK
    )
    server.run(run_of("build_covariance", line), ["training.build_covariance"], processes=2)
    two = FeatureStatistics.from_pretrained(tmp_path / "two")
    assert files_below(tmp_path / "two") == RESULTS
    assert json.loads((tmp_path / "two/report.json").read_text())["num_processes"] == 2
    assert (two.sources, two.facts) == (one.sources, one.facts)
    for key, moment in one.moments.items():
        assert two.moments[key].count == moment.count
        scale = moment.total.abs().max()
        assert ((two.moments[key].total - moment.total).abs().max() / scale) < 1e-14


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(build, server, tmp_path):
    prompts_file = write_prompts(
        tmp_path / "many.txt",
        tuple(f"a {color} {digit}" for color in ("red", "blue", "green", "white")
              for digit in ("one", "two", "three", "four", "five", "six")),
    )  # fmt: skip
    settings = {**QUICK, "statistics_batch_size": 1, "knowledge_prompts": prompts_file}
    features = ["q", "v", "out"]
    whole = build("whole", features=features, **settings)
    killed = tmp_path / "killed"
    line = command_line(output_dir=killed, features=features, export_layout=True, **settings)
    part = killed / "progress/part-0-of-1"
    moments = (
        lambda: (killed / "progress/run.json").exists(),
        lambda: (part / "batches-8").exists(),
        lambda: (part / "batches-24").exists(),
        lambda: (killed / ".partial-output/layout").exists(),
    )
    for number, is_time in enumerate(moments):
        server.kill_when("build_covariance", line, is_time)
        assert not (killed / "config.json").exists()
        assert not (killed / "layout").exists()
        line += ["--resume_from_checkpoint", "latest"] if number == 0 else []
    build("killed", features=features, resume_from_checkpoint="latest", **settings)
    assert_same_totals(FeatureStatistics.from_pretrained(killed), FeatureStatistics.from_pretrained(whole))
    assert files_below(killed) == RESULTS
