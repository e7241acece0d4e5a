"""Which preference loss keeps a captioner whole, and is a short SFT on golden captions needed first?

One round per seed: SFT captioner, verifier, samples, golden captions and pairs are made once, and every arm
trains on those pairs from the same start. *Collapsed* is the share of seeds in which what the captioner
writes sets off the alarms' rules (`dpo.alarms`, against what the training began with; they are measured here
and stop nothing) or its recall halves; *worse* that in which its F1 lies below the SFT captioner's. The
log-probabilities are nats a caption, of the last batches.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captioner.config import Config
from captioner.files import remove_dir
from captioner.fit import alarms
from captioner.records import Golden, Pair
from captioner.runs import Run, Shards, input_of
from captioner.sources.folder import read_folder
from loops import dpo, golden, qa, sft
from loops.studies._arms import Metrics, remembered, scores

COLUMNS = {
    "collapsed": "collapsed",
    "worse": "worse",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "ended": "ended",
    "repeated": "repeated",
    "tokens": "tokens",
    "chosen": "log p(chosen) − reference",
    "rejected": "log p(rejected) − reference",
}
PAIRED = "golden SFT alone"
OWN = "golden SFT on two own samples, too"
START = "SFT captioner"
STARTS = {PAIRED: 0, OWN: 2}  # own samples of each image
_CE: dict[str, Any] = {"ce_weight": 1.0}
_PLAIN: dict[str, Any] = {"ce_weight": 0.0}
_ANCHOR: dict[str, Any] = {"ce_weight": 1.0, "anchor_weight": 1.0}
# arm -> what it starts from, and the changes to the dpo section; "rate" multiplies the learning rate
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPO, no golden SFT": (START, _PLAIN),
    "DPO + CE, no golden SFT": (START, _CE),
    "DPO + CE + anchor, no golden SFT": (START, _ANCHOR),
    "DPO": (PAIRED, _PLAIN),
    "hinge": (PAIRED, _PLAIN | {"loss_type": ("hinge",)}),
    "IPO": (PAIRED, _PLAIN | {"loss_type": ("ipo",)}),
    "KTO": (PAIRED, _PLAIN | {"loss_type": ("kto",)}),
    "DPO + CE": (PAIRED, _CE),
    "DPO + CE after own samples, too": (OWN, _CE),
    "DPO + CE + anchor": (PAIRED, _ANCHOR),
    "DPO + CE, refuted tokens × 3": (PAIRED, _CE | {"refuted_weight": 3.0}),
    "DPO + CE, confirmed tokens × 0.3": (PAIRED, _CE | {"confirmed_weight": 0.3}),
    "DPO + CE + image term": (PAIRED, _CE | {"image_weight": 1.0}),
    "DPO + CE, length margin 0.01": (PAIRED, _CE | {"length_margin": 0.01}),
    "DPO + CE, β 0.03": (PAIRED, _CE | {"beta": 0.03}),
    "DPO + CE, β 0.3": (PAIRED, _CE | {"beta": 0.3}),
    "DPO + CE, CE × 0.1": (PAIRED, {"ce_weight": 0.1}),
    "DPO + CE, CE × 3": (PAIRED, {"ce_weight": 3.0}),
    "DPO, no golden SFT, rate × 4": (START, _PLAIN | {"rate": 4}),
    "DPO + CE, no golden SFT, rate × 4": (START, _CE | {"rate": 4}),
    "DPO + CE + anchor, no golden SFT, rate × 4": (START, _ANCHOR | {"rate": 4}),
    "DPO, rate × 4": (PAIRED, _PLAIN | {"rate": 4}),
    "DPO + CE, rate × 4": (PAIRED, _CE | {"rate": 4}),
    "DPO + CE + anchor, rate × 4": (PAIRED, _ANCHOR | {"rate": 4}),
}
SCORED_APART = {"refuted_weight", "confirmed_weight", "image_weight"}  # as is KTO: their reference is another


def measure(config: Config, work: Path) -> Iterator[tuple[str, dict[str, float]]]:
    for step in (sft.sft, qa.qa, golden.golden):
        step(work / "run", config)
    run = Run.open(work / "run", config, create=False)
    home, start = run.stage_dir("round-1"), run.captioner_dir(0)
    images = input_of(home / "candidates", "images")
    assert images is not None
    paths = {row.key: row.path for row in read_folder(images, captions=False)}
    pairs, _ = dpo.linted(run, Shards(home / "pairs", Pair).read_all(), start)
    verdicts = dpo.verdicts_of(home)
    captions = Shards(home / "golden", Golden).read_all()
    starts = {START: start}
    bases = {START: scores(run, START, start)}
    yield START, _judged(bases, START, bases[START], config)
    for name, samples in STARTS.items():
        starts[name] = work / f"golden_sft_{samples}"
        settings = _changed(config, {"golden_sft_samples": samples})
        if not starts[name].is_dir():
            dpo.golden_sft(settings, start, captions, pairs, paths, work / "golden-sft", starts[name])
            remove_dir(work / "golden-sft")  # its checkpoints would be gone on from
        bases[name] = scores(run, name, starts[name])
        yield name, _judged(bases, START, bases[name], config)

    for arm, (begin, changes) in ARMS.items():

        def train(
            folder: Path, arm: str = arm, begin: str = begin, changes: dict[str, Any] = changes
        ) -> Metrics:
            settings, out = _changed(config, changes), folder / "dpo"
            remove_dir(out)
            out.mkdir()
            # the log-probabilities under one reference are the same for most losses
            shared = (
                None
                if changes.keys() & SCORED_APART or "kto" in settings.dpo.loss_type
                else work / "reference" / begin
            )
            if shared and (shared / "pairs").is_dir():
                shutil.copytree(shared / "pairs", out / "pairs")
            done = dpo.prefer(settings, starts[begin], pairs, paths, out, out / "captioner", None, verdicts)
            found = scores(run, arm, out / "captioner")
            if shared and not (shared / "pairs").is_dir():
                shutil.copytree(out / "pairs", shared / ".pairs", dirs_exist_ok=True)
                (shared / ".pairs").rename(shared / "pairs")
            remove_dir(out)
            moved = {name: done[f"rewards/{name}"] / settings.dpo.beta for name in ("chosen", "rejected")}
            return _judged(bases, begin, found, config) | moved

        yield arm, remembered(work, arm, train)


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    """The settings of an arm: its changes to the dpo section, and silent alarms."""
    silent: dict[str, Any] = {"alarms": config.dpo.alarms.model_copy(update={"every": 0, "chosen_below": 0})}
    rate = config.dpo.training.learning_rate * changes.get("rate", 1)
    silent |= {"training": config.dpo.training.model_copy(update={"learning_rate": rate})}
    own = {name: value for name, value in changes.items() if name != "rate"}
    return config.model_copy(update={"dpo": config.dpo.model_copy(update=silent | own)})


def _judged(bases: dict[str, Metrics], begin: str, now: Metrics, config: Config) -> Metrics:
    """The metrics of the table, with whether a captioner collapsed; ``bases`` are those of the starts."""
    base = bases[begin]
    wrong = alarms.changed(base, now, config.dpo.alarms)
    verdict = {
        "collapsed": float(bool(wrong) or now["recall"] < base["recall"] / 2),
        "worse": float(now["f1"] < bases[START]["f1"]),
    }
    return {name: value for name, value in now.items() if name in COLUMNS} | verdict
