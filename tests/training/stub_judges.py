"""Judges that read nothing, for the command line of the evaluation."""

from __future__ import annotations


def mentions_seven(images, prompts) -> list[bool]:
    """True where the prompt, not the picture, says seven."""
    return ["seven" in prompt for prompt in prompts]


class Always:
    def correct(self, images, prompts) -> list[bool]:
        return [True] * len(images)


def one_number(images, prompts) -> float:
    return 0.5
