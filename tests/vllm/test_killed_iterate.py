"""A whole round by vLLM, in its processes and by servers of the stages, killed once and then gone on with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import killed
from tests.vllm.conftest import ENVIRONMENT

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("vllm")]


@pytest.fixture(scope="module")
def begun(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return killed.begin(tmp_path_factory.mktemp("begun"))


def test_one_vllm_per_process(vllm_python: str, begun: Path, tmp_path: Path) -> None:
    run = killed.copied(begun, tmp_path / "run")
    words = ("--engine.type", "vllm", "--gpus", "2")
    round_ = killed.Iterate(vllm_python, run, *words, **ENVIRONMENT)
    round_.killed_in("candidates")
    round_.done(last="golden/stage.json")
    killed.check_rows(run, evaluated=False)


def test_servers_of_the_stages(vllm_python: str, begun: Path, tmp_path: Path) -> None:
    run = killed.copied(begun, tmp_path / "run")
    words = ("--engine.type", "server", "--engine.serve", "true", "--engine.vllm_python", vllm_python)
    round_ = killed.Iterate(sys.executable, run, *words, **ENVIRONMENT)
    round_.killed_in("claims")
    round_.done(last="golden/stage.json")
    killed.check_rows(run, evaluated=False)
