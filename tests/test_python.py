"""docs/python.md runs as it is printed."""

import json
import re
from pathlib import Path

import pytest

from captioner.config import Config, shown, values
from captioner.lab import grid as scenes
from captioner.runs import Run
from tests.test_demo import small

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "python.md"


@pytest.mark.slow
def test_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(tmp_path)
    scenes.write("validation", 4, tmp_path / "held-out")
    (tmp_path / "held-out" / "metadata.parquet").unlink()  # unjudged: a random model says nothing true
    settings["gate"] |= {
        "data": str(tmp_path / "held-out"),
        "max_repeated_rise": 1.0,
        "max_length_ratio": 1e6,
    }
    config = Config.model_validate(settings)
    lines = [f"{name} = {json.dumps(shown(value))}" for name, value in values(config)]
    (tmp_path / "photos.toml").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.S)
    found: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), found)
    assert found["config"] == config
    run = Run(tmp_path / "runs/photos", config)
    assert (tmp_path / str(found["captioner"])).resolve() == run.captioner_dir(1)
    assert found["newest"] == found["captioner"]
    assert json.loads((run.path / "round-1/gate.json").read_text())["promoted"]
    assert isinstance(found["counts"], dict) and found["counts"]["pairs"] > 0
    assert found["scores"] == Path("runs/photos/round-1/evaluation.json")
    assert len(blocks[1].splitlines()) == 5
