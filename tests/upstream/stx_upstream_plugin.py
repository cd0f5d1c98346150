"""pytest plugin for upstream's own tests: the patch is in force before they are collected.

Loaded by `tools/upstream.py` with `-p`. STX_UPSTREAM_PATCHED=1 patches; STX_UPSTREAM_RESULTS names
the JSON file that gets each test's outcome, the version of STX_UPSTREAM_PACKAGE that was tested,
and what served it.
"""

import importlib.metadata
import json
import os
from pathlib import Path

import pytest

import stx_patch

if os.environ["STX_UPSTREAM_PATCHED"] == "1":
    stx_patch.patch()

_outcomes: dict[str, str] = {}
_served: list[str] = []  # tests in which files were opened natively


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = stx_patch.stats().opens
    try:
        return (yield)
    finally:
        if stx_patch.stats().opens > before:
            _served.append(item.nodeid)


def pytest_runtest_logreport(report):
    """A test's outcome is its call's, or that of the phase which kept it from being called."""
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.nodeid] = report.outcome


def pytest_collectreport(report):
    if report.failed:
        _outcomes[report.nodeid] = "not collected"


def pytest_sessionfinish():
    stats = stx_patch.stats()
    results = {
        "version": importlib.metadata.version(os.environ["STX_UPSTREAM_PACKAGE"]),
        "patched": stx_patch.is_patched(),
        "outcomes": _outcomes,
        "served": _served,
        "opens": stats.opens,
        "tensors_native": stats.tensors_native,
        "fallbacks": stats.fallbacks,
    }
    Path(os.environ["STX_UPSTREAM_RESULTS"]).write_text(json.dumps(results))
