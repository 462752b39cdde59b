"""What all tests share: one torch thread, hypothesis profiles, and an account of tests that were left out."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Generator

import pytest
from hypothesis import settings

from tests.programs import find

settings.register_profile("quick", deadline=None, max_examples=50, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile("quick")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave a test out whose system programs are missing, and give every other one a single torch thread."""
    for mark in item.iter_markers("needs"):
        for program in mark.args:
            if find(program) is None:
                pytest.skip(f"{program} is not installed")
    # Sums differ in bits between one thread and two, and a test may have asked for two.
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    """End with one line that names what was left out; fail for it under LORAFLEET_FORBID_SKIPS=1."""
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    reasons = Counter(_reason(report) for report in reporter.stats.get("skipped", []))
    if not reasons:
        return
    forbidden = os.environ.get("LORAFLEET_FORBID_SKIPS") == "1"
    listed = "; ".join(f"{reason} ({count})" for reason, count in sorted(reasons.items()))
    reporter.write_line(f"left out{', which is forbidden here' if forbidden else ''}: {listed}", red=forbidden)
    if forbidden and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Give the reason a test was skipped with."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
