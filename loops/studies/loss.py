"""Which preference loss keeps a captioner whole, and is a short SFT on golden captions needed first?

One round per seed: SFT captioner, verifier, samples, golden captions and pairs are made once, and every arm
trains on those pairs from the same start. *Collapsed* is the share of seeds in which what the captioner
writes sets off the alarms' rules (`dpo.alarms`; they are measured here and stop nothing) or recall halves.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captioner import alarms
from captioner.config import Config
from captioner.formats.folder import read_folder
from captioner.records import CaptionRow, Golden, Pair
from captioner.runs import Run, Shards, remove_dir
from loops import dpo, evaluate, golden, qa, sft
from loops.iterate import arguments

COLUMNS = {
    "collapsed": "collapsed",
    "precision": "precision",
    "recall": "recall",
    "ended": "ended",
    "repeated": "repeated",
    "tokens": "tokens",
    "chosen": "log p(chosen) − reference",
    "rejected": "log p(rejected) − reference",
}
PAIRED = "golden SFT alone"
OWN = "golden SFT on two own samples, too"
NONE = "no golden SFT"
START = "SFT captioner"
_CE: dict[str, Any] = {"ce_weight": 1.0}
_PLAIN: dict[str, Any] = {"ce_weight": 0.0}
# arm -> what it starts from, and the changes to the dpo section
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPO, no golden SFT": (NONE, _PLAIN),
    "DPO + CE, no golden SFT": (NONE, _CE),
    "DPO + CE + anchor, no golden SFT": (NONE, _CE | {"anchor_weight": 1.0}),
    "DPO": (PAIRED, _PLAIN),
    "hinge": (PAIRED, _PLAIN | {"loss": ("hinge",)}),
    "IPO": (PAIRED, _PLAIN | {"loss": ("ipo",)}),
    "KTO": (PAIRED, _PLAIN | {"loss": ("kto",)}),
    "DPO + CE": (PAIRED, _CE),
    "DPO + CE after own samples, too": (OWN, _CE),
    "DPO + CE + anchor": (PAIRED, _CE | {"anchor_weight": 1.0}),
    "DPO + CE, refuted tokens × 3": (PAIRED, _CE | {"refuted_weight": 3.0}),
    "DPO + CE, confirmed tokens × 0.3": (PAIRED, _CE | {"confirmed_weight": 0.3}),
    "DPO + CE + image term": (PAIRED, _CE | {"image_weight": 1.0}),
    "DPO + CE, length margin 0.01": (PAIRED, _CE | {"length_margin": 0.01}),
    "DPO + CE, β 0.03": (PAIRED, _CE | {"beta": 0.03}),
    "DPO + CE, β 0.3": (PAIRED, _CE | {"beta": 0.3}),
    "DPO + CE, CE × 0.1": (PAIRED, {"ce_weight": 0.1}),
    "DPO + CE, CE × 3": (PAIRED, {"ce_weight": 3.0}),
}


def measure(config: Config, work: Path) -> Iterator[tuple[str, dict[str, float]]]:
    args = Namespace(run_dir=work / "run", redo=False)
    for step in (sft, qa, golden):
        step.run(config, arguments(step, args, round=1))
    run = Run.open(work / "run", config, create=False)
    home, start = run.stage_dir("round-1"), run.captioner_dir(0)
    images = evaluate.round_images(home)
    assert images is not None
    paths = {row.key: row.path for row in read_folder(images, captions=False)}
    pairs, _ = dpo.linted(run, Shards(home / "pairs", Pair).read_all(), start)
    verdicts = dpo.verdicts(home / "claims")
    captions = Shards(home / "golden", Golden).read_all()
    first, base = _score(run, START, start, {})
    yield START, first
    starts = {NONE: start}
    for name, samples in ((PAIRED, 0), (OWN, 2)):
        starts[name] = work / name.replace(" ", "-")
        learned = config.dpo.model_copy(update={"golden_sft_samples": samples})
        if not starts[name].is_dir():
            settings = config.model_copy(update={"dpo": learned})
            dpo.golden_sft(settings, start, captions, pairs, paths, work / "golden-sft", starts[name])
            remove_dir(work / "golden-sft")  # its checkpoints would be gone on from
        yield name, _score(run, name, starts[name], base)[0]
    for arm, (begin, changes) in ARMS.items():
        out = work / "arm"
        silent = {"alarms": config.dpo.alarms.model_copy(update={"every": 0, "chosen_below": 0})}
        settings = config.model_copy(update={"dpo": config.dpo.model_copy(update=silent | changes)})
        remove_dir(out)
        out.mkdir()
        trained = dpo.prefer(settings, starts[begin], pairs, paths, out, out / "captioner", None, verdicts)
        moved = {name: trained[f"rewards/{name}"] / settings.dpo.beta for name in ("chosen", "rejected")}
        yield arm, _score(run, arm, out / "captioner", base)[0] | moved


def _score(
    run: Run, name: str, checkpoint: Path, base: dict[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Scores on the test images, and what the captions are like; ``base`` is the latter of the start."""
    entry = evaluate.Entry(name, checkpoint)
    summary, _ = evaluate.evaluate(run, [entry], run.config.evaluate.data)
    [one] = summary["captioners"]
    scores = {key: x["value"] for key, x in one["metrics"].items() if x["value"] is not None}
    rows = Shards(run.path / one["captions"], CaptionRow).read_all()
    like = {key: scores[key] for key in ("ended", "repeated", "tokens")}
    like |= {"recall": scores["recall"], "unique": len({row.caption for row in rows}) / len(rows)}
    if base:
        wrong = alarms.changed(base, like, run.config.dpo.alarms)
        scores["collapsed"] = float(bool(wrong) or like["recall"] < base["recall"] / 2)
    return {key: scores[key] for key in COLUMNS if key in scores}, like
