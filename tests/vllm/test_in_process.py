"""The engine with vLLM in its own process: another interpreter, other transformers, the same rows as `hf`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from captioner.engines import QuestionBatch, make_engine
from tests.vllm.conftest import ENVIRONMENT, REPO
from tests.vllm.test_server import GREEDY, QUESTIONS, SIZES, image, requests, settings

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("vllm")]
# What runs there: it has neither adapters nor trl, nor what reads and writes files.
THERE = """
import json, sys
from pathlib import Path
import numpy as np
from PIL import Image
from captioner.config import Config, SamplingConfig
from captioner.engines import CaptionRequest, QuestionBatch, make_engine

def image(seed, width, height):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))

def main():
    checkpoint, sizes, questions = json.loads(sys.argv[1])
    config = Config.model_validate({"engine": {"type": "vllm", "max_num_seqs": 2}})  # 4 at once
    engine = make_engine(Path(checkpoint), config)
    asked = [CaptionRequest(f"k{i}", image(i, *sizes[i % 4]), f"{i:064x}") for i in range(6)]
    greedy = list(engine.sample(asked, 1, SamplingConfig(temperature=0.0, max_tokens=24)))
    sampled = [list(engine.sample(asked[:2], 2, SamplingConfig(max_tokens=24))) for _ in range(2)]
    views = ("all", "center")
    batches = [QuestionBatch(image(i, *sizes[i]), questions, view) for i, view in enumerate(views)]
    answers = [[(a.p_yes, a.label_mass) for a in row] for row in engine.p_yes(batches)]
    # asked between captions, and of an iteration that nobody ends: as a worker that verifies does
    begun = engine.sample(asked, 1, SamplingConfig(temperature=0.0, max_tokens=24))
    assert [next(begun), next(begun)] == greedy[:2]
    assert [[(a.p_yes, a.label_mass) for a in row] for row in engine.p_yes(batches)] == answers
    assert next(begun) == greedy[2]
    begun.close()
    assert list(engine.sample(asked, 1, SamplingConfig(temperature=0.0, max_tokens=24))) == greedy
    assert list(engine.p_yes([QuestionBatch(image(0, *sizes[0]), [])])) == [[]]
    assert not engine._done and not engine._llm.llm_engine.has_unfinished_requests()
    rows = [[c.model_dump() for c in row] for row in greedy]
    again = [[[c.model_dump() for c in row] for row in rows] for rows in sampled]
    unwanted = [name for name in ("adapters", "trl", "peft", "datasets", "pyarrow") if name in sys.modules]
    print("RESULT" + json.dumps([rows, again, answers, unwanted]))

if __name__ == "__main__":  # vLLM starts processes of its own, which read this file again
    main()
"""


def test_rows_of_hf(vllm_python: str, checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "there.py"
    script.write_text(THERE)
    asked = json.dumps([str(checkpoint), SIZES, QUESTIONS])
    result = subprocess.run(
        [vllm_python, str(script), asked],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    [line] = [each for each in result.stdout.splitlines() if each.startswith("RESULT")] or [result.stderr]
    greedy, sampled, answers, unwanted = json.loads(line.removeprefix("RESULT"))
    assert unwanted == [] and sampled[0] == sampled[1]
    assert len({c["text"] for row in sampled[0] for c in row}) == 4
    hf = make_engine(checkpoint, settings("hf"))

    def plain(row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name != "mean_logprob"}

    for [theirs], [ours] in zip(hf.sample(requests(), 1, GREEDY), greedy, strict=True):
        assert plain(ours) == plain(theirs.model_dump())
    views = ("all", "center")
    batches = [QuestionBatch(image(i, *SIZES[i]), QUESTIONS, view) for i, view in enumerate(views)]
    for row, mine in zip(hf.p_yes(batches), answers, strict=True):
        assert [p for p, _ in mine] == pytest.approx([a.p_yes for a in row], abs=1e-4)
        assert [mass for _, mass in mine] == pytest.approx([a.label_mass for a in row], abs=1e-4)
