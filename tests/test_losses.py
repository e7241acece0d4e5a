"""Ten steps of every training reproduce the stored losses: refactors and libraries do not move them.

losses/*.txt were written by version 0.1 (commit 4c542e4, transformers 4.57.6) from fixtures/run-0.1/base, its
images and words, and adapters whose initial weights are drawn here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from captioner.config import (
    AdapterTuning,
    AlarmsConfig,
    DPOConfig,
    ModelConfig,
    QAConfig,
    SFTConfig,
    SoftPromptConfig,
    TrainingConfig,
    ViewsConfig,
)
from captioner.fit import fit, trainers
from captioner.fit.examples import PairedImages
from captioner.models import adapters, model, render
from captioner.models.model import Captioner
from captioner.records import Pair
from captioner.sources.folder import ImageRow
from captioner.views import load_image
from loops import qa, sft

LOSSES, RUN = Path(__file__).parent / "losses", Path(__file__).parent / "fixtures" / "run-0.1"
WORDS = json.loads((RUN / "expected.json").read_text())
IMAGES = sorted((RUN / "images").iterdir())
TRAINING = TrainingConfig(
    max_steps=10, per_device_train_batch_size=2, learning_rate=3e-3, warmup_ratio=0.2, logging_steps=1, seed=5
)


def rows() -> list[ImageRow]:
    asked = [
        {"question": text, "answer": ("yes", "no")[i % 2], "kind": "shape", "stratum": "random"}
        for i, text in enumerate(WORDS["questions"])
    ]
    captions = WORDS["captions"]
    return [
        ImageRow(key=path.stem, path=path, caption=caption, prose=None, questions=asked, facts=None)
        for path, caption in zip(IMAGES, captions, strict=True)
    ]


def pairs() -> list[Pair]:
    found = []
    for path, caption in zip(IMAGES, WORDS["captions"], strict=True):
        said = caption.split(", ")
        for k, rejected in enumerate((said[:2], [*said, "northwest ring"])):
            own = dict(sample=load_image(path)[1], key=path.stem, k=k, refuted_in_rejected=1)
            found.append(Pair(chosen=", ".join(said[:6]), rejected=", ".join(rejected), **own))
    return found


def start(tuning: AdapterTuning, soft: int) -> Captioner:
    """The frozen base with adapters whose weights do not depend on who draws them in which order."""
    captioner = model.load(ModelConfig(path=str(RUN / "base"), device="cpu", dtype="float32"))
    fit.tune(captioner, tuning, SoftPromptConfig(length=soft) if soft else None, 0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in sorted(adapters._parameters(captioner).items()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return captioner


def compare(name: str, out: Path) -> None:
    """A missing file is written, and the test fails once."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    losses: Sequence[float] = [line["loss"] for line in lines if "loss" in line]
    path = LOSSES / f"{name}.txt"
    if not path.exists():
        path.write_text("".join(f"{loss:.4f}\n" for loss in losses))
        pytest.fail(f"{path} was missing; look at it and commit it")
    assert losses == pytest.approx([float(line) for line in path.read_text().split()], abs=1e-4)


@pytest.mark.slow
def test_sft(tmp_path: Path) -> None:
    captioner = start(AdapterTuning(vision_width=4, language_width=4), soft=4)
    settings = SFTConfig(columns=("shorthand", "questions"), questions_per_image=3, multi_view_share=0.5)
    images = sft.training_images(rows(), settings)
    renderer = render.Renderer(captioner, ViewsConfig())
    fit.train(renderer, images, trainers.CrossEntropy(), TRAINING, tmp_path)
    compare("sft", tmp_path)


@pytest.mark.slow
def test_qa(tmp_path: Path) -> None:
    captioner = start(AdapterTuning(vision_width=0, language_width=4), soft=0)
    images = qa.training_images(rows(), QAConfig(questions_per_image=4))
    renderer = render.Renderer(captioner, ViewsConfig())
    fit.train(renderer, images, trainers.CrossEntropy(), TRAINING, tmp_path)
    compare("qa", tmp_path)


@pytest.mark.slow
def test_dpo(tmp_path: Path) -> None:
    captioner = start(AdapterTuning(vision_width=4, language_width=4), soft=0)
    dpo = DPOConfig(beta=0.3, ce_weight=0.7, alarms=AlarmsConfig(every=0, chosen_below=0))
    paths = {path.stem: path for path in IMAGES}
    renderer = render.Renderer(captioner, ViewsConfig())
    fit.train(renderer, PairedImages(pairs(), paths), trainers.Preference(dpo), TRAINING, tmp_path)
    compare("dpo", tmp_path)
