"""captioner evaluate [--round N | --captions FILE ... | --questions DATA]: scores of captioners.

Greedy captions of held-out images by the base, the SFT captioner and that of every finished round, in one
table, with intervals. ``--round N`` compares round N with the captioner it started from, on the gate's
images. Captions are stored under the hash of what they were made with, so a captioner never runs twice on the
same images.
``--captions FILE``, once for each captioner, compares captions that are there, ours or another tool's, in any
supported format; with ``--images DATA`` a judge tells what is true of them. ``--against NAME=PATH`` scores
captions by a benchmark's annotations, see docs/evaluation.md.
``--questions DATA`` asks yes/no questions instead and prints how many are answered rightly, by kind.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from captioner import prompts
from captioner.config import Config, SamplingConfig
from captioner.engines import Engine
from captioner.errors import CheckpointError, ConfigError, DataError, Refused, RunError
from captioner.files import atomic_write_json, hash_path
from captioner.judges import metrics, sets
from captioner.judges.appoint import Pool, appoint
from captioner.judges.base import Comparison, Judge, NoJudge, Said
from captioner.judges.metrics import Counts, Interval
from captioner.judges.verifier import pooled
from captioner.method import qa, reask
from captioner.pipeline import stages
from captioner.pipeline.stages import Output, Prepared
from captioner.records import Candidate, CaptionRow
from captioner.report import sheet
from captioner.report.sheet import NOTHING, Wanted, print_table
from captioner.runs import Run, RunDir, checkpoint_path, input_of
from captioner.sources import questions, resolve
from captioner.sources.folder import ImageRow, read_folder
from loops.stages import StagePlan, opened

EXAMPLES = 12  # images of a round that are captioned for the report
SHARD_ROWS = 64  # images between two published shards
COMPARED = "comparison.json"  # what --captions found
UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Entry:
    """One captioner to evaluate; ``prose`` tells that it is asked for prose, as the base before SFT."""

    name: str
    checkpoint: Path
    prose: bool = False


def plan(
    run: Run,
    round: int | None = None,
    checkpoint: Sequence[Path] = (),
    questions: str | None = None,
    captions: Sequence[str] = (),
    images: str | None = None,
    against: Sequence[str] = (),
) -> list[StagePlan]:
    """What is read and written."""
    inputs: dict[str, Path | str] = {path.name: path for path in checkpoint} if captions else {}
    inputs |= {f"captions {number}": source for number, source in enumerate(captions, 1)}
    inputs |= sheet.parse(against)
    if captions:
        inputs |= {"images": images} if images else {}
        return [StagePlan("", inputs, outputs=[run.path / COMPARED])]
    entries, source, where = _what(run, round, checkpoint)
    inputs |= {entry.name: entry.checkpoint for entry in entries}
    inputs |= {"questions": questions} if questions else {"images": source}
    return [StagePlan("", inputs, outputs=[where / ("questions.json" if questions else "evaluation.json")])]


def _what(run: Run, round: int | None, checkpoints: Sequence[Path]) -> tuple[list[Entry], str, Path]:
    """The captioners, the images, and where evaluation.json goes."""
    if round is None:
        extra = [Entry(path.name, _existing(path)) for path in map(Path, checkpoints)]
        return [*run_entries(run, run.config), *extra], run.config.evaluate.data, run.path
    if round < 1 or checkpoints:
        raise ConfigError("--round takes a whole number from 1, and no --checkpoint beside it")
    return round_entries(run, round), run.config.gate.data, run.path / f"round-{round}"


def evaluate(
    run: RunDir,
    config: Config,
    round: int | None = None,
    *,
    checkpoint: Sequence[Path] = (),
    captions: Sequence[str] = (),
    images: str | None = None,
    against: Sequence[str] = (),
    prefer: bool = False,
    questions: str | None = None,
    redo: bool = False,
) -> Path:
    """Score captioners, print the table and write it; returns the file.

    Args:
        run: Run directory; made if it does not exist and checkpoints or captions are given.
        config: Settings; `model`, `views`, `engine`, `tool`, `evaluate` and `gate` are read.
        round: Compare this round with its start, on `gate.data`; otherwise the whole run, on `evaluate.data`.
        checkpoint: A captioner to add to the table; may be given several times.
        captions: Captions to compare, in place of the run's captioners: a file, or a folder; may be given
            several times. FILE?file=COLUMN&text=COLUMN names columns.
        images: The images of --captions; without them nobody judges truth.
        against: Score by a benchmark, NAME=PATH of its annotations; may be given several times.
        prefer: Ask the tool LLM, which sees the image, which of two captions is better.
        questions: Ask yes/no questions instead: a folder, a question file, or scenes:SPLIT:COUNT.
        redo: Make the captions anew.

    Raises:
        Refused: more than `max_failed` of the images or questions failed.
    """
    wanted = Wanted(sheet.parse(against), prefer)
    if captions and (round is not None or questions):
        raise ConfigError("--captions goes with neither --round nor --questions", fix="leave one out")
    if round is not None and (against or prefer):
        raise ConfigError("--round goes with neither --against nor --prefer", fix="give --captions")
    with opened(run, config, create=bool(checkpoint or captions)) as run:
        if captions:
            return _compare(run, captions, images, [Entry(p.name, _existing(p)) for p in checkpoint], wanted)
        entries, source, where = _what(run, round, checkpoint)
        if questions:
            ask(run, entries, questions, where / "questions.json")
            return where / "questions.json"
        if round is not None:
            summary = evaluate_round(run, round, redo=redo).summary
        else:
            summary = score(run, entries, source, redo=redo, wanted=wanted).summary
            atomic_write_json(where / "evaluation.json", summary)
    print_table(summary)
    sheet.print_scores(summary["scores"])
    print(
        f"{len(summary['captioners'])} captioners on {summary['images']} images: {where / 'evaluation.json'}"
    )
    return where / "evaluation.json"


def evaluate_round(run: Run, number: int, *, redo: bool = False) -> Scores:
    """Score a round's start and its captioner on the gate's images, and write the round's evaluation.json.

    The first images of the round are captioned by both too, for the report.
    """
    home = run.path / f"round-{number}"
    entries = round_entries(run, number)
    scores = score(run, entries, run.config.gate.data, redo=redo)
    folder = input_of(home / "candidates", "images")
    if folder is not None:
        shown = read_folder(folder, captions=False)[:EXAMPLES]
        made = [caption(run, entry, folder, shown, redo=redo)[0] for entry in entries]
        scores.summary["examples"] = [str(path.relative_to(run.path)) for path in made]
    atomic_write_json(home / "evaluation.json", scores.summary)
    return scores


# ---------------------------------------------------------------- which captioners


def run_entries(run: Run, config: Config) -> list[Entry]:
    """The base, SFT and every round that has a captioner; a round that its gate refused says so."""
    entries = [base_entry(config)]
    if run.captioner_dir(0).is_dir():
        entries.append(Entry("SFT", run.captioner_dir(0)))
    number = 1
    while run.captioner_dir(number).is_dir():
        gate = run.path / f"round-{number}" / "gate.json"
        refused = gate.is_file() and not json.loads(gate.read_text())["promoted"]
        entries.append(
            Entry(f"round {number}" + (" (refused)" if refused else ""), run.captioner_dir(number))
        )
        number += 1
    return entries


def base_entry(config: Config) -> Entry:
    """The base, which is asked for prose."""
    return Entry("base", _existing(checkpoint_path(config.model.path)), prose=True)


def round_entries(run: Run, number: int) -> list[Entry]:
    """The captioner a round started from, and the one it made."""
    made = run.captioner_dir(number)
    if not made.is_dir():
        raise RunError(
            f"round {number} has no captioner yet",
            where=str(made),
            fix=f"captioner iterate --round {number} --run {run.path}",
        )
    return [Entry("start", run.current_captioner(number)), Entry(f"round {number}", made)]


def _existing(path: Path) -> Path:
    if not path.is_dir():
        raise CheckpointError(
            "no such checkpoint directory", where=str(path), fix="name an exported captioner"
        )
    return path


# ---------------------------------------------------------------- yes/no questions


def ask(run: Run, entries: Sequence[Entry], source: str, out: Path) -> None:
    """Print and write how well each captioner, or verifier, answers, by kind and stratum.

    Raises Refused where more than ``max_failed`` of the questions get no answer.
    """
    data = resolve(source, run)
    rows, _ = questions.read_any(data, run.config.max_failed)
    rows = [row for row in rows if any(map(qa.is_yes_no, row.questions or []))]
    if not rows:
        raise DataError("no image has yes/no questions", where=str(data), fix="give --questions others")
    tables = {}
    for entry in entries:
        config = run.config
        with (
            stages.opened(entry.checkpoint, config) as engine,
            stages.images(engine.renderer.spec, config, len(rows)) as pictures,
        ):
            asked, _ = reask.known(engine, rows, pictures)
        answers = [each for each in asked if math.isfinite(each.p_yes)]
        lost = f"{len(asked) - len(answers)} of {len(asked)} questions have no answer by {entry.name}"
        if len(asked) - len(answers) > run.config.max_failed * len(asked):
            raise Refused(lost, where=source, fix="look at the engine's messages; --max-failed allows more")
        table = qa.accuracy_table(answers)
        qa.print_table(table, entry.name)
        tables[entry.name] = {name: asdict(row) for name, row in table.items()}
        print(f"{lost}; accuracy {table['all'].accuracy:.3f}")
    atomic_write_json(out, {"data": source, "accuracy": tables})


# ---------------------------------------------------------------- captions


class Scores(NamedTuple):
    """What an evaluation found: evaluation.json, the counts of each captioner, each step to the next."""

    summary: dict[str, Any]
    counts: list[list[Counts]]
    steps: list[Comparison]


def score(
    run: Run,
    entries: Sequence[Entry],
    source: str,
    *,
    redo: bool = False,
    wanted: Wanted = NOTHING,
) -> Scores:
    """Caption the images with each captioner and have a judge compare them, each with the one before it.

    Raises Refused where more than ``max_failed`` of the images fail.
    """
    folder = resolve(source, run)
    images = read_folder(folder)
    made = [caption(run, entry, folder, images, redo=redo) for entry in entries]
    said = [Said(entry.name, rows, entry.prose) for entry, (_, rows) in zip(entries, made, strict=True)]
    judge = appoint(run, folder, images, said, lambda: _pool(run, entries, folder, images))
    found = _judged(run, judge, said, list(pairwise(said)))
    for about, entry, (where, rows) in zip(found.summary["captioners"], entries, made, strict=True):
        about |= {"checkpoint": str(entry.checkpoint), "captions": str(where.relative_to(run.path))}
        about |= {"failed": sum(row.error is not None for row in rows)}
    files = {row.key: row.path for row in images}
    scores = sheet.score(run.config, said, list(pairwise(said)), files, wanted)
    return found._replace(summary=found.summary | {"data": source, "images": len(images), "scores": scores})


def _judged(run: Run, judge: Judge, said: Sequence[Said], pairs: Sequence[tuple[Said, Said]]) -> Scores:
    """What a judge says of each captioner, and of the change between two."""
    resamples, seed = run.config.evaluate.bootstrap, run.config.seed
    counts = [judge.count(each) for each in said]
    steps = [judge.compare(one, other, resamples=resamples, seed=seed) for one, other in pairs]
    captioners = []
    for side, counted in zip(said, counts, strict=True):
        broken = metrics.breakdown(counted, resamples=resamples, seed=seed)
        about = {
            "name": side.name,
            "metrics": _json(metrics.evaluate(counted, resamples=resamples, seed=seed)),
            "breakdown": {grouping: _json(table) for grouping, table in broken.items()},
        }
        captioners.append(about)
    differences = [
        {"from": one.name, "to": other.name, "metrics": _json(step.difference)}
        for (one, other), step in zip(pairs, steps, strict=True)
    ]
    notes = dict.fromkeys([*judge.notes, *(note for step in steps for note in step.notes)])
    summary = {
        "judge": {"kind": judge.kind, "notes": list(notes)},
        "captioners": captioners,
        "differences": differences,
    }
    return Scores(summary, counts, steps)


def _compare(
    run: Run, sources: Sequence[str], images: str | None, entries: Sequence[Entry], wanted: Wanted
) -> Path:
    """Compare captions that are there, every two of them, and write comparison.json; returns the file."""
    out = run.path / COMPARED
    if wanted.answers:
        summary: dict[str, Any] = {"scores": sheet.score_answers(run.config, sources, wanted)}
    else:
        summary = _compared(run, sources, images, entries, wanted)
        print_table(summary)
    sheet.print_scores(summary["scores"])
    atomic_write_json(out, summary)
    print(f"{len(sources) + len(entries)} captioners compared: {out}")
    return out


def _compared(
    run: Run, sources: Sequence[str], images: str | None, entries: Sequence[Entry], wanted: Wanted
) -> dict[str, Any]:
    said = sets.said(sources)
    rows: list[ImageRow] = []
    if images is None and (entries or wanted.prefer or run.config.evaluate.clip):
        raise ConfigError("the images of the captions are needed", fix="--images DATA")
    if images is not None:
        folder = resolve(images, run)
        rows = read_folder(folder)
        said = [sets.placed(side, folder, rows) for side in said]
        rows = [row for row in rows if any(row.key in side.captions for side in said)]
        said += [Said(entry.name, caption(run, entry, folder, rows)[1], entry.prose) for entry in entries]
    said, notes = sets.alike(said)
    kept = [row for row in rows if row.key in said[0].captions]
    judge: Judge = NoJudge("no images are named, so nobody tells what is true of them (--images DATA)")
    if images is not None:
        judge = appoint(run, folder, kept, said, lambda: pooled(said))
    pairs = list(combinations(said, 2))
    summary = _judged(run, judge, said, pairs).summary
    summary["judge"]["notes"] += notes
    for about, side in zip(summary["captioners"], said, strict=True):
        if all(row.finish_reason is None for row in side.rows):  # another tool does not say how they ended
            about["metrics"] |= dict.fromkeys(("ended", "tokens"), UNKNOWN.to_json())
    about = {"data": images or "no images", "images": len(said[0].captions)}
    files = {row.key: row.path for row in kept}
    return summary | about | {"scores": sheet.score(run.config, said, pairs, files, wanted)}


def _json(intervals: Mapping[str, Interval]) -> dict[str, Any]:
    return {name: interval.to_json() for name, interval in intervals.items()}


def _pool(run: Run, entries: Sequence[Entry], folder: Path, images: Sequence[ImageRow]) -> Pool:
    """The claims that recall is taken over: of samples of the base and of every captioner."""
    base = base_entry(run.config)
    captioners = {hash_path(entry.checkpoint): entry for entry in (base, *entries)}
    count = run.config.gate.judge.samples
    drawn = [
        Said(entry.name, caption(run, entry, folder, images, samples=count)[1], entry.prose)
        for entry in captioners.values()
    ]
    return pooled(drawn)


def caption(
    run: Run,
    entry: Entry,
    folder: Path,
    images: Sequence[ImageRow],
    *,
    redo: bool = False,
    samples: int = 0,
) -> tuple[Path, list[CaptionRow]]:
    """Captions of images of a folder, made once: their directory, and one row per image in order.

    Greedy ones, or so many ``samples`` of each image, which stand together.
    """
    if not images:
        raise DataError("no images to caption", where=str(folder))
    config = run.config
    section = {
        "max_tokens": config.evaluate.max_tokens,
        "views": config.views.model_dump(mode="json"),
        "dtype": config.model.dtype,
        "prompt": prompts.prompt_hash("describe" if entry.prose else "caption"),
        "keys": hashlib.sha256("\n".join(row.key for row in images).encode()).hexdigest(),
    }
    if samples:
        section |= {"samples": samples, "seed": config.seed}
    made_by = hash_path(entry.checkpoint)
    made_of = {**section, "captioner": made_by, "data": hash_path(folder)}
    name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    inputs = {"captioner": entry.checkpoint, "data": folder}
    stage = run.stage(f"evaluation/{name}", section, inputs, redo=redo)
    output = Output(stage.dir, CaptionRow, apart=False)
    if not stage.done:
        _fill(config, entry, images, output, made_by, name, samples)
    rows = output.rows.read_all()
    failed = sum(row.error is not None for row in rows)
    if failed > config.max_failed * len(rows):
        reasons = ", ".join(sorted({row.error for row in rows if row.error})[:3])
        raise Refused(
            f"{failed} of {len(rows)} images failed, max_failed is {config.max_failed:.1%}: {reasons}",
            where=str(stage.dir),
            fix="fix the images, or allow more with --max_failed",
        )
    if not stage.done:
        stage.finish({"images": len(rows), "failed": failed}, captioner_name=entry.name)
    return stage.dir, rows


def _fill(
    config: Config,
    entry: Entry,
    images: Sequence[ImageRow],
    output: Output[CaptionRow],
    model_hash: str,
    name: str,
    samples: int,
) -> None:
    """Write every missing shard."""
    temperature = 1.0 if samples else 0.0
    sampling = SamplingConfig(
        temperature=temperature, max_tokens=config.evaluate.max_tokens, seed=config.seed
    )

    def work(
        engine: Engine, images: Iterable[Prepared[ImageRow]]
    ) -> Iterator[tuple[ImageRow, list[CaptionRow]]]:
        for image, said in stages.caption_images(engine, images, samples or 1, sampling):
            yield image.row, _rows(image, said, samples or 1, model_hash, name)

    prompt = prompts.load("describe") if entry.prose else None
    parts = [images[start : start + SHARD_ROWS] for start in range(0, len(images), SHARD_ROWS)]
    stages.fill(output, f"captions by {entry.name}", parts, entry.checkpoint, config, work, prompt)


def _rows(
    image: Prepared[ImageRow], said: list[Candidate], samples: int, model: str, name: str
) -> list[CaptionRow]:
    """One row per sample of an image."""
    about: dict[str, Any] = {"key": image.row.key, "model": model, "config": name}
    if image.reason:
        about |= {"id": image.sample, "caption": None, "finish_reason": None, "tokens": None}
        return [CaptionRow(error=image.reason, **about)] * samples
    return [
        CaptionRow(id=c.sample, caption=c.text, finish_reason=c.finish_reason, tokens=c.tokens, **about)
        for c in said
    ]
