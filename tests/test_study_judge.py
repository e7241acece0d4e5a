"""The study of the judge, with an engine that knows the scenes and errs at set rates in the model's place."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from captioner.config import Config, ViewsConfig
from captioner.engines import QuestionBatch, YesNo
from captioner.lab import grid
from captioner.views import Cut, ViewSpec, load_image
from loops.studies import judge as study

IMAGES = 8


class Knowing:
    """Says yes to what holds, and to one false statement in ten; the same in all wordings."""

    def __init__(self, facts: dict[bytes, grid.Scene]):
        self.facts, self.renderer = facts, self
        # the one view is the scene as it is drawn
        self.spec = ViewSpec(ViewsConfig(levels=(1,), center=False), size=grid.SIZE_PX, factor=1)

    def p_yes(self, requests: Iterable[QuestionBatch]) -> Iterator[list[YesNo]]:
        for request in requests:
            assert isinstance(request.image, Cut)
            [whole] = request.image.parts.values()
            scene = self.facts[whole.tobytes()]
            yield [YesNo(self.answer(scene, question), 1.0) for question in request.questions]

    def answer(self, scene: grid.Scene, question: str) -> float:
        text = question.removeprefix("Visible: ").removeprefix("Is there ")
        text = text.removesuffix("?").removesuffix(" in the picture")
        known = grid.normalise(text) or text
        mistaken = random.Random(f"{scene} {known}").random() < 0.1
        return 0.95 if grid.execute(known, scene) or mistaken else 0.05

    def close(self) -> None:
        pass


def test_pairs_are_what_they_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {}
    for split, count in (("validation", 2 * IMAGES), ("qa", 12)):
        folder = tmp_path / split
        grid.write(split, count, folder)
        for index in range(count):
            picture = load_image(folder / "images" / f"{index:06d}.png")[0]
            facts[picture.tobytes()] = grid.sample(split, index)
    monkeypatch.setattr("captioner.pipeline.stages.make_engine", lambda *_: Knowing(facts))
    settings = {
        "gate": {"data": f"scenes:validation:{IMAGES}", "max_length_ratio": 3.0},
        "qa": {"data": "scenes:qa:12"},
    }
    worse = (
        "facts dropped, 30 %",
        "two falsehoods more",
        "attributes swapped, 30 %",
        "everything one can say",
    )
    shown = (*worse, "no falsehood", "more facts, no falsehood")
    monkeypatch.setattr(study, "ARMS", {name: study.ARMS[name] for name in shown})
    monkeypatch.setattr(study, "RESAMPLES", 50)
    (tmp_path / "work").mkdir()
    found = dict(study.measure(Config.model_validate(settings), tmp_path / "work"))
    truths = {name.partition(": ")[2]: name.partition(":")[0] for name in found}
    assert [truths[name] for name in shown] == ["worse"] * 4 + ["better"] * 2
    assert (found["all truly worse"]["pairs"], found["all truly better"]["pairs"]) == (4, 2)
    assert found["all truly worse"]["promoted 0.75"] == found["all truly worse"]["promoted checked"] == 0.0
    assert found["better: no falsehood"]["promoted 0.5"] == 1.0
    assert abs(found["better: no falsehood"]["precision_bias"]) < 0.15
