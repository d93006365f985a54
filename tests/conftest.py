"""Fixtures that several test files share."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import settings

# Everywhere else each run draws new examples; in CI a commit is judged by the same ones every time.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# A shell has jobs in the background ignore Ctrl-C, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Run Python code in a new process, with some environment variables set; return what it prints."""

    def run(code: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
