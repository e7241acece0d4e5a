"""What version 0.1 trained loads unchanged: fixtures/run-0.1 was made at commit 4c542e4, by its own commands.

transformers 4.57.6, `adapters` 1.3.0 and torch 2.13 wrote it; expected.json holds that version's words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from captioner.config import EngineConfig, ModelConfig, SamplingConfig, ViewsOverride
from captioner.engines import CaptionRequest, QuestionBatch
from captioner.engines.hf import HFEngine
from captioner.method.qa import Calibration
from captioner.models import adapters, fuse, model, soft_prompt
from captioner.models.model import Captioner

RUN = Path(__file__).parent / "fixtures" / "run-0.1"
EXPECTED: dict[str, Any] = json.loads((RUN / "expected.json").read_text())
PICTURES = [Image.open(path).convert("RGB") for path in sorted((RUN / "images").iterdir())]


def load(part: Path) -> Captioner:
    return model.load(ModelConfig(path=str(part), device="cpu", dtype="float32"))


def adapted() -> Captioner:
    captioner = load(RUN / "base")
    adapters.load(captioner, "captioner", RUN / "sft" / "adapter")
    soft_prompt.load(captioner, RUN / "sft" / "adapter")
    return captioner


def captions(captioner: Captioner) -> list[str]:
    engine = HFEngine(captioner, ViewsOverride(), EngineConfig(max_num_seqs=4))
    requests = [CaptionRequest(str(i), picture, f"{i:064x}") for i, picture in enumerate(PICTURES)]
    greedy = SamplingConfig(temperature=0.0, max_tokens=48)
    return [row[0].text for row in engine.sample(requests, 1, greedy)]


def p_yes(verifier: Captioner) -> list[list[float]]:
    engine = HFEngine(verifier, ViewsOverride(), EngineConfig(max_num_seqs=4))
    batches = [QuestionBatch(picture, EXPECTED["questions"]) for picture in PICTURES]
    return [[answer.p_yes for answer in row] for row in engine.p_yes(batches)]


def test_captioner() -> None:
    assert captions(load(RUN / "sft" / "captioner")) == EXPECTED["captions"]


def test_adapter_and_soft_prompt_on_their_base() -> None:
    assert captions(adapted()) == EXPECTED["captions"]


def test_exported_anew(tmp_path: Path) -> None:
    fuse.export(adapted(), tmp_path / "captioner")
    assert captions(load(tmp_path / "captioner")) == EXPECTED["captions"]


def test_verifier() -> None:
    expected = [pytest.approx(row, abs=1e-4) for row in EXPECTED["p_yes"]]
    assert p_yes(load(RUN / "round-1" / "qa" / "captioner")) == expected
    verifier = load(RUN / "sft" / "captioner")
    adapters.load(verifier, "qa", RUN / "round-1" / "qa" / "adapter")
    assert p_yes(verifier) == expected
    assert Calibration.read(RUN / "round-1" / "qa" / "calibration.json").temperature > 0
