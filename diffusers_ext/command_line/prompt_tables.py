"""The files of prompts that the evaluations read."""

from __future__ import annotations

import os

from diffusers_ext.core import text_tables
from diffusers_ext.core.text_tables import GroupedPrompts


def read_prompt_column(path: str | os.PathLike, column: str = "prompt") -> list[str]:
    """Prompts of a text file, one a line, or of a column of a table.

    There are no comments: `# 1` is a prompt. Blank lines are passed over.

    Raises:
        ValueError: no such file or column, another format, a broken row, or no prompt.
    """
    return text_tables.read_prompt_texts(path, column, argument="prompt_file")


def read_grouped_prompts(path: str | os.PathLike) -> GroupedPrompts:
    """The prompts of a table by their groups, with the seeds of those that have one.

    Raises:
        ValueError: as `diffusers_ext.core.text_tables.read_grouped_prompts`.
    """
    return text_tables.read_grouped_prompts(path, "evaluation_prompts")
