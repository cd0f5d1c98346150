# SPDX-License-Identifier: Apache-2.0
"""`stx-patch autopatch`: a start-up hook for the processes that nobody can edit.

The hook is a `.pth` file, of which Python runs the one line when it starts. It does nothing unless
STX_PATCH is set, and nothing once stx_patch is uninstalled. (Python 3.15 has begun to replace such
lines, PEP 829: they are run up to 3.17 and ignored from 3.18 on. `--status` asks a fresh Python.)
"""

from __future__ import annotations

import argparse
import os
import site
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from . import _environment
from ._cli_errors import CliError
from ._cli_text import printable, write

# Sorts behind the files of editable installs: they put us on the path.
_NAME = "stx_patch_autopatch.pth"
_MARK = "# Written by stx-patch autopatch --install; taken away by stx-patch autopatch --remove.\n"
_CODE = """\
import sys
sys.path.append({folder})
try:
    import stx_patch._autopatch as found
except Exception:
    found = None
finally:
    sys.path.pop()
if found is not None:
    found.activate()
"""
_PROBE = "import sys; sys.exit('stx_patch._autopatch' not in sys.modules)"
_DESCRIPTION = f"""\
A start-up hook: where it is installed, each Python that is started with STX_PATCH=1 in its
environment loads its safetensors files through stx_patch, with the filter of STX_PATCH_FILTER.
Without the variable the hook does nothing; STX_PATCH=0 turns everything off.

What STX_PATCH_FILTER may be:
{_environment.FILTER_HELP}"""
_EXAMPLES = """\
examples:
  stx-patch autopatch --install           into the site-packages of this Python
  STX_PATCH=1 vllm serve llama/           now reaches each of its processes
  stx-patch autopatch --status            whether it is there, and works
  stx-patch autopatch --remove

Exit status of --status: 0 the hook works, 1 it does not.
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `autopatch`."""
    parser = commands.add_parser(
        "autopatch",
        help="patch every Python that is started with STX_PATCH=1",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_mutually_exclusive_group(required=True)
    actions.add_argument("--install", action="store_true", help="leave the hook")
    actions.add_argument("--remove", action="store_true", help="take it away")
    actions.add_argument("--status", action="store_true", help="say whether it is there and works")
    parser.add_argument(
        "--user", action="store_true", help="with --install: in the folder of this user"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do one of the three."""
    if arguments.install:
        return _install(arguments.user)
    return _remove() if arguments.remove else _tell_status()


def _install(user: bool) -> int:
    folder = _choose_folder(user)
    path = folder / _NAME
    is_there = _is_ours(path)
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, _hook_text())
    said = f"{printable(str(path))} {'was there already' if is_there else 'is installed'}"
    if not user and folder != _site_folder():
        said += f": the folder of this user, since {printable(str(_site_folder()))} is not writable"
    write(said)
    if not _is_in_force():
        raise CliError(f"a fresh {sys.executable} does not run it: {_why_not(path)}")
    write("a Python that is started with STX_PATCH=1 is patched")
    return 0


def _choose_folder(user: bool) -> Path:
    """Where Python looks for hooks, and we may write."""
    folder = _site_folder()
    if not user and os.access(folder, os.W_OK):
        return folder
    if not site.ENABLE_USER_SITE:
        reason = "" if user else f"{folder} is not writable, and "
        raise CliError(f"{reason}this Python has no folder for its user (a virtual environment?)")
    if not user and sys.prefix != sys.base_prefix:  # what is in it is to stay in it
        version = "{}.{}".format(*sys.version_info)
        raise CliError(
            f"{folder} is not writable; --user reaches beyond this virtual environment, to every "
            f"Python {version} of this user"
        )
    return _user_folder()


def _site_folder() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _user_folder() -> Path:
    return Path(site.getusersitepackages())


def _is_ours(path: Path) -> bool:
    """Whether our hook is there. CliError where something else has its name."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False
    lines = text.splitlines(keepends=True)
    if len(lines) != 2 or lines[0] != _MARK or not lines[1].startswith("import os; "):
        raise CliError(f"{path} holds something else: look at it, and take it away yourself")
    return True


def _hook_text() -> str:
    """One line of ASCII. The folder we are in is tried last: hooks of a user's folder run before
    the other folders are on the path."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    code = ascii(_CODE.format(folder=ascii(folder)))
    return (
        f"{_MARK}import os; os.environ.get('STX_PATCH', '0') in ('0', '') or exec({code}, {{}})\n"
    )


def _write(path: Path, text: str) -> None:
    """The whole file or none; for all to read, since Python skips silently what it cannot."""
    number, temporary = tempfile.mkstemp(prefix=_NAME, suffix=".tmp", dir=path.parent)
    try:
        with open(number, "w", encoding="ascii") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _remove() -> int:
    found = [path for path in _paths() if _is_ours(path)]
    for path in found:
        path.unlink()
        write(f"{printable(str(path))} is removed")
    if not found:
        write(f"there is no {_NAME} for {sys.executable}")
    return 0


def _paths() -> list[Path]:
    return list(dict.fromkeys((_site_folder() / _NAME, _user_folder() / _NAME)))


def _tell_status() -> int:
    found = [path for path in _paths() if _is_ours(path)]
    for path in found:
        write(f"hook          {printable(str(path))}")
    if not found:
        write(f"hook          not installed for {sys.executable}: stx-patch autopatch --install")
    in_force = _is_in_force()
    if in_force:
        write("works         yes: a Python that is started with STX_PATCH=1 is patched")
    elif found:
        write(f"works         no: {_why_not(found[0])}")
    said = os.environ.get(_environment.SWITCH)
    meaning = {True: "on", False: "off, everywhere", None: "says nothing: 1 is on, 0 is off"}
    shown = "not set" if said is None else f"{printable(said)} ({meaning[_environment.switch()]})"
    write(f"STX_PATCH     {shown}")
    try:
        rule = _environment.filter_rule()
        shown = "not set: everything is kept" if rule is None else os.environ[_environment.FILTER]
    except ValueError as error:
        shown = f"wrong, each file that is opened will say so: {error}"
    write(f"its filter    {printable(shown)}")
    return 0 if in_force else 1


def _is_in_force() -> bool:
    """Whether a fresh Python runs the hook: what keeps it from that is various."""
    environment = {**os.environ, _environment.SWITCH: "1"}
    start = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_start")
    paths = environment.pop("PYTHONPATH", "").split(os.pathsep)  # `stx-patch run` may be around us
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path != start)
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    done = subprocess.run([sys.executable, *flags, "-c", _PROBE], env=environment, check=False)
    return done.returncode == 0


def _why_not(path: Path) -> str:
    if sys.flags.no_site:
        return "site-packages are switched off (-S)"
    if path.parent == _user_folder() and not site.ENABLE_USER_SITE:
        return "the folder of the user is switched off (-s, -I or a virtual environment)"
    if sys.version_info >= (3, 18):
        return "this Python ignores lines of code in .pth files"
    return f"{path.parent} is not a folder it looks into"
