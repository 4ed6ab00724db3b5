"""What the scripts of the evaluations add to `diffusers-ext evaluate`: a launcher, and a YAML file of settings."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from accelerate.logging import get_logger

from diffusers_ext.command_line.options import check_drawing_arguments
from diffusers_ext.evaluation.report_files import SavedReport
from diffusers_ext.training.run.arguments import add_traceback_argument
from diffusers_ext.training.run.command_lines import OneLineParser, add_overwrite_argument
from diffusers_ext.training.run.config_file import parse_arguments
from diffusers_ext.training.run.script import check_output_dir, one_run_a_folder
from diffusers_ext.training.run.setup import make_accelerator


logger = get_logger(__name__)

ReportType = TypeVar("ReportType", bound=SavedReport)
AddArguments = Callable[[argparse.ArgumentParser], None]
ReadBlock = Callable[[dict[str, Any]], dict[str, Any]]


class EvaluationScript(NamedTuple):
    """An evaluation of the console as a script.

    Attributes:
        description: of the script.
        add_arguments: of the console's command.
        compare: draws, measures and writes.
        required: what flags or file must give; all else is checked by `compare`.
        read_block: of the file.
        groups: of the scripts that share the file.
        reason: for which it must run in one process.
    """

    description: str | None
    add_arguments: AddArguments
    compare: Callable[[argparse.Namespace], SavedReport]
    required: Sequence[str]
    read_block: ReadBlock | None
    groups: Sequence[AddArguments]
    reason: str = ""

    def parse_args(self, input_args: Sequence[str] | None = None) -> argparse.Namespace:
        """The command line, over the YAML file of `--config`."""
        parser = OneLineParser(
            description=self.description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add_arguments(parser)
        for action in parser._actions:
            action.required = False  # the file may give it
        group = parser.add_argument_group("script")
        group.add_argument(
            "--config", help="YAML file of arguments, one for all scripts; flags override it"
        )
        add_overwrite_argument(group)
        add_traceback_argument(group)
        group.add_argument("--allow_tf32", action="store_true", help="faster on Ampere and newer")
        return parse_arguments(parser, input_args, self.required, self.read_block, self.groups)

    def main(self, args: argparse.Namespace) -> SavedReport:
        """Draw, measure and write; returns the report."""
        return one_run_a_folder(self._compare)(args)

    def _compare(self, args: argparse.Namespace) -> SavedReport:
        check_drawing_arguments(args, ())
        check_output_dir(args)
        accelerator = make_accelerator(args)
        if accelerator.num_processes > 1:
            raise ValueError(
                f"The evaluation must be one process, got {accelerator.num_processes}{self.reason}. "
                "Pass `--num_processes 1` to `accelerate launch`."
            )
        args.device, args.quiet = args.device or accelerator.device, False
        report = self.compare(args)
        logger.info(f"Wrote {args.output_dir}\n{report.to_table()}")
        return report
