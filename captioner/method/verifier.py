"""The verifier that a run exports: who answers, how its P(yes) is calibrated, what it is trusted with.

A round leaves it beside the captioners, in ``RUN/verifier``, for everybody who has captions to check: bulk
captioning, ``captioner verify``, and other tools, which find a stock checkpoint and one small JSON file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.special import expit

from captioner.engines import YesNo
from captioner.errors import RunError
from captioner.files import atomic_write_json, hash_path
from captioner.method import qa, verdicts
from captioner.method.tool import Rules
from captioner.method.verdicts import Thresholds
from captioner.records import Claim, Planted
from captioner.runs import Run, Shards
from captioner.statements import normalise, split_statements, without

FOLDER, FILE, CHECKPOINT = "verifier", "verifier.json", "checkpoint"


class Settings(BaseModel):
    """``verifier.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str  # relative to the file
    round: int
    temperature: float = Field(gt=0)
    keep: float = Field(gt=0, lt=1)  # probability that a statement holds from which it is confirmed
    drop: float = Field(gt=0, lt=1)  # ... below which it is refuted
    distrusted: dict[str, str] = {}  # kind -> why it is neither confirmed nor refuted
    cautious: dict[str, str] = {}  # kind -> why it is never confirmed
    tells: dict[str, tuple[float, float]] = {}  # kind -> (bias, slope), see `verdicts.tells`


@dataclass(frozen=True)
class Verifier:
    """What is asked of a verifier, and what its answers are worth. The engine that asks is the caller's."""

    checkpoint: Path
    settings: Settings
    tool: Rules

    @classmethod
    def load(cls, place: Path) -> Verifier:
        """Of a run or an exported captioner, or its ``verifier`` folder. Raises RunError where none is."""
        file = settings_of(place)
        if not file.is_file():
            fix = "captioner golden --round N exports one; or name another run"
            raise RunError("there is no verifier", where=str(place), fix=fix)
        try:
            settings = Settings.model_validate_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, ValidationError) as error:
            fix = "captioner golden --round N writes it anew"
            raise RunError(f"not a verifier's settings: {error}", where=str(file), fix=fix) from error
        checkpoint = (file.parent / settings.checkpoint).resolve()
        if not (checkpoint / "config.json").is_file():
            fix = f"{file} names it: move both together"
            raise RunError("the verifier's checkpoint is not there", where=str(checkpoint), fix=fix)
        return cls(checkpoint, settings, Rules())

    def copy(self, out: Path) -> Path:
        """Put checkpoint and settings into ``out/verifier``, to be moved with what lies there."""
        home = out / FOLDER
        shutil.copytree(self.checkpoint, home / CHECKPOINT)
        settings = self.settings.model_copy(update={"checkpoint": CHECKPOINT})
        atomic_write_json(home / FILE, settings.model_dump(mode="json"))
        return home

    @property
    def thresholds(self) -> Thresholds:
        settings = self.settings
        return Thresholds(settings.keep, settings.drop, settings.distrusted, settings.cautious)

    @cached_property
    def hash(self) -> str:
        return hash_path(self.checkpoint)

    def statements(self, caption: str) -> list[str]:
        """The statements of a caption that looking can decide, each once, in order."""
        said = {normalise(text): text for text in reversed(split_statements(caption))}
        return [text for text in reversed(said.values()) if self.tool.checkable(text)]

    def question(self, statement: str) -> str:
        return self.tool.decompose(statement).text

    def claims(
        self, sample: str, key: str, statements: Sequence[str], answers: Sequence[YesNo]
    ) -> list[Claim]:
        """What one caption states, with calibrated answers, not judged yet. ``answers`` are the engine's."""
        return [
            Claim(
                sample=sample,
                key=key,
                text=text,
                kind=self.tool.kind(text),
                candidates=[0],
                question=self.question(text),
                expected="yes",
                p_yes=qa.scale(answer.p_yes, self.settings.temperature),
                label_mass=answer.label_mass,
                verifier=self.hash,
                view="all",
            )
            for text, answer in zip(statements, answers, strict=True)
        ]

    def judge(self, claims: Sequence[Claim]) -> list[Claim]:
        """The claims of any captions with ``p_true`` and verdicts, each by itself.

        For captions that come one by one. Where all of a set are known, :func:`verdicts.weigh` also takes
        into account how much of it is true.
        """
        weighed = []
        for claim in claims:
            bias, slope = self.settings.tells.get(claim.kind, (0.0, 1.0))
            p_true = float(expit(bias + slope * qa.log_odds([claim.p_yes])[0]))
            known = claim.kind not in self.settings.distrusted
            weighed.append(claim.model_copy(update={"p_true": p_true if known else None}))
        return verdicts.judge(weighed, self.thresholds)


def settings_of(place: Path) -> Path:
    """The settings of the verifier of a run or an exported captioner, or in a ``verifier`` folder."""
    return place / FILE if place.name == FOLDER else place / FOLDER / FILE


def without_refuted(caption: str, refuted: Collection[str]) -> str:
    """The caption without those of its statements, the rest word for word."""
    gone = {normalise(text) for text in refuted}
    return without(caption, gone.__contains__)


def export(run: Run, number: int, verifier: Path, calibration: Path, thresholds: Thresholds) -> None:
    """Write ``RUN/verifier/verifier.json``: from here on this is the verifier of the run."""
    planted = Shards(run.stage_dir(f"round-{number}/planted"), Planted).read_all()
    folder = run.path / FOLDER
    settings = Settings(
        checkpoint=os.path.relpath(verifier, folder),
        round=number,
        temperature=qa.Calibration.read(calibration).temperature,
        keep=thresholds.keep,
        drop=thresholds.drop,
        distrusted=dict(thresholds.distrusted),
        cautious=dict(thresholds.cautious),
        tells=verdicts.tells(planted),
    )
    atomic_write_json(folder / FILE, settings.model_dump(mode="json"))
