# SPDX-License-Identifier: Apache-2.0
"""`stx-patch`: the parser, the table of commands, and how all of them end.

A command is a module with `add_to(commands)`, which adds its parser and sets `run`, a function of
the parsed arguments that gives the exit status: 0 fine, 1 the answer is no, 2 trouble. What goes
wrong is raised, and told here in one line. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from . import __version__, _autopatch
from ._cli_errors import CliError, complain, is_for_people, message_of

_COMMANDS = (
    "_cli_inspect",
    "_cli_explain",
    "_cli_extract",
    "_cli_compare",
    "_cli_doctor",
    "_cli_run",
    "_cli_autopatch",
)

_TROUBLE = 2
_INTERRUPTED = 128 + 2  # as a shell reports SIGINT
_PIPE_CLOSED = 128 + 13  # and SIGPIPE

_EXAMPLES = """\
examples:
  stx-patch inspect model.safetensors              what is in it, as a tree
  stx-patch inspect llama/ --depth 2               a folder, a list of files, an index
  stx-patch explain llama/ --layers 0:2            what loading two layers would read
  stx-patch extract llama/ small.safetensors --prefix model.norm --layers 0:2
  stx-patch merge llama/ whole.safetensors         many files into one
  stx-patch verify llama/ --full                   whether they are whole
  stx-patch diff llama/ tuned/                     what differs between two models
  stx-patch doctor llama/                          what this machine offers, what to change
  stx-patch run generate.py --model llama/         a program of yours, patched
  stx-patch autopatch --install                    a hook for all that start with STX_PATCH=1

`stx-patch COMMAND --help` has examples of each. Exit status: 0 fine, 1 the answer is no, 2 trouble.
"""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **keywords: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **keywords})  # those of commands, too

    def error(self, message: str) -> NoReturn:
        """One line, where argparse prints the usage, too."""
        raise CliError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `stx-patch` with these arguments; the exit status."""
    _autopatch.forget()
    try:
        status = _run(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # `stx-patch … | head`
        _drop_output()
        return _PIPE_CLOSED
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception as error:
        if not is_for_people(error):
            raise
        _flush_or_drop()
        complain(message_of(error))
        return _TROUBLE


def _run(argv: Sequence[str] | None) -> int:
    parser, commands = _make_parser()
    try:
        arguments = _parse(parser, commands, sys.argv[1:] if argv is None else list(argv))
    except SystemExit as ended:  # --help and --version
        return int(ended.code or 0)
    if arguments.run is None:
        parser.print_help(sys.stderr)
        return _TROUBLE
    status: int = arguments.run(arguments)
    return status


def _parse(
    parser: _Parser, commands: argparse._SubParsersAction[Any], words: list[str]
) -> argparse.Namespace:
    command = commands.choices.get(words[0]) if words else None
    if command is None or command.get_default("takes_rest"):
        return parser.parse_args(words)
    arguments: argparse.Namespace = command.parse_intermixed_args(words[1:])
    return arguments  # options may stand between sources


def _make_parser() -> tuple[_Parser, argparse._SubParsersAction[Any]]:
    parser = _Parser(
        prog="stx-patch",
        description="Look into safetensors files, check and compare them, make new ones, and load\n"
        "them patched.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stx-patch {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name in _COMMANDS:
        importlib.import_module(f"{__package__}.{name}").add_to(commands)
    return parser, commands


def _flush_or_drop() -> None:
    """Show what was printed before an error, if that can still be shown."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _drop_output()


def _drop_output() -> None:
    """Send what is left nowhere: the interpreter flushes again at its end, and complains."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # no file of the system
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
