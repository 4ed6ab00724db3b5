"""The benchmark of a GPU, rehearsed with tiny models on the CPU, and its processes with time limits."""

from __future__ import annotations

import io
import json
import math
import signal
import sys
import time
import weakref

import pytest
import torch

from benchmarks import on_gpu
from benchmarks.gpu.device import Place
from benchmarks.gpu.workers import Part, work_through

# What a part must tell, by words of its rows.
TOLD = {
    "train_5b": ["--separate_passes: activations", "one pass: activations", "7-forward step", "rows, one pass"],
    "train_2b": ["--separate_passes: activations", "one pass: activations", "7-forward step", "rows, one pass"],
    "train_wan": ["--separate_passes: activations", "one pass: activations", "7-forward step", "rows, one pass"],
    "null_space": ["SD1.5: null-space step", "SDXL: null-space step", "SDXL: activations"],
    "statistics": ["SD1.5: k/v", "SDXL: k/v", "SD1.5: q/out", "SDXL: q/out"],
    "edits": ["SDXL: edit of", "FLUX.2-klein-4B: edit of"],
    "golden_noise": ["in 50 steps", "in 4 steps", "NPNet in float32", "GoldenNoiseModel in bfloat16"],
    "calls": [f"{model}: call" for model in ("CogVideoX-2b", "Wan2.1-1.3B", "CogVideoX-5b")],
    "offload": ["all on the GPU", "model by model", "block by block", "numbers that differ"],
    "compile": ["another scale", "2 erasers", "graph breaks", "1 eraser, blocks compiled", "0 erasers, blocks"],
}


@pytest.mark.parametrize("name", TOLD)
def test_every_part_is_rehearsed(name):
    told = []
    on_gpu.run_part(name, True, told.append, lambda: None)
    machine, *rows = told
    assert machine["machine"]["device"]
    found = [row["what"] for row in rows]
    assert [words for words in TOLD[name] if not any(words in what for what in found)] == []
    for row in rows:
        assert math.isfinite(row["measured"]), row
    counts = {row["what"].partition(": ")[2]: row["measured"] for row in rows if row["unit"] == ""}
    for what, count in counts.items():
        if what.startswith(("latent numbers that differ", "graph breaks")) or what.endswith(
            ("another scale", "scale 0")
        ):
            assert count == 0, what
    cells = [on_gpu.row_cells(row) for row in rows]
    assert all(len(line) == 4 for line in cells)


def test_all_parts_are_rehearsed_and_have_a_budget():
    from benchmarks.gpu.budget import _LINES

    names = [part.name for part in on_gpu.PARTS]
    assert list(TOLD) == names
    assert list(_LINES) == names


def test_the_budget_is_counted_without_a_gpu(capsys):
    assert on_gpu.main(["--budget", "--only", "compile"]) == 0
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    found = {tuple(cell.strip() for cell in row[:2]): row for row in rows}
    (_, tera, seconds, memory, limit) = next(row for row in rows if row[0].strip() == "compile")
    assert float(seconds) < float(limit)
    # 2 x parameters x tokens and 4 x layers x tokens^2 x width, twelve times.
    tokens = 13 * 30 * 45 + 226
    expected = 12 * (2 * 1.6e9 * tokens + 4 * 30 * tokens**2 * 1920)
    assert float(tera) * 1e12 == pytest.approx(expected, rel=0.15)
    assert 2 * 3.1 < float(memory) < 10  # two models of 1.6 x 10^9 parameters in bf16
    assert ("compile", "compilers (assumed)") in found


# Stands for the process of a part: waits for its line, writes two rows, and ends as it is told to.
STAND_IN = """
import json, sys, time
rows, ending = sys.argv[1:]
assert sys.stdin.readline()
with open(rows, "a") as file:
    file.write(json.dumps({"machine": {"device": "none"}}) + "\\n")
    file.write(json.dumps({"what": "first", "note": "why"}) + "\\n")
if ending == "late":
    open(rows, "a").write('{"what": "half')
    time.sleep(60)
if ending == "broken":
    raise MemoryError("no more")
if ending == "asked":  # as a scheduler of jobs asks the whole command to end
    import os, signal
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
"""


def parts_of(**limits):
    return [Part(name, name, "none", limit) for name, limit in limits.items()]


