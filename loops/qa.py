"""captioner qa --round N [--gpus N]: train the verifier of a round and measure it on held-out images.

What ``qa.tuning`` says, on the current captioner, learns yes/no questions: by default a fresh adapter in the
language model only, because so narrow a set would spoil the encoder. Writes
round-N/qa/adapter, round-N/qa/captioner (the verifier, a stock checkpoint), round-N/qa/accuracy.json and
round-N/qa/calibration.json (temperature and abstain band, fitted on the held-out questions).
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.config import Config, QAConfig
from captioner.files import atomic_write_json
from captioner.fit import distributed
from captioner.fit.examples import Target, TrainingImages
from captioner.fit.rows import usable
from captioner.judges import asking
from captioner.method import qa as method
from captioner.method import reask
from captioner.pipeline import stages
from captioner.processes import is_main
from captioner.runs import Run, RunDir, Stage, checkpoint_path
from captioner.sources.folder import ImageRow
from loops.stages import StagePlan, begin

if TYPE_CHECKING:
    pass


def plan(run: Run, round: int) -> list[StagePlan]:
    """What the stage reads, is made with and writes."""
    config = run.config
    inputs: dict[str, Path | str] = {"captioner": run.current_captioner(round), "data": config.qa.data}
    return [StagePlan(f"round-{round}/qa", inputs, _section(config))]


def _section(config: Config) -> dict[str, Any]:
    section: dict[str, Any] = {"qa": config.qa, "views": config.views, "dtype": config.model.dtype}
    return section | ({"half": True} if asking.trained(config) else {})


def qa(run: RunDir, config: Config, round: int = 1, *, redo: bool = False, gpus: int = 1) -> Path:
    """Train and measure the verifier of a round; returns its stage, with the checkpoint in ``captioner/``.

    Args:
        run: Run directory with a captioner.
        config: Settings; `model`, `views`, `engine` and `qa` are read.
        round: Number of the round, from 1.
        redo: Remove the results of this stage and make them anew.
        gpus: Processes to start, one per GPU.
    """
    if distributed.wanted(gpus):
        distributed.launch("qa", run, config, gpus, round=round, redo=redo)
        return Run.open(run, config).stage_dir(f"round-{round}/qa")
    with distributed.main_first(config.model.device):
        run = Run.open(run, config, create=False)
        [planned] = plan(run, round)
        stage = begin(run, planned, redo)
    if stage.done:
        print(f"qa was done before: {stage.dir}")
        return stage.dir
    _make(config, stage, f"round {round}")
    return stage.dir


def plan_judge(run: Run) -> list[StagePlan]:
    """The same of the verifier that judges at the gates, where the run trains one."""
    config = run.config
    inputs: dict[str, Path | str] = {
        "captioner": checkpoint_path(config.model.path),
        "data": config.qa.data,
    }
    return [StagePlan(asking.HOME, inputs, _section(config))] if asking.trained(config) else []


def judge(run: Run) -> None:
    """Train the verifier that judges at the gates of this run, once: from the base, on the half of the QA
    images that no round's verifier sees. Nothing where something else tells."""
    for planned in plan_judge(run):
        stage = begin(run, planned)
        if not stage.done:
            _make(run.config, stage, "the judge")


