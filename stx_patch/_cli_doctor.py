# SPDX-License-Identifier: Apache-2.0
"""`stx-patch doctor`: what this machine offers, and what to change."""

from __future__ import annotations

import argparse
import json

from . import _doctor
from ._cli_text import count_text, printable, write
from ._finding import NOTE, PROBLEM

_EXAMPLES = """\
examples:
  stx-patch doctor                                 the current folder's file system
  stx-patch doctor /models/llama                   the one that the models are on
  stx-patch doctor --json                          for programs

Exit status: 0 there is no problem, 1 there is one, 2 trouble (no such path).
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    doctor = commands.add_parser(
        "doctor",
        help="what this machine offers to a load, and what to change",
        description="Say what is there for fast loads, as found in /proc and /sys and by trying:\n"
        "the native core, PyTorch, CUDA, io_uring, direct reads, the file system, the page cache,\n"
        "memory, and the variables in force.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument(
        "path",
        metavar="PATH",
        nargs="?",
        default=".",
        help="a file or folder of what is to be loaded (the current folder)",
    )
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 1 if one of them is a problem."""
    findings = _doctor.examine(arguments.path)
    states = [finding.state for finding in findings]
    if arguments.json:
        write(json.dumps({"findings": [finding._asdict() for finding in findings]}, indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            write(f"{finding.state:7}  {finding.name:{width}}  {printable(finding.seen)}")
            if finding.advice is not None:
                write(f"{'':{width + 9}}  -> {printable(finding.advice)}")
        problems = count_text(states.count(PROBLEM), "problem")
        write(f"{problems}, {count_text(states.count(NOTE), 'note')}")
    return 1 if PROBLEM in states else 0