def commands(part, rows):
    return [sys.executable, "-S", "-c", STAND_IN, str(rows), part.name]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_part_over_its_limit_or_with_an_error_leaves_the_others(tmp_path, ahead):
    parts = parts_of(late=2, broken=30, whole=30)
    found = {part.name: outcome for part, outcome in work_through(parts, commands, tmp_path, 60, ahead)}
    assert {name: outcome.figures for name, outcome in found.items()} == dict.fromkeys(
        found, [{"what": "first", "note": "why"}]
    )
    assert found["late"].status == "stopped at its limit of 2 s"
    assert found["broken"].status.startswith("failed (1): ")
    assert found["broken"].status.endswith("MemoryError: no more")
    assert found["whole"].status == "done"
    assert found["whole"].facts == {"device": "none"}


def test_all_parts_end_in_time(tmp_path):
    parts = parts_of(late=30, whole=30)
    began = time.monotonic()
    found = [outcome for _, outcome in work_through(parts, commands, tmp_path, 2, True)]
    assert time.monotonic() - began < 10
    assert found[0].status == "stopped at its limit of 2 s"
    assert found[1].status == "not begun: the time for all parts was up"
    assert found[1].rows == []


def test_processes_end_where_no_one_waits_for_the_results(tmp_path):
    working = work_through(parts_of(whole=30, late=30), commands, tmp_path, 60, True)
    next(working)
    working.close()
    assert not (tmp_path / "late.jsonl").exists()


MACHINE = {"device": "H100", "date": "2026-11-30", "versions": {"torch": "2.9"}}


def test_results_of_parts_are_kept_by_later_ones(tmp_path, monkeypatch, capsys):
    ratio = {"what": "step", "unit": "s", "measured": 0.012, "beside": 1.5, "of": "plain", "ratio": 0.008}
    told = {
        "calls": [ratio | {"range": [0.007, 0.009]}, {"what": "graphs", "unit": "", "measured": 2, "note": "why"}],
        "edits": [{"what": "edit", "note": "more memory than there is"}],
    }
    rows = {name: [{"machine": MACHINE}, *found] for name, found in told.items()}

    def stand_in(part, path, toy):
        written = "".join(json.dumps(row) + "\n" for row in rows[part.name])
        code = f"import pathlib; pathlib.Path({str(path)!r}).write_text({written!r})"
        return [sys.executable, "-S", "-c", code]

    monkeypatch.setattr(on_gpu, "part_command", stand_in)
    monkeypatch.setattr(on_gpu, "refuse_without_gpu", lambda: None)
    assert on_gpu.main(["--only", "calls", "--output_dir", str(tmp_path)]) == 0
    assert on_gpu.main(["--only", "edits", "--output_dir", str(tmp_path)]) == 0
    parts = json.loads((tmp_path / "on_gpu.json").read_text())["parts"]
    assert {name: part["rows"] for name, part in parts.items()} == told
    assert {part["status"] for part in parts.values()} == {"done"}
    text = (tmp_path / "on_gpu.md").read_text()
    for line in (
        "| step | 12 ms | 1.5 s (plain) | 0.008 (0.007 to 0.009) |",
        "| graphs | 2 | why |  |",
        "| edit | more memory than there is |  |  |",
    ):
        assert line in text
    assert "`--only calls`: done, 0 s, H100, torch 2.9, 2026-11-30." in text
    assert "rehearsal" not in text
    # A rehearsal is kept apart, and tells that it is one.
    assert on_gpu.main(["--only", "calls", "--toy", "--output_dir", str(tmp_path)]) == 0
    assert "A rehearsal" in (tmp_path / "on_gpu_rehearsal.md").read_text()
    assert (tmp_path / "on_gpu.md").read_text() == text
    assert "calls: done" in capsys.readouterr().out


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Run the command with parts that end as they are told; the code, and status and rows of all that is known."""
    monkeypatch.setattr(on_gpu, "refuse_without_gpu", lambda: None)
    code = STAND_IN.replace('{"device": "none"}', repr(MACHINE))

    def run(**endings):
        command = lambda part, path, toy: [sys.executable, "-S", "-c", code, str(path), endings[part.name]]
        monkeypatch.setattr(on_gpu, "part_command", command)
        ended = on_gpu.main(["--only", *endings, "--output_dir", str(tmp_path)])
        parts = json.loads((tmp_path / "on_gpu.json").read_text())["parts"]
        return ended, {name: (part["status"], len(part["rows"])) for name, part in parts.items()}

    return run


def test_what_was_measured_stays_when_the_command_is_asked_to_end(measured, tmp_path, capsys):
    began = time.monotonic()
    code, parts = measured(edits="whole", calls="asked", compile="whole")
    assert time.monotonic() - began < 30
    assert code == 130
    assert parts == {"edits": ("done", 1), "calls": ("interrupted", 1)}
    assert "`--only calls`: interrupted, " in (tmp_path / "on_gpu.md").read_text()
    assert "has what was measured till then" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    code, parts = measured(calls="whole", compile="whole")
    assert code == 0
    assert parts == dict.fromkeys(["edits", "calls", "compile"], ("done", 1))


def test_a_part_that_is_not_whole_leaves_what_an_earlier_run_has_found(measured, capsys):
    code, parts = measured(calls="broken")
    assert (code, parts["calls"][1]) == (1, 1)
    assert parts["calls"][0].endswith("MemoryError: no more")
    assert measured(calls="whole", edits="whole")[0] == 0
    assert measured(calls="broken", edits="whole") == (1, {"calls": ("done", 1), "edits": ("done", 1)})
    assert "calls: what an earlier run has found stays" in capsys.readouterr().out


def test_the_import_that_finds_the_gpu_is_in_the_total(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(on_gpu, "refuse_without_gpu", lambda: time.sleep(0.2))
    monkeypatch.setattr(on_gpu, "measure", lambda names, toy, folder, total: found.append(total) or {})
    assert on_gpu.main(["--total", "5", "--output_dir", str(tmp_path)]) == 0
    assert 4 < found[0] <= 4.8


def test_a_part_ends_where_whoever_started_it_is_gone(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(on_gpu, "run_part", lambda name, toy, tell, wait: wait())
    with pytest.raises(SystemExit, match="is gone"):
        on_gpu.work_on("calls", True, tmp_path / "rows.jsonl")


GIB = 2**30


@pytest.fixture
def small_gpu(monkeypatch):
    """A GPU with 10 GiB free, as far as a part asks for its memory, and the rows that it tells."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (10 * GIB, 80 * GIB))
    told = []
    return Place(torch.device("cuda"), False, told.append), told


