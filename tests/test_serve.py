"""captioner serve: the command it starts, and what it says where there is nothing to start."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from captioner.config import Config
from captioner.engines import make_engine
from captioner.engines.server import served_name
from captioner.errors import EngineError
from loops.cli import main
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(folder)
    return folder


def test_dry_run_prints_the_command(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dry-run", "--port", "8765", "--views.center", "false", "--engine.vllm_python", "/env/python"]
    assert main(["serve", str(checkpoint), *words]) == 0
    shown = capsys.readouterr().out
    for part in (
        f"starts  /env/python -m vllm.entrypoints.openai.api_server --model {checkpoint}",
        "--limit-mm-per-prompt.image 5 --limit-mm-per-prompt.video 0",
        "--mm-processor-kwargs.size.shortest_edge 256 --mm-processor-kwargs.size.longest_edge 4096",
        f"--served-model-name {served_name(checkpoint)}",
        "--structured-outputs-config.disable_any_whitespace true",
        "--host 127.0.0.1 --port 8765",
    ):
        assert part in shown
    assert "--dtype float32" in shown or "--dtype bfloat16" in shown


def test_a_copy_has_the_same_name_and_other_weights_another(checkpoint: Path, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "same")
    tiny_checkpoint(tmp_path / "other", seed=1)
    assert served_name(tmp_path / "same") == served_name(checkpoint) != served_name(tmp_path / "other")


def test_a_server_that_does_not_start_is_told(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = tmp_path / "python"
    silent.write_text(f"#!{sys.executable}\nraise SystemExit(7)\n")
    silent.chmod(0o755)
    assert main(["serve", str(checkpoint), "--port", "1", "--engine.vllm_python", str(silent)]) == 2
    assert "the server ended with code 7" in capsys.readouterr().err
    assert main(["serve", str(checkpoint), "--port", "1", "--engine.vllm_python", "nowhere/python"]) == 2
    assert "does not start" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", str(checkpoint), "--port", str(taken.getsockname()[1])]) == 2
    assert "the port is taken" in capsys.readouterr().err


def test_what_vllm_cannot_run_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(checkpoint), "--dry-run", "--model.dtype", "float64"]) == 2
    assert "no float64" in capsys.readouterr().err
    config = checkpoint / "config.json"
    before = config.read_text()
    config.write_text(before.replace('"head_dim": 32', '"head_dim": 16'))
    try:
        assert main(["serve", str(checkpoint), "--dry-run"]) == 2
    finally:
        config.write_text(before)
    assert "16 wide" in capsys.readouterr().err
    assert main(["serve", "nowhere", "--dry-run"]) == 2


def test_without_vllm_it_says_what_to_do(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineError, match=r"vLLM is not installed here.*\n.*engine.type server"):
        make_engine(checkpoint, Config.model_validate({"engine": {"type": "vllm"}}))
