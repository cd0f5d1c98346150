# SPDX-License-Identifier: Apache-2.0
"""`stx-patch extract` and `stx-patch merge`: new files of what files hold."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ._cli_errors import CliError, complain
from ._cli_filters import (
    add_filters,
    check_asked,
    filter_of,
    is_alone,
    names_of,
    nothing_kept,
)
from ._cli_text import count_text, printable, size_text, write
from ._headers import names_in, naming_bad_files

_EXTRACT_EXAMPLES = """\
examples:
  stx-patch extract llama/ embeddings.safetensors --prefix model.embed_tokens
  stx-patch extract llama/ stage0.safetensors --layers 0:16 --prefix model.embed_tokens --check
  stx-patch extract mixed.safetensors lora.safetensors --include '*.lora_A.*' --include '*.lora_B.*'
  stx-patch extract llama/ text/ --exclude 'model.visual.*' --max-shard-size 5GB
  ssh elsewhere cat names.txt | stx-patch extract llama/ part.safetensors --names-from -
"""
_MERGE_EXAMPLES = """\
examples:
  stx-patch merge llama/ llama.safetensors                   the shards of a model as one file
  stx-patch merge base.safetensors extra.safetensors all.safetensors --check
  stx-patch merge llama.safetensors llama/ --max-shard-size 5GB      one file as shards
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    extract = commands.add_parser(
        "extract",
        help="write some of their tensors to a new file",
        description="Write the tensors that are asked for to a file of their own, bit by bit as\n"
        "they are. The target appears whole or not at all.",
        epilog=_EXTRACT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    extract.add_argument("source", help="a file, a folder, or a model.safetensors.index.json")
    extract.add_argument("target", help="the file, or the folder of shards, to write")
    add_filters(extract)
    extract.add_argument("--all", action="store_true", help="everything")
    extract.add_argument(
        "--allow-whole",
        action="store_true",
        help="where no --prefix matches, write everything: an error otherwise",
    )
    _add_writing(extract)
    extract.set_defaults(run=_run_extract)
    merge = commands.add_parser(
        "merge",
        help="write the tensors of many files to one, or to shards",
        description="Write all tensors of the sources to one file, or to shards of a size. A name\n"
        "in two sources is an error.",
        epilog=_MERGE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    merge.add_argument("source", nargs="+", help="files, folders, indexes")
    merge.add_argument("target", help="the file, or the folder of shards, to write")
    _add_writing(merge)
    merge.set_defaults(run=_run_merge)


def _add_writing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("writing")
    group.add_argument("--overwrite", action="store_true", help="replace a target that exists")
    group.add_argument("--check", action="store_true", help="compare each tensor afterwards")
    group.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="such as 5GB: the target is a folder of shards with an index, if one is not enough",
    )


def _run_extract(arguments: argparse.Namespace) -> int:
    import stx_patch

    chosen = _choose(arguments)
    with _telling_of_writing([arguments.source], arguments.target):
        result = stx_patch.extract(
            arguments.source, arguments.target, **chosen, **_writing(arguments)
        )
    _tell(result, arguments.check)
    return 0


def _run_merge(arguments: argparse.Namespace) -> int:
    import stx_patch

    with _telling_of_writing(arguments.source, arguments.target):
        result = stx_patch.merge(arguments.source, arguments.target, **_writing(arguments))
    _tell(result, arguments.check)
    return 0


def _choose(arguments: argparse.Namespace) -> dict[str, Any]:
    """Which tensors, as `extract` takes it; an error for what is most likely a mistake."""
    tensor_filter = filter_of(arguments)
    if arguments.all:
        if tensor_filter is not None:
            raise CliError("--all is everything: give no filter with it")
        return {}
    if tensor_filter is None:
        raise CliError(
            "nothing says which tensors: give --include, --exclude, --prefix, --layers or"
            " --names-from, or --all for everything"
        )
    names = names_in([arguments.source])
    may_be_whole = arguments.allow_whole and is_alone(arguments, "prefix")
    if not may_be_whole:
        if not any(map(tensor_filter, names)):
            raise nothing_kept(arguments, names)
        check_asked(arguments, names)
    if is_alone(arguments, "prefix"):
        return {"prefixes": arguments.prefix}
    if is_alone(arguments, "names_from"):
        return {"names": names_of(arguments)}
    return {"tensor_filter": tensor_filter}


def _writing(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "overwrite": arguments.overwrite,
        "check": arguments.check,
        "max_shard_size": arguments.max_shard_size,
        "progress": importlib.util.find_spec("tqdm") is not None,
    }


@contextmanager
def _telling_of_writing(sources: list[str], target: str) -> Iterator[None]:
    """Warnings as lines, and errors that say what to do."""
    with warnings.catch_warnings(), naming_bad_files(sources), _ending_tidily():
        warnings.simplefilter("always")
        warnings.showwarning = _show_warning
        try:
            yield
        except IsADirectoryError as error:
            if error.filename not in (target, os.path.join(os.getcwd(), target)):
                raise
            raise CliError(
                f"{target} is a folder: give the path of a file, or --max-shard-size for a folder"
            ) from None
        except FileExistsError as error:
            if error.strerror not in (None, os.strerror(errno.EEXIST)):  # more is known
                raise CliError(f"{error.filename} {error.strerror}") from None
            role = ", the last argument, is what is to be written and" if len(sources) > 1 else ""
            raise CliError(f"{target}{role} exists: --overwrite replaces it") from None


class _Ended(BaseException):
    """A signal that ends the process."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _ending_tidily() -> Iterator[None]:
    """In the block, SIGTERM and SIGHUP end the process as ever, but leave no temporary file."""

    def end(number: int, _frame: Any) -> None:
        raise _Ended(number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    is_main = threading.current_thread() is threading.main_thread()
    try:
        for number in numbers if is_main else ():
            signal.signal(number, end)
        yield
    except _Ended as ended:
        signal.signal(ended.number, signal.SIG_DFL)
        os.kill(os.getpid(), ended.number)
        raise
    finally:
        for number in numbers if is_main else ():
            signal.signal(number, signal.SIG_DFL)


def _show_warning(message: Warning | str, *_others: Any, **_more: Any) -> None:
    complain(printable(str(message)), "warning")


def _tell(result: Any, is_checked: bool) -> None:
    """`result` is an ExtractResult."""
    here = os.path.join(os.getcwd(), "")
    write("\n".join(f"wrote {printable(path.removeprefix(here))}" for path in result.paths))
    write(
        f"{result.tensors:,} of {count_text(result.tensors_total, 'tensor')},"
        f" {size_text(result.size_bytes)} of {size_text(result.total_bytes)}"
        + ("; each of them equals its source" if is_checked else "")
    )