def test_what_does_not_fit_is_not_begun(small_gpu):
    place, told = small_gpu
    assert not place.within_memory("step", lambda: pytest.fail("was begun"), 45 * GIB)
    assert place.within_memory("smaller", lambda: None, 9 * GIB)
    assert told == [{"what": "step", "note": "not begun: needs 45.0 GiB by plan, 10.0 GiB are free"}]


def test_memory_is_given_back_where_it_did_not_suffice(small_gpu, monkeypatch):
    """What the failed work held, an exception's frames hold on to; after it the next work needs the memory."""
    place, told = small_gpu
    held, alive = [], []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: alive.append(held[0]() is not None))

    def work():
        model = torch.nn.Linear(2, 2)
        model.itself = [model]  # a cycle
        held.append(weakref.ref(model))
        raise torch.OutOfMemoryError("no more")

    assert not place.within_memory("step", work, 9 * GIB, "for weights alone")
    assert told == [{"what": "step", "note": "more memory than there is: needs 9.0 GiB for weights alone"}]
    assert alive == [False]


def test_a_part_that_fails_is_told_by_the_exit_status(tmp_path, monkeypatch):
    failing = [sys.executable, "-S", "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(on_gpu, "part_command", lambda part, path, toy: failing)
    monkeypatch.setattr(on_gpu, "refuse_without_gpu", lambda: None)
    assert on_gpu.main(["--only", "calls", "--output_dir", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "on_gpu.json").read_text())["parts"]["calls"]
    assert found["status"] == "failed (3): "
    assert found["rows"] == []


def test_without_a_gpu_nothing_is_measured_at_real_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="A GPU must be there, got none. `--toy` rehearses"):
        on_gpu.main(["--only", "calls", "--output_dir", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        on_gpu.main(["--only", "everything"])
    assert "invalid choice: 'everything'" in capsys.readouterr().err
