"""One environment serves training and vLLM: where vLLM runs, trainings lose what they lose everywhere."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.vllm.conftest import REPO

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("vllm")]


def test_losses_and_captions_of_0_1(vllm_python: str) -> None:
    command = [vllm_python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["tests/test_losses.py", "tests/test_fixture.py"]
    there = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=REPO, env=there, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
