"""What a captioner itself claims about scenes, with the truth of each claim: what its verifier must judge."""

from __future__ import annotations

from collections.abc import Sequence

from captioner.config import EngineConfig, SamplingConfig, ViewsConfig
from captioner.engines.base import CaptionRequest
from captioner.engines.hf import HFEngine
from captioner.lab.scenes.judging import stream_of
from captioner.lab.scenes.language import execute, kind_of, parse
from captioner.lab.scenes.pictures import draw
from captioner.lab.scenes.things import Scene, sample
from captioner.models.model import Captioner
from captioner.records import Candidate

Claims = dict[str, list[tuple[str, bool]]]  # kind -> statements and whether they hold
WHOLE, SIX = ViewsConfig(levels=(1,)), ViewsConfig()
BATCH = 256


def captions(
    captioner: Captioner,
    split: str,
    indices: Sequence[int],
    seed: int,
    n: int,
    temperature: float,
    views: ViewsConfig,
) -> list[list[Candidate]]:
    """``n`` captions of each scene, by the product's engine."""
    engine = HFEngine(captioner, views, EngineConfig(max_num_seqs=BATCH))
    requests = (
        CaptionRequest(str(i), draw(sample(split, i, seed), stream_of(split, i, seed)), f"{split} {seed} {i}")
        for i in indices
    )
    return list(engine.sample(requests, n, SamplingConfig(temperature=temperature, seed=seed)))


def claims(scene: Scene, texts: Sequence[str]) -> Claims:
    """The distinct statements of captions about a scene, each with its truth."""
    found: Claims = {}
    for statement in dict.fromkeys(text for caption in texts for text in parse(caption) if text):
        found.setdefault(kind_of(statement), []).append((statement, bool(execute(statement, scene))))
    return found
