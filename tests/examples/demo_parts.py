"""Parts of a demo that take no time, for tests of the report and of its page."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from examples.demo_report import Comparison, Findings, Gallery, Picture, Step, Table

PROMPT = 'a "red" <b>seven</b> & more'


def still(color: str) -> Image.Image:
    """A picture of one colour with a corner of another."""
    image = Image.new("RGB", (8, 8), color)
    image.putpixel((0, 0), (255, 255, 255))
    return image


def gallery(title: str, sides: Sequence[str], frames: int, count: int = 4) -> Gallery:
    """Comparisons whose last side is wrong."""
    pictures = {
        side: Picture(
            [still(color) for color in ("red", "green", "blue")[:frames]], f"reads {side}", side != sides[-1]
        )
        for side in sides
    }
    return Gallery(title, "Chosen by nobody.", [Comparison(PROMPT, s, pictures) for s in range(count)])


class QuickPart:
    """Three steps: pictures of one side, nothing, then all sides and a table that is wide.

    Args:
        name: for links and the title.
        frames: of each picture.
        error: raised by the second step.
    """

    explanation = ("What the tool does.", "How it was tried.")
    commands = "accelerate launch training/train.py --a_long_flag with_a_long_value " + "x" * 90

    def __init__(self, name: str, frames: int = 1, error: BaseException | None = None) -> None:
        self.name, self.title = name, f"Part {name}"
        self.frames, self.error = frames, error

    def steps(self) -> list[Step]:
        return [Step("Draw", self._draw), Step("Train", self._train), Step("Compare", self._compare)]

    def _draw(self) -> Findings:
        return Findings([gallery("Pictures", ["base"], self.frames)])

    def _train(self) -> Findings:
        if self.error is not None:
            raise self.error
        return Findings()

    def _compare(self) -> Findings:
        header = ["side", *(f"a rather long heading {number}" for number in range(8))]
        table = Table("Figures", "Measured.", header, [["base", *["0.123"] * 8]])
        pictures = gallery("Pictures", ["base", "plain", "changed"], self.frames)
        return Findings([table, pictures], "It worked in 97 % of pictures.")
