"""captioner qa --round N: train the verifier of a round and measure it on held-out images.

A fresh adapter in the language model only, on the frozen current captioner, learns yes/no questions. Writes
round-N/qa/adapter, round-N/qa/captioner (the verifier, a stock checkpoint) and round-N/qa/accuracy.json.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Column, Table

from captioner import qa
from captioner.config import AdapterTuning, Config
from captioner.errors import DataError
from captioner.formats import resolve
from captioner.formats.folder import ImageRow, read_folder
from captioner.runs import Run, atomic_write_json, console, progress
from captioner.views import load_image

if TYPE_CHECKING:
    from PIL import Image

    from captioner.engines import Engine
    from captioner.train import Target, TrainingImages

GRAY = (128, 128, 128)  # what the blind baseline sees


def run(config: Config, args: argparse.Namespace) -> int:
    """The qa stage of a round."""
    run = Run.open(args.run_dir, config, create=False)
    start = run.current_captioner(args.round)
    data = resolve(config.qa.data, run)
    section = {"qa": config.qa, "views": config.views, "dtype": config.model.dtype}
    stage = run.stage(f"round-{args.round}/qa", section, {"captioner": start, "data": data}, redo=args.redo)
    if stage.done:
        print(f"qa was done before: {stage.dir}")
        return 0
    rows = [row for row in read_folder(data) if any(map(qa.is_yes_no, row.questions or []))]
    if not rows:
        mend = "give the folder's metadata a column questions with yes/no answers"
        raise DataError("no image has yes/no questions", where=str(data), mend=mend)
    learned, held = qa.split(
        [row.key for row in rows], config.qa.holdout, config.seed + config.qa.training.seed
    )
    verifier = stage.dir / "captioner"
    metrics = (
        {} if verifier.is_dir() else train_verifier(config, start, [rows[i] for i in learned], stage.dir)
    )
    accuracies = measure(config, verifier, [rows[i] for i in held])
    atomic_write_json(
        stage.dir / "accuracy.json", {name: asdict(scores) for name, scores in accuracies.items()}
    )
    shutil.rmtree(stage.dir / "checkpoints", ignore_errors=True)
    overall = accuracies["all"]
    counts = {"images": len(learned), "held_out_images": len(held), "held_out_questions": overall.count}
    stage.finish(
        counts, {**metrics, "accuracy": overall.accuracy, "blind_accuracy": accuracies["blind"].accuracy}
    )
    print_table(accuracies)
    print(
        f"round {args.round}: verifier trained on {len(learned)} images, accuracy {overall.accuracy:.3f} "
        f"(blind {accuracies['blind'].accuracy:.3f}) on {overall.count} questions of {len(held)} others: "
        f"{stage.dir}"
    )
    return 0


def train_verifier(config: Config, start: Path, rows: Sequence[ImageRow], out: Path) -> dict[str, float]:
    """Train the adapter; publish ``out/adapter`` and ``out/captioner``. The encoder stays as it is."""
    from captioner import adapters, fuse, model, render, train

    captioner = model.load(config.model.model_copy(update={"path": str(start)}))
    seed = config.seed + config.qa.training.seed
    tuning = AdapterTuning(vision_width=0, language_width=config.qa.language_width)
    train.tune(captioner, tuning, None, seed)
    training = config.qa.training.model_copy(update={"seed": seed})
    renderer = render.Renderer(captioner, config.views)
    captioner.views = renderer.config
    images = training_images(rows, config.qa.questions_per_image)
    metrics = train.train_sft(captioner, renderer, images, training, out)
    adapters.save(captioner, train.ADAPTER, out / "adapter")
    fuse.export(captioner, out / "captioner", train.ADAPTER)
    return metrics


def training_images(rows: Sequence[ImageRow], questions_per_image: int) -> TrainingImages:
    """Balanced yes/no questions of every image, drawn anew each time it is seen."""
    from captioner.train import Target, TrainingImages

    def draw(index: int, rng: random.Random) -> list[Target]:
        drawn = qa.draw_balanced(rows[index].questions or [], questions_per_image, rng)
        return [Target(qa.question_text(question), question["answer"]) for question in drawn]

    return TrainingImages([row.key for row in rows], [row.path for row in rows], draw)


def measure(config: Config, verifier: Path, rows: Sequence[ImageRow]) -> dict[str, qa.Accuracy]:
    """Accuracy of the exported verifier on all yes/no questions of ``rows``; ``blind`` sees a gray image."""
    from captioner import model
    from captioner.engines.hf import HFEngine

    captioner = model.load(config.model.model_copy(update={"path": str(verifier)}))
    engine = HFEngine(captioner, config.views, config.engine)
    answers = ask(engine, rows, blind=False)
    blind = ask(engine, rows, blind=True)
    engine.close()
    return qa.accuracy_table(answers) | {"blind": qa.accuracy(blind)}


def ask(engine: Engine, rows: Sequence[ImageRow], *, blind: bool) -> list[qa.Answer]:
    """The verifier's answers to all yes/no questions of the rows."""
    from captioner.engines import QuestionBatch

    asked = [[question for question in row.questions or [] if qa.is_yes_no(question)] for row in rows]
    batches = (
        QuestionBatch(_image(row, blind), [qa.question_text(question) for question in questions])
        for row, questions in zip(rows, asked, strict=True)
    )
    answers = []
    with progress("blind" if blind else "held-out questions", len(rows)) as bar:
        for questions, replies in zip(asked, engine.p_yes(batches), strict=True):
            bar.advance()
            for q, reply in zip(questions, replies, strict=True):
                answers.append(qa.Answer(q["kind"], q["stratum"], q["answer"], reply.p_yes, reply.label_mass))
    return answers


def _image(row: ImageRow, blind: bool) -> Image.Image:
    image = load_image(row.path)[0]
    if blind:
        image.paste(GRAY, (0, 0, *image.size))
    return image


def print_table(accuracies: dict[str, qa.Accuracy]) -> None:
    table = Table(Column("held out", no_wrap=True))
    for title in ("questions", "accuracy", "precision", "recall", "yes ratio", "calib. error"):
        table.add_column(title, justify="right")
    for name, a in accuracies.items():
        scores = (a.accuracy, a.precision, a.recall, a.yes_ratio, a.calibration_error)
        table.add_row(name, str(a.count), *("-" if score is None else f"{score:.3f}" for score in scores))
    console().print(table)
