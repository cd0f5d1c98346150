# SPDX-License-Identifier: Apache-2.0
"""One measurement in a process of its own, watched from here: its answer, its time limit, and how
little memory of the device was free meanwhile.

A process is forked from this one, which has imported torch and used nothing of it, or started anew.
It prints "ready" and waits for a line before what is watched; its last line is JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, NoReturn

from runner import Failed, Run, last_line

SAMPLE_S = 0.005
PARENT_DEATH_SIGNAL = 1  # of prctl: what a process gets when its parent ends
KEPT_BYTES = 1 << 16  # of what a process prints: the end


class TimedOut(Failed):
    """It was not done in time, and killed."""


@dataclass
class Child:
    """A process, the pipe that it answers through, the one it waits on, and what it complains."""

    pid: int
    answers: int
    orders: int
    errors: IO[str]


def wait_until_watched() -> None:
    """In the process: from here on it counts."""
    print("ready", flush=True)
    sys.stdin.readline()


def _pipes() -> tuple[int, int, int, int, IO[str]]:
    answers, answers_end = os.pipe()
    orders_end, orders = os.pipe()
    errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed by watch()
    return answers, answers_end, orders_end, orders, errors


def fork(function: Callable[[Any], None], argument: Any) -> Child:
    """A process that calls a function and ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    answers, answers_end, orders_end, orders, errors = _pipes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy's threads, which know of forks
        pid = os.fork()
    if pid == 0:
        for source, target in ((orders_end, 0), (answers_end, 1), (errors.fileno(), 2)):
            os.dup2(source, target)
        os.close(answers)
        os.close(orders)
        _call(function, argument)
    os.close(answers_end)
    os.close(orders_end)
    return Child(pid, answers, orders, errors)


def _call(function: Callable[[Any], None], argument: Any) -> NoReturn:
    """The life of a forked process: never back into the program of its parent."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
        sys.stdin = os.fdopen(0)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        function(argument)
        code = 0
    except SystemExit as error:
        print(error, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def start(command: list[str]) -> Child:
    """A program."""
    answers, answers_end, orders_end, orders, errors = _pipes()
    ends = ((orders_end, 0), (answers_end, 1), (errors.fileno(), 2))
    actions = [(os.POSIX_SPAWN_DUP2, source, target) for source, target in ends]
    try:
        pid = os.posix_spawnp(command[0], command, os.environ, file_actions=actions)
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from None
    finally:
        os.close(answers_end)
        os.close(orders_end)
    return Child(pid, answers, orders, errors)


def watch(
    child: Child, timeout_s: float, free_bytes: Callable[[], int | None] = lambda: None
) -> Run:
    """What the process answers; with `device_bytes`, by which most memory of the device was in use
    more than when it was ready, where `free_bytes` knows.

    Raises:
        TimedOut, Failed: it took too long, it ended badly, or it answered nothing.
    """
    text, before, least = b"", None, None
    is_ready, status = False, None
    deadline = time.monotonic() + timeout_s
    try:
        while status is None:
            if time.monotonic() > deadline:
                raise TimedOut(f"took more than {timeout_s:.0f} s")
            ended, found = os.waitpid(child.pid, os.WNOHANG)
            status = os.waitstatus_to_exitcode(found) if ended else None
            text += _read(child.answers, 0 if ended else SAMPLE_S)
            if not is_ready and b"ready\n" in text:
                is_ready, before = True, free_bytes()
                with contextlib.suppress(OSError):
                    os.write(child.orders, b"go\n")
            if before is not None:
                least = min(free_bytes() or before, before if least is None else least)
            text = text[-KEPT_BYTES:]
        if status != 0:
            child.errors.seek(0)
            reason = last_line(child.errors.read())
            raise Failed(reason if status > 0 else f"killed by signal {-status}")
    finally:
        if status is None:
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
        os.close(child.answers)
        os.close(child.orders)
        child.errors.close()
    measured = _answer(text)
    if before is not None and least is not None:
        measured["device_bytes"] = before - least
    return measured


def _read(descriptor: int, wait_s: float) -> bytes:
    """What is there, after a wait if nothing is; without a wait, all of it."""
    text = b""
    while select.select([descriptor], [], [], wait_s)[0]:
        piece = os.read(descriptor, KEPT_BYTES)
        text += piece
        if not piece:
            time.sleep(wait_s)  # its end is closed, and it goes on
        if not piece or wait_s:
            break
    return text


def _answer(text: bytes) -> Run:
    try:
        measured: Run = json.loads(text.decode(errors="replace").splitlines()[-1])
    except (IndexError, ValueError):
        raise Failed("ended without an answer") from None
    return measured


class DeviceMemory:
    """How much memory of an NVIDIA device is free, asked of its driver without using the device:
    a process that has used it cannot be forked. None where that cannot be asked."""

    def __init__(self) -> None:
        self._library: Any = None
        self._handle: Any = None
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL("libnvidia-ml.so.1")
            self._library = library if library.nvmlInit_v2() == 0 else None

    def find(self, uuid: str | None) -> None:
        """Which device it is about, as torch names it."""
        if self._library is None or uuid is None:
            return
        handle = ctypes.c_void_p()
        name = f"GPU-{uuid.removeprefix('GPU-')}".encode()
        if self._library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)) == 0:
            self._handle = handle

    def free_bytes(self) -> int | None:
        """Now."""
        if self._handle is None:
            return None
        sizes = (ctypes.c_ulonglong * 3)()  # total, free, used
        failed = self._library.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(sizes))
        return None if failed else int(sizes[1])

    def driver(self) -> str | None:
        """The version of the driver."""
        if self._library is None:
            return None
        text = ctypes.create_string_buffer(81)
        failed = self._library.nvmlSystemGetDriverVersion(text, 81)
        return None if failed else text.value.decode()
