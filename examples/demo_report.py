"""What a demo shows, as data: parts made of steps, and the pictures and tables that each step leaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from PIL import Image


class Picture(NamedTuple):
    """A picture or a clip, and what was read from it."""

    frames: Sequence[Image.Image]  # one, or those of a clip
    reading: str = ""
    right: bool | None = None  # `None` where nothing was asked that could be wrong


class Comparison(NamedTuple):
    """What one prompt and one seed give on several sides."""

    prompt: str
    seed: int
    pictures: dict[str, Picture]  # side -> picture


class Gallery(NamedTuple):
    """Comparisons under one heading."""

    title: str
    text: str  # how they were chosen, and what to look for
    comparisons: Sequence[Comparison]


class Table(NamedTuple):
    """Figures; the first column names the rows."""

    title: str
    text: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Findings(NamedTuple):
    """What a step leaves; a gallery or table replaces the one of the same title."""

    blocks: Sequence[Gallery | Table] = ()  # shown before those of earlier steps
    result: str = ""  # of the whole part, in one or two sentences


class Step(NamedTuple):
    """A step that is still to be done.

    Attributes:
        title: no other step of its part has it.
        action: does it, maybe in another process, and returns what is picklable.
        findings: makes findings of that where the report is; `None` where the action returns them.
        chain: steps of one chain follow each other in one process, different chains know nothing of each other.
    """

    title: str
    action: Callable[[], Any]
    findings: Callable[[Any], Findings] | None = None
    chain: int = 0


class StepEvent(NamedTuple):
    """A step begins, or ends with what it found."""

    part: int
    step: int
    seconds: float | None = None  # `None` where it begins
    result: Any = None


class DemoPart(Protocol):
    """One tool's part of a demo.

    Attributes:
        name: short, for links.
        title: its heading.
        explanation: what the tool does, one string a paragraph.
        commands: how to do the same with one's own model.
    """

    name: str
    title: str
    explanation: Sequence[str]
    commands: str

    def steps(self) -> Sequence[Step]:
        """What is to be done, in order."""
        ...


@dataclass
class Section:
    """What is known of a part so far.

    Args:
        part: its texts.
        planned: titles of all its steps.
        seconds: of the steps that are done, by title.
        blocks: galleries and tables by title.
        result: its last step's.
    """

    part: DemoPart
    planned: list[str]
    seconds: dict[str, float] = field(default_factory=dict)
    blocks: dict[str, Gallery | Table] = field(default_factory=dict)
    result: str = ""

    @property
    def tables(self) -> list[Table]:
        """The tables alone."""
        return [block for block in self.blocks.values() if isinstance(block, Table)]


class DemoReport:
    """Runs parts step by step, and knows at any time what was found and how long it took.

    Args:
        parts: in the order in which they run.
        facts: of the machine and its software, by name.
        began: `time.perf_counter()` at the start of the process.
    """

    def __init__(self, parts: Sequence[DemoPart], *, facts: dict[str, str] | None = None, began: float) -> None:
        self.facts, self.began = dict(facts or {}), began
        self._steps = [list(part.steps()) for part in parts]
        self.sections = [
            Section(part, [step.title for step in steps]) for part, steps in zip(parts, self._steps, strict=True)
        ]
        self.preparation = self.seconds_so_far  # imports, before the first step
        self.first_picture: float | None = None
        self.total: float | None = None
        self._running: list[str] = []
        self.stopped: str | None = None

    @property
    def running(self) -> str | None:
        """The steps that are being done."""
        return "; ".join(self._running) or None

    @property
    def seconds_so_far(self) -> float:
        """Since the start of the process."""
        return time.perf_counter() - self.began

    @property
    def number_of_steps(self) -> int:
        """Of all parts."""
        return sum(len(section.planned) for section in self.sections)

    @property
    def steps_done(self) -> int:
        """Of all parts."""
        return sum(len(section.seconds) for section in self.sections)

    def run(
        self,
        save: Callable[[DemoReport], None],
        tell: Callable[[str], None] = lambda line: None,
        events: Iterable[StepEvent] | None = None,
    ) -> None:
        """Do all steps; the report is saved before the first, after each, and when one fails.

        Args:
            save: writes the report as it is.
            tell: gets one line before and after each step.
            events: the steps as they are done elsewhere; they are done here, in order, when `None`.
        """
        finished, numbers = False, {}
        try:
            for event in self._own_events() if events is None else events:
                section, step = self.sections[event.part], self._steps[event.part][event.step]
                title = f"{section.part.title}: {step.title}"
                if event.seconds is None:
                    numbers[title] = f"[{len(numbers) + 1}/{self.number_of_steps}]"
                    self._running.append(title)
                    save(self)
                    tell(f"{numbers[title]} {title}")
                    continue
                self._running.remove(title)
                self._add(section, step, event)
                tell(f"{numbers[title]} took {event.seconds:.1f} s")
            finished = True
        finally:  # an interruption too must not leave a page that says it goes on
            if not finished:
                self.stopped = self.running
                self._running.clear()
                save(self)
        self.total = self.seconds_so_far
        save(self)

    def _own_events(self) -> Iterator[StepEvent]:
        for part, steps in enumerate(self._steps):
            for index, step in enumerate(steps):
                yield StepEvent(part, index)
                started = time.perf_counter()
                result = step.action()
                yield StepEvent(part, index, time.perf_counter() - started, result)

    def _add(self, section: Section, step: Step, event: StepEvent) -> None:
        section.seconds[step.title] = event.seconds
        findings = event.result if step.findings is None else step.findings(event.result)
        latest = {block.title: block for block in findings.blocks}
        section.blocks = latest | {k: v for k, v in section.blocks.items() if k not in latest}
        section.result = findings.result or section.result
        has_pictures = any(isinstance(block, Gallery) for block in findings.blocks)
        if has_pictures and self.first_picture is None:
            self.first_picture = self.seconds_so_far
