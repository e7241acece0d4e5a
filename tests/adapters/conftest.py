"""The interpreter that has the `adapters` library; what runs in it runs in processes of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
Runs = Callable[..., str]


@pytest.fixture(scope="session")
def there() -> Runs:
    """``there(*words)`` runs that interpreter in the repository and returns what it prints."""
    default = REPO / ".venv-adapters" / "bin" / "python"
    python = Path(os.environ.get("CAPTIONER_ADAPTERS_PYTHON") or default)
    if not python.is_file():
        reason = f"no `adapters` library at {python}: build it with tests/adapters/install.sh"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)

    def run(*words: str | Path) -> str:
        done = subprocess.run(
            [python, *words],
            cwd=REPO,
            env={**os.environ, "PYTHONPATH": str(REPO)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
        return done.stdout

    return run
