from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from examples.demo_processes import step_events
from examples.demo_report import DemoReport, Findings, Gallery, Step
from tests.examples.demo_parts import QuickPart


def test_the_report_grows_step_by_step_and_is_saved_around_each():
    saved, told = [], []
    report = DemoReport([QuickPart("a"), QuickPart("b")], began=time.perf_counter() - 5)
    assert report.preparation >= 5
    assert (report.number_of_steps, report.steps_done) == (6, 0)
    report.run(lambda r: saved.append((r.steps_done, r.running)), told.append)
    titles = [f"Part {name}: {step}" for name in "ab" for step in ("Draw", "Train", "Compare")]
    assert saved == [*enumerate(titles), (6, None)]
    assert [line for line in told if "took" not in line] == [
        f"[{number}/6] {title}" for number, title in enumerate(titles, 1)
    ]
    assert 5 <= report.first_picture <= report.total
    for section in report.sections:
        assert section.planned == ["Draw", "Train", "Compare"]
        assert len(section.seconds) == 3
        assert section.result == "It worked in 97 % of pictures."
        assert [table.title for table in section.tables] == ["Figures"]


def test_a_block_replaces_the_one_of_its_title_and_the_latest_come_first():
    report = DemoReport([QuickPart("a")], began=time.perf_counter())
    sides = []

    def save(current: DemoReport) -> None:
        for block in current.sections[0].blocks.values():
            if isinstance(block, Gallery):
                sides.append(list(block.comparisons[0].pictures))

    report.run(save)
    assert sides[0] == ["base"]
    assert sides[-1] == ["base", "plain", "changed"]
    assert list(report.sections[0].blocks) == ["Figures", "Pictures"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_step_that_fails_is_reported_and_raised(error):
    saved = []
    report = DemoReport([QuickPart("a", error=error), QuickPart("b")], began=time.perf_counter())
    with pytest.raises(type(error)):
        report.run(lambda r: saved.append((r.steps_done, r.running, r.stopped)))
    assert saved[-1] == (1, None, "Part a: Train")
    assert report.total is None


class TwoChains(QuickPart):
    """The last step needs neither of those before it."""

    def steps(self) -> list[Step]:
        *others, last = super().steps()
        return [*others, last._replace(chain=1, findings=self._received)]

    def _received(self, found: Findings) -> Findings:
        return found._replace(result=f"{self.name} heard of it in process {os.getpid()}.")


def test_chains_run_in_processes_of_their_own_and_the_report_is_the_same():
    here, elsewhere = (DemoReport([TwoChains("a"), QuickPart("b")], began=time.perf_counter()) for _ in range(2))
    here.run(lambda report: None)
    parts, saved, told = [TwoChains("a"), QuickPart("b")], [], []
    done = list(step_events(parts, 2, light_preparation))
    # As if both had taken the same time.
    events = sorted(done, key=lambda event: (event.step, event.seconds is not None))
    elsewhere.run(lambda r: saved.append((r.steps_done, r.running)), told.append, events)
    assert saved[-1] == (6, None)
    assert any(running.count("; ") for _, running in saved[:-1])
    assert len([line for line in told if "took" in line]) == 6
    for one, other in zip(here.sections, elsewhere.sections, strict=True):
        assert one.result == other.result
        assert set(one.seconds) == set(other.seconds) == set(one.planned)
        assert one.blocks["Figures"] == other.blocks["Figures"]
        assert len(one.blocks["Pictures"].comparisons) == len(other.blocks["Pictures"].comparisons)


def test_a_step_that_fails_elsewhere_ends_all_processes():
    parts, saved = [QuickPart("a", error=ValueError("no")), QuickPart("b")], []
    report = DemoReport(parts, began=time.perf_counter())
    with pytest.raises(RuntimeError, match="A step of the demo failed"):
        report.run(lambda r: saved.append(r.stopped), events=step_events(parts, 2, light_preparation))
    assert "Part a: Train" in saved[-1]
    assert multiprocessing.active_children() == []


def light_preparation() -> None:
    """In place of importing torch."""