def _make(config: Config, stage: Stage, what: str) -> None:
    """Train the verifier, measure it and finish the stage."""
    start, data = stage.inputs["captioner"], stage.inputs["data"]
    seed = config.seed + config.qa.training.seed
    rows, read = method.read_rows(data, config.max_failed, seed)
    rows = usable(rows, lambda row: None, stage.dir, config, [])
    rows = share_of(config, rows, judge=stage.name == asking.HOME)
    learned, held = method.split([row.key for row in rows], config.qa.holdout, seed)
    verifier = stage.dir / "captioner"
    metrics = {}
    if not verifier.is_dir():
        metrics = train_verifier(config, start, [rows[i] for i in learned], stage.dir)
    if not is_main():
        return
    accuracies, calibration, again = measure(config, verifier, [rows[i] for i in held])
    atomic_write_json(stage.dir / "calibration.json", calibration.model_dump())
    atomic_write_json(stage.dir / method.HELD_OUT, [rows[i].key for i in held])
    atomic_write_json(
        stage.dir / "accuracy.json", {name: asdict(scores) for name, scores in accuracies.items()}
    )
    shutil.rmtree(stage.dir / "checkpoints", ignore_errors=True)
    overall = accuracies["all"]
    counts = {"images": len(learned), "held_out_images": len(held), "held_out_questions": overall.count}
    scores = {"accuracy": overall.accuracy, "blind_accuracy": overall.blind, **calibration.model_dump()}
    stage.finish({**counts, **read}, {**metrics, **scores}, asked_again=again)
    method.print_table(accuracies)
    print(
        f"temperature {calibration.temperature:.2f}; keep from {calibration.keep:.2f}, drop below "
        f"{calibration.drop:.2f}, so that {config.qa.band_accuracy:.0%} are right on either side"
    )
    for way, one in again.items():
        told = f"decides {one['decided']} of {one['asked']} undecided, {one['right']:.0%} rightly"
        print(f"asking again by {way} {told}: {'used' if way in calibration.reask else 'not used'}")
    print(
        f"{what}: verifier trained on {len(learned)} images, accuracy {overall.accuracy:.3f} "
        f"(blind {overall.blind:.3f}) on {overall.count} questions of {len(held)} others: "
        f"{stage.dir}"
    )


def share_of(config: Config, rows: Sequence[ImageRow], *, judge: bool) -> list[ImageRow]:
    """The images that a round's verifier, or the judge of the gate, may learn from: no image serves both."""
    if not asking.trained(config):
        return list(rows)
    halves = method.split([row.key for row in rows], 0.5, config.seed)
    return [rows[index] for index in halves[judge]]


def train_verifier(config: Config, start: Path, rows: Sequence[ImageRow], out: Path) -> dict[str, float]:
    """Train the checkpoint ``start`` on questions; publishes ``out/adapter`` and ``out/captioner``."""
    from captioner.fit import fit, trainers

    qa, images = config.qa, training_images(rows, config.qa)
    return fit.fit(fit.Start(config, start), qa.tuning, images, trainers.CrossEntropy(), qa.training, out)


def training_images(rows: Sequence[ImageRow], config: QAConfig) -> TrainingImages:
    """Yes/no questions of every image, drawn anew each time it is seen.

    Balanced within the image where it has such pairs, over all images where it has not.
    """
    spare = method.balance([row.questions or [] for row in rows], config.training.seed)

    def draw(index: int, rng: random.Random) -> list[Target]:
        asked, count = rows[index].questions or [], config.questions_per_image
        drawn = method.draw_balanced(asked, count, rng) or rng.sample(
            spare[index], min(count, len(spare[index]))
        )
        return [Target(method.question_text(question), question["answer"]) for question in drawn]

    return TrainingImages([row.key for row in rows], [row.path for row in rows], draw)


def measure(
    config: Config, verifier: Path, rows: Sequence[ImageRow]
) -> tuple[dict[str, method.Accuracy], method.Calibration, dict[str, dict[str, float]]]:
    """Scores of the exported verifier on all yes/no questions of ``rows``, and its calibration.

    Probabilities are calibrated by temperatures that have not seen them; ``uncalibrated`` are the raw ones,
    ``blind`` those for a gray image. Last, what asking undecided questions again is good for.
    """
    from captioner.engines.hf import HFEngine
    from captioner.models import model

    captioner = model.load(config.model.model_copy(update={"path": str(verifier)}))
    engine = HFEngine(captioner, config.views, config.engine)
    with stages.images(engine.renderer.spec, config, len(rows)) as pictures:
        raw, blind = reask.known(engine, rows, pictures, blind=True)
        calibration = method.calibrate(raw, config.qa.band_accuracy)
        answers = method.scaled(raw, calibration.temperature)
        plan = reask.square_plan(verifier, config.views)
        again = reask.decided_again(engine, rows, pictures, answers, plan, calibration)
    engine.close()
    helpful = [
        way
        for way, one in again.items()
        if one["decided"] >= method.ENOUGH and one["right"] >= config.qa.band_accuracy
    ]
    keys = [row.key for row in rows for question in row.questions or [] if method.is_yes_no(question)]
    table = method.accuracy_table(method.cross_fitted(raw, keys), blind)
    table |= {"uncalibrated": method.accuracy(raw), "blind": method.accuracy(blind)}
    return table, calibration.model_copy(update={"reask": tuple(helpful)}), again
