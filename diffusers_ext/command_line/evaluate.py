"""What the evaluations share: settings on the console or over a YAML file, and scripts under a launcher."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ext.command_line.options import Command, Outcome, report_outcome
from diffusers_ext.core.settings import Settings
from diffusers_ext.training.run.settings import (
    add_settings,
    file_flags,
    file_reader,
    parse_settings,
    required_names,
    settings_of,
    settings_parser,
)

if TYPE_CHECKING:
    from diffusers_ext.evaluation.report_files import SavedReport


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, for the console and as a script.

    Attributes:
        settings_class: what it reads.
        compare: draws, measures and writes; takes settings and whether to show bars.
        shared: name in `training.run.setup` of the runs that share its YAML file.
        read_block: turns nested blocks of the file into flat names.
        reason: for which it must run in one process.
        table: options of the report's table for people.
    """

    settings_class: type[Settings]
    compare: Callable[[Any, bool], SavedReport]
    shared: str
    read_block: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    reason: str = ""
    table: tuple[tuple[str, Any], ...] = ()

    def command(self, name: str, summary: str, description: str, examples: tuple[str, ...]) -> Command:
        """The console's command."""
        return Command(
            name,
            summary,
            description,
            examples,
            self._add_arguments,
            self._run,
            output="output_dir",
            result_names=("report.json",),
            over_file=self._over_file,
        )

    def script(self, description: str | None) -> tuple[Callable[..., Any], Callable[[Any], SavedReport]]:
        """`parse_args` and `main` of a script; the latter returns the report."""
        from diffusers_ext.training.run.script import one_run_a_folder

        def parse_args(input_args: Sequence[str] | None = None) -> Settings:
            return parse_settings(self.settings_class, description, input_args, self.read_block, self._runs())

        return parse_args, one_run_a_folder(self._launched)

    def _runs(self) -> Sequence[type[Settings]]:
        from diffusers_ext.training.run import setup

        return getattr(setup, self.shared)

    def _add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_settings(parser, self.settings_class)
        names = required_names(self.settings_class)
        for action in parser._actions:
            action.required = action.dest in names

    def _over_file(self, words: Sequence[str]) -> list[str]:
        """The flags that the file of `--config` stands for."""
        parser = settings_parser(self.settings_class)
        return file_flags(parser, words, file_reader(self.settings_class, self.read_block), self._runs())

    def _run(self, args: argparse.Namespace) -> Outcome:
        settings: Any = settings_of(args, self.settings_class)
        if settings.allow_tf32:
            import torch

            torch.backends.cuda.matmul.allow_tf32 = True
        report = self.compare(settings, not args.quiet)
        table = report.to_table(**dict(self.table))
        return report_outcome(report, Path(settings.output_dir), table)

    def _launched(self, settings: Any) -> SavedReport:
        from diffusers_ext.training.run.script import check_output_dir
        from diffusers_ext.training.run.setup import make_accelerator

        check_output_dir(settings)
        accelerator = make_accelerator(settings)
        if accelerator.num_processes > 1:
            raise ValueError(
                f"The evaluation must be one process, got {accelerator.num_processes}{self.reason}. "
                "Pass `--num_processes 1` to `accelerate launch`."
            )
        settings.device = settings.device or accelerator.device
        report = self.compare(settings, True)
        logger.info("Wrote %s\n%s", settings.output_dir, report.to_table(**dict(self.table)))
        return report
