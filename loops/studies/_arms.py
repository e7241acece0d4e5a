"""What the studies share: train a captioner, caption scenes and score them, remember what is done."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.config import Config, SamplingConfig
from captioner.files import atomic_write_json
from captioner.judges import facts, metrics
from captioner.judges.metrics import Counts
from captioner.pipeline import stages
from captioner.records import CaptionRow
from captioner.runs import Run, Shards
from captioner.sources import resolve
from captioner.sources.folder import ImageRow, read_folder
from captioner.statements import loops
from loops import evaluate, sft

if TYPE_CHECKING:
    from captioner.engines import Engine
    from captioner.models.model import Captioner

Metrics = dict[str, float]


def remembered(work: Path, arm: str, compute: Callable[[Path], Metrics]) -> Metrics:
    """The metrics of an arm; a killed study finds those it had. ``compute`` gets a directory of its own."""
    home = work / re.sub(r"\W+", "-", arm)
    done = home / "metrics.json"
    if done.is_file():
        found: Metrics = json.loads(done.read_text(encoding="utf-8"))
        return found
    home.mkdir(exist_ok=True)
    found = {name: value for name, value in compute(home).items() if value == value}  # NaN: undefined
    atomic_write_json(done, found)
    return found


def images(config: Config, work: Path, source: str) -> list[ImageRow]:
    """The images of ``source``, drawn with the config's seed."""
    return read_folder(resolve(source, Run.open(work / "run", config)))


def train(config: Config, work: Path, home: Path) -> Captioner:
    """The captioner that ``config.sft`` makes, in memory: what cannot be exported can be measured."""
    from captioner.fit import fit, trainers

    section = config.sft
    rows = [row for source in section.data for row in images(config, work, source)]
    start = fit.Start(config)
    training = start.seeded(section.training)
    renderer = fit.prepare(start, section.tuning, training.seed, section.soft_prompt)
    fit.train(renderer, sft.training_images(rows, section), trainers.CrossEntropy(), training, home)
    return renderer.captioner


def caption(config: Config, engine: Engine, rows: Sequence[ImageRow], prose: bool = False) -> list[Counts]:
    """The counts of greedy captions of scenes."""
    greedy = SamplingConfig(temperature=0.0, max_tokens=config.evaluate.max_tokens)
    with stages.images(engine.renderer.spec, config, len(rows)) as pictures:
        shown = stages.prepared(rows, pictures)
        said = [candidate for _, [candidate] in stages.caption_images(engine, shown, 1, greedy)]
    known = [facts.read(row.facts) for row in rows]
    return [
        metrics.count(row.key, c.text, each, finish_reason=c.finish_reason, tokens=c.tokens, prose=prose)
        for row, each, c in zip(rows, known, said, strict=True)
    ]


def share(counts: Sequence[Counts], grouping: str, group: str) -> float:
    """One of ``metrics.breakdown``, NaN where there is nothing of the group."""
    groups = metrics.breakdown(counts, resamples=1).get(grouping, {})
    return groups[group].value if group in groups else float("nan")


def scores(run: Run, name: str, checkpoint: Path) -> Metrics:
    """Every metric of a checkpoint on ``evaluate.data``, with the shares of its captions that are different
    from all others (``unique``) and that go round in circles (``looping``)."""
    entries = [evaluate.Entry(name, checkpoint)]
    [one] = evaluate.score(run, entries, run.config.evaluate.data).summary["captioners"]
    found = {"f1": 0.0, "repeated": 0.0}  # of one that says nothing both are undefined
    found |= {key: x["value"] for key, x in one["metrics"].items() if x["value"] is not None}
    said = [row.caption or "" for row in Shards(run.path / one["captions"], CaptionRow).read_all()]
    unique, looping = len(set(said)) / len(said), sum(map(loops, said)) / len(said)
    return found | {"unique": unique, "looping": looping}
