"""A sample of the campaign; all of it by `make campaign`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.campaign.artifacts import KINDS
from tests.campaign.loads import FAULTS, Description, cases
from tests.campaign.mutations import MARKER, Runs
from tests.training.script_runs import REPOSITORY, environment

# Those that are made without a pipeline or a training.
QUICK = ("LoRA", "LoRA of another program", "statistics", "eraser in the legacy format", "noise pairs",
         "noise pairs as pt", "prompts as jsonl", "settings in YAML")  # fmt: skip
SAMPLE = """
import logging, random, sys, tempfile, warnings
from pathlib import Path

import torch

from tests.campaign.artifacts import KINDS
from tests.campaign.loads import FAULTS, Campaign, cases

warnings.simplefilter("ignore")
logging.disable()
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as work:
    made = list(cases(Path(work, "originals"), 0, {name: KINDS[name] for name in sys.argv[1:]}))
    campaign = Campaign(Path(work))
    loads = [campaign.run(case) for case in random.Random(0).sample(made, 32)]
for load in loads:
    if load.outcome in FAULTS:
        print(*load)
print(len(loads), "loads")
"""


def test_a_sample_of_altered_artifacts_is_refused_by_file():
    # In a process of its own, because forks of one with several threads may wait for ever.
    run = subprocess.run(
        [sys.executable, "-c", SAMPLE, *QUICK],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert run.stdout == "32 loads\n", run.stdout + run.stderr[-2000:]


def test_mutations_are_the_same_for_a_seed_and_change_their_file(tmp_path):
    kinds = {name: KINDS[name] for name in ("statistics", "prompts as csv")}
    first, second = (list(cases(tmp_path / str(i), 3, kinds)) for i in range(2))
    assert [case[2:4] for case in first] == [case[2:4] for case in second]
    assert len(first) > 100
    assert {case.kind for case in first} == set(kinds)
    path = first[0].folder / first[0].file
    before = path.read_bytes()
    first[0].mutation(path)
    assert path.read_bytes() != before


def test_the_pickle_runs_code_where_nothing_forbids_it(tmp_path):
    torch.save(Runs(tmp_path / MARKER), tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / MARKER).is_dir()


@pytest.mark.parametrize(
    ("other", "equal", "same_form", "nan"),
    [
        ([1, torch.ones(2)], True, True, False),
        ([2, torch.ones(2)], False, True, False),
        ([1, torch.zeros(2)], False, True, False),
        ([1, torch.ones(3)], False, False, False),
        ([1, torch.tensor([1.0, float("nan")])], False, True, True),
    ],
)
def test_results_are_compared_to_the_bit(other, equal, same_form, nan):
    first, second = Description(), Description()
    first.add([1, torch.ones(2)])
    second.add(other)
    assert (first.digest.digest() == second.digest.digest()) is equal
    assert (first.form.digest() == second.form.digest()) is same_form
    assert second.nan is nan


def test_every_fault_has_a_name_and_every_kind_files():
    assert len(set(FAULTS)) == len(FAULTS)
    assert all(kind.files for kind in KINDS.values())
