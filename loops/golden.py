"""captioner golden --round N [--gpus N] [--rethreshold KEEP]: sample, verify, write golden captions, pairs.

Stages of a round: `candidates` (the captioner samples), `planted` (the verifier is measured on claims whose
answers are known, where something knows them; it may refuse the round), `claims` (the verifier answers one
question per statement), `golden` and `pairs` (derived from the claims, no model). A killed stage continues at
its first missing shard; of several processes each fills its share of the shards. `--rethreshold` makes the
last two stages anew from the claims that are there.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from captioner import laboratory, prompts
from captioner.config import Config
from captioner.engines import make_engine
from captioner.errors import ConfigError, Refused, RunError
from captioner.fit import distributed
from captioner.laboratory import Laboratory
from captioner.method import golden as method
from captioner.method import pairs, planted, qa
from captioner.method.golden import Thresholds
from captioner.method.tool import Rules, Statement, Tool, ToolFailed, make_tool
from captioner.records import Candidate, Claim, Failed, Golden, Pair, Planted, RecordT, Unasked
from captioner.runs import (
    Run,
    RunDir,
    Shards,
    Stage,
    atomic_write_json,
    hash_path,
    is_main,
    progress,
    remove_dir,
    row_seed,
)
from captioner.sources import questions, resolve
from captioner.sources.folder import ImageRow, load_row, read_folder
from captioner.sources.gather import part_of_round
from captioner.views import BadImage, View
from loops.stages import StagePlan, begin, check

if TYPE_CHECKING:
    from PIL import Image

    from captioner.engines import Engine, YesNo

RowT = TypeVar("RowT", Candidate, Claim)
STAGES = ("candidates", "claims", "golden", "pairs")
PLANTED_PER_IMAGE = 24  # planted claims of an image at most
NO_STATEMENT = "no statement in any sample that looking could check"
CHANGED = "changed since it was sampled"
NOT_FINITE = "the verifier gave no number"


@dataclass(frozen=True)
class Plan:
    """What a round of golden captions is made of."""

    number: int
    source: str  # of the images
    captioner: Path
    qa: Path  # the round's QA stage

    @property
    def verifier(self) -> Path:
        return self.qa / "captioner"


class Output(Generic[RecordT]):
    """Shards of a stage's rows beside those of the images it failed on; the rows' file is written last."""

    def __init__(self, folder: Path, record: type[RecordT]):
        self.rows = Shards(folder, record)
        self.failed = Shards(folder / "failed", Failed)

    def write(self, index: int, rows: list[RecordT], failed: list[Failed]) -> None:
        self.failed.write(index, failed)
        self.rows.write(index, rows)


def golden(
    run: RunDir,
    config: Config,
    round: int = 1,
    *,
    redo: bool = False,
    gpus: int = 1,
    rethreshold: float | None = None,
) -> dict[str, int]:
    """Make the golden captions and pairs of a round; returns the counts of the closing line.

    Args:
        run: Run directory with a captioner and the verifier of the round.
        config: Settings; `model`, `views`, `engine`, `tool`, `golden` and `pairs` are read.
        round: Number of the round, from 1.
        redo: Remove the results of these stages and make them anew.
        gpus: Processes to start, one per GPU.
        rethreshold: Derive golden captions and pairs anew with this `golden.keep` (0..1); no model runs.

    Raises:
        RunError: the round cannot start.
        Refused: the verifier is not good enough, or too many images failed.
    """
    keep = rethreshold
    if keep is not None:
        if redo:
            raise ConfigError("--rethreshold keeps what --redo would remove", fix="give one of them")
        drop = config.golden.drop or 0.0
        if not (drop <= keep and 0 < keep < 1):
            raise ConfigError(
                f"--rethreshold {keep} does not lie between golden.drop {drop} and 1",
                fix=f"give both thresholds, as in --rethreshold {keep} --golden.drop {keep}",
            )
        config = config.model_copy(update={"golden": config.golden.model_copy(update={"keep": keep})})
    if distributed.wanted(gpus) and keep is None:
        if config.engine.type != "hf":
            fix = "leave --gpus out, and start a server on every GPU (captioner serve, engine.urls)"
            raise ConfigError(f"--gpus is for the engine hf, not for {config.engine.type}", fix=fix)
        distributed.launch("golden", run, config, gpus, round=round, redo=redo)
        return {}
    run = Run.open(run, config, create=False)
    counts = make_golden(run, plan_round(run, round), config, redo=redo, rethreshold=keep is not None)
    if counts:
        print(f"round {round}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return counts


def plan(run: Run, round: int) -> list[StagePlan]:
    """What the stages of a round read, are made with and write."""
    found = _of_round(run, round)
    stages = [_plan_candidates(run, found), _plan_planted(run, found), _plan_claims(run, found)]
    trust = run.stage_dir(f"round-{round}") / "verifier.json"
    distrusted = json.loads(trust.read_text(encoding="utf-8"))["distrusted"] if trust.is_file() else ()
    stages += [_plan_golden(run, found, distrusted), _plan_pairs(run, found)]
    return [stage for stage in stages if stage]


def plan_round(run: Run, number: int) -> Plan:
    """Raises RunError where the round before is unfinished or this round has no verifier."""
    found = _of_round(run, number)
    check(run, StagePlan(f"round-{number}/golden", {"the verifier": found.qa}))
    return found


def _of_round(run: Run, number: int) -> Plan:
    if number > 1 and not (run.path / f"round-{number - 1}" / "gate.json").is_file():
        raise RunError(
            f"round {number - 1} has not been done",
            where=str(run.path / f"round-{number - 1}"),
            fix=f"captioner iterate --round {number - 1} --run {run.path}",
        )
    source = round_source(run.config.golden.images, number)
    return Plan(number, source, run.current_captioner(number), run.stage_dir(f"round-{number}/qa"))


def round_source(source: str, number: int) -> str:
    """The images of round ``number``: of a laboratory and of a source with a count, it takes its own part."""
    part = laboratory.parse(source)
    return part_of_round(source, number) if part is None else part.next(number - 1)


def make_golden(run: Run, plan: Plan, config: Config, *, redo: bool, rethreshold: bool) -> dict[str, int]:
    """All stages, each from where it stands; returns the counts of the closing line.

    Raises Refused where the verifier is not good enough or too many images failed.
    """
    home = run.stage_dir(f"round-{plan.number}")
    if rethreshold and not (home / "claims" / "stage.json").is_file():
        raise RunError(
            "there are no claims to apply a threshold to",
            where=str(home / "claims"),
            fix=f"captioner golden --round {plan.number} --run {run.path}",
        )
    with distributed.main_first(config.model.device):
        folder = resolve(plan.source, run)
    images = read_folder(folder, captions=False)
    lab = laboratory.of_source(plan.source)
    known = (lab.kind_of, lab.slot_of) if lab else (None, None)
    _candidates(run, plan, config, images, redo)
    thresholds = trusted(run, plan, config, _planted(run, plan, config, folder, images))
    tool = make_tool(config.tool, run.path / "tool", *known)
    try:
        _claims(run, plan, config, images, tool, thresholds)
    finally:
        tool.close()
    if not is_main():
        return {}
    if rethreshold or not (home / "golden" / "stage.json").is_file():
        asked = Shards(home / "planted", Planted).read_all()
        settle(Shards(home / "claims", Claim), config.golden.samples, asked, thresholds)
    _golden(run, plan, config, len(images), thresholds, rethreshold)
    return _pairs(run, plan, config, len(images))


# ---------------------------------------------------------------- the stages that run a model


def _plan_candidates(run: Run, plan: Plan) -> StagePlan:
    config, settings = run.config, run.config.golden
    section = {
        **settings.model_dump(mode="json", include={"samples", "sampling", "shard_rows"}),
        "views": config.views,
        "dtype": config.model.dtype,
        "prompt": prompts.prompt_hash("caption"),
    }
    inputs: dict[str, Path | str] = {"captioner": plan.captioner, "images": plan.source}
    return StagePlan(f"round-{plan.number}/candidates", inputs, section)


def _candidates(run: Run, plan: Plan, config: Config, images: list[ImageRow], redo: bool) -> None:
    settings = config.golden
    with distributed.main_first(config.model.device):
        stage = begin(run, _plan_candidates(run, plan), redo)
        if redo and is_main():  # what derives from the old candidates goes with them
            for name in ("pairs", "golden", "claims", "planted"):
                remove_dir(run.stage_dir(f"round-{plan.number}/{name}"))
    if stage.done:
        return
    output = Output(stage.dir, Candidate)
    sampling = settings.sampling.model_copy(update={"seed": config.seed + settings.sampling.seed})

    def work(
        engine: Engine, part: list[ImageRow], advance: Callable[[], None]
    ) -> tuple[list[Candidate], list[Failed]]:
        from captioner.engines import CaptionRequest

        failed: list[Failed] = []

        def requests() -> Iterator[CaptionRequest]:
            for row, image, sample in _load(part, failed, advance):
                yield CaptionRequest(row.key, image, sample)

        rows: list[Candidate] = []
        for sampled in engine.sample(requests(), settings.samples, sampling):
            error = next((each.error for each in sampled if each.error), None)
            if error:  # of an image with fewer samples than the others no votes can be counted
                failed.append(Failed(sample=sampled[0].sample, key=sampled[0].key, reason=error))
            else:
                rows += method.mark(sampled)
            advance()
        return rows, failed

    parts = _parts(images, settings.shard_rows)
    _fill(output, "sampling", parts, plan.captioner, config, work)
    if not is_main():
        return
    rows = output.rows.read_all()
    counts = {
        "images": len(images),
        "candidates": len(rows),
        "cut": sum(r.finish_reason != "stop" for r in rows),
        "repeating": sum(r.repeats > 0 for r in rows),
        "duplicates": sum(r.duplicate_of is not None for r in rows),
    }
    _finish(stage, run, counts, len(images))


def _plan_planted(run: Run, plan: Plan) -> StagePlan | None:
    """None where nothing judges claims of this round."""
    config, settings = run.config, run.config.golden
    if settings.planted is None and laboratory.of_source(plan.source) is None:
        return None
    section = {
        "planted_images": settings.planted_images,
        "views": config.views,
        "dtype": config.model.dtype,
        "prompt": prompts.prompt_hash("question"),
    }
    inputs = {"verifier": plan.verifier, "calibration": plan.qa / "calibration.json"}
    candidates = run.stage_dir(f"round-{plan.number}/candidates")
    inputs |= {"planted": Path(settings.planted)} if settings.planted else {"candidates": candidates}
    return StagePlan(f"round-{plan.number}/planted", inputs, section)


def _planted(
    run: Run, plan: Plan, config: Config, folder: Path, images: list[ImageRow]
) -> dict[str, dict[str, Any]]:
    """The verifier's accuracy on planted claims, as JSON; empty where nothing judges claims of this round.

    The facts of the images are read here and nowhere else in a round: they measure the verifier.
    """
    settings, home = config.golden, run.stage_dir(f"round-{plan.number}")
    file = Path(settings.planted) if settings.planted else None
    lab = laboratory.of_source(plan.source)
    planned = _plan_planted(run, plan)
    if planned is None:
        return {}
    with distributed.main_first(config.model.device):
        stage = begin(run, planned)
    if not stage.done:
        temperature = qa.Calibration.read(stage.inputs["calibration"]).temperature
        if file is not None:
            rows = questions.read(file, config.max_failed)[0]
        else:
            assert lab is not None
            rows = _known_claims(home, lab, read_folder(folder), config)
        output = Output(stage.dir, Planted)

        def work(
            engine: Engine, part: list[ImageRow], advance: Callable[[], None]
        ) -> tuple[list[Planted], list[Failed]]:
            return _ask_planted(engine, part, temperature, advance)

        _fill(output, "planted claims", [rows], plan.verifier, config, work)
        with distributed.main_first(config.model.device):
            if is_main():
                _planted_accuracy(stage, output, len(rows))
    return _read_table(stage.dir / "accuracy.json")


def _planted_accuracy(stage: Stage, output: Output[Planted], images: int) -> None:
    asked = output.rows.read_all()
    answers = [qa.Answer(r.kind, r.stratum, r.answer, r.p_yes, r.label_mass) for r in asked]
    table = qa.accuracy_table(answers) if answers else {}
    atomic_write_json(stage.dir / "accuracy.json", {name: asdict(row) for name, row in table.items()})
    stage.finish({"images": images, "claims": len(asked)})


def _known_claims(home: Path, lab: Laboratory, known: list[ImageRow], config: Config) -> list[ImageRow]:
    """The first images with claims planted from their own samples."""
    candidates = by_key(Shards(home / "candidates", Candidate).read_all())
    rows = []
    for row in [row for row in known if row.key in candidates and row.facts][: config.golden.planted_images]:
        said = method.select(candidates[row.key], Rules(), config.golden.max_questions).asked
        rng = random.Random(row_seed(config.seed, "planted", row.key))
        claims = planted.plant(lab, [each.text for each in said], row.facts or "", PLANTED_PER_IMAGE, rng)
        rows.append(ImageRow(row.key, row.path, questions=[dict(claim) for claim in claims]))
    return rows


def _ask_planted(
    engine: Engine, part: list[ImageRow], temperature: float, advance: Callable[[], None]
) -> tuple[list[Planted], list[Failed]]:
    from captioner.engines import QuestionBatch

    failed: list[Failed] = []
    asked: list[tuple[ImageRow, str]] = []

    def requests() -> Iterator[QuestionBatch]:
        for row, image, sample in _load(part, failed, advance):
            asked.append((row, sample))
            yield QuestionBatch(image, [qa.question_text(question) for question in row.questions or []])

    rows: list[Planted] = []
    for number, answers in enumerate(engine.p_yes(requests())):
        row, sample = asked[number]
        for question, answer in zip(row.questions or [], answers, strict=True):
            told = {name: question[name] for name in ("kind", "stratum", "answer")}
            text, mass = question["question"], answer.label_mass
            p = qa.scale(answer.p_yes, temperature)
            rows.append(Planted(sample=sample, key=row.key, text=text, p_yes=p, label_mass=mass, **told))
        advance()
    return rows, failed


def trusted(run: Run, plan: Plan, config: Config, table: Mapping[str, Mapping[str, Any]]) -> Thresholds:
    """The thresholds of the round; writes ``verifier.json``: what the verifier may be believed, and why.

    Raises Refused where its accuracy lies below the limit.
    """
    trust = planted.decide(table, _read_table(plan.qa / "accuracy.json"), config.golden)
    decision = run.stage_dir(f"round-{plan.number}") / "verifier.json"
    if is_main():
        atomic_write_json(decision, {**trust.to_json(), "planted": dict(table)})
    if trust.refused:
        raise Refused(
            f"the verifier of round {plan.number} cannot be trusted: {trust.refused}",
            where=str(decision),
            fix="more or better questions or steps (captioner qa --redo); golden.min_accuracy is the limit",
        )
    return Thresholds(config.golden.keep, config.golden.drop, trust.distrusted)


def _read_table(path: Path) -> dict[str, dict[str, Any]]:
    try:
        table: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"no accuracy: {error}", where=str(path), fix="captioner qa --redo") from error
    return table


def _plan_claims(run: Run, plan: Plan) -> StagePlan:
    config, settings = run.config, run.config.golden
    section = {
        "max_questions": settings.max_questions,
        "reask": settings.reask,
        "views": config.views,
        "dtype": config.model.dtype,
        "prompts": [prompts.prompt_hash(wording) for wording in qa.WORDINGS],
        "tool": _made_with(config),
    }
    inputs = {
        "verifier": plan.verifier,
        "calibration": plan.qa / "calibration.json",
        "candidates": run.stage_dir(f"round-{plan.number}/candidates"),
    }
    return StagePlan(f"round-{plan.number}/claims", inputs, section)


def _claims(
    run: Run, plan: Plan, config: Config, images: list[ImageRow], tool: Tool, thresholds: Thresholds
) -> None:
    settings = config.golden
    home = run.stage_dir(f"round-{plan.number}")
    with distributed.main_first(config.model.device):
        stage = begin(run, _plan_claims(run, plan))
    if stage.done:
        return
    output = Output(stage.dir, Claim)
    candidates = by_key(Shards(home / "candidates", Candidate).read_all())
    with distributed.main_first(config.model.device):  # the others find the tool's answers in its cache
        selections, unread = _selections(candidates, tool, settings.max_questions)
    calibration = qa.Calibration.read(stage.inputs["calibration"])
    reask = calibration.reask if settings.reask is None else settings.reask
    square = method.square_plan(plan.verifier, config.views) if "view" in reask else []
    asker = Asker(tool, thresholds.distrusted, calibration, hash_path(plan.verifier), reask, square)

    def work(
        engine: Engine, part: list[ImageRow], advance: Callable[[], None]
    ) -> tuple[list[Claim], list[Failed]]:
        failed = [unread[row.key] for row in part if row.key in unread]
        part = [row for row in part if row.key not in unread]
        asked = asker.ask(engine, part, candidates, selections, failed, advance)
        return [claim for own in asker.ask_again(engine, part, asked, failed) for claim in own], failed

    parts = _parts(images, settings.shard_rows)
    for index, part in enumerate(parts if is_main() else ()):
        unasked = [
            Unasked(
                sample=candidates[row.key][0].sample,
                key=row.key,
                text=each.text,
                candidates=list(each.candidates),
                why=why,
            )
            for row in part
            if row.key in selections
            for each, why in selections[row.key].unasked
        ]
        Shards(stage.dir / "unasked", Unasked).write(index, unasked)
    _fill(output, "verifying", parts, plan.verifier, config, work)
    if not is_main():
        return
    rows = output.rows.read_all()
    left = Counter(why for selection in selections.values() for _, why in selection.unasked)
    counts = {
        "images": len(images),
        "claims": len(rows),
        "asked_again": sum(row.first_p_yes is not None for row in rows),
        "uncheckable": left[method.UNCHECKABLE],
        "over_limit": left[method.OVER_LIMIT],
    }
    mass = sum(row.label_mass for row in rows) / len(rows) if rows else None
    _finish(stage, run, counts, len(images), {"mean_label_mass": mass})


def _made_with(config: Config) -> str | dict[str, Any]:
    """What the tool's answers depend on."""
    if config.tool.type == "rules":
        return "Rules"
    hashes = {name: prompts.prompt_hash(name) for name in ("merge", "decompose")}
    return {"type": config.tool.type, "model": config.tool.model, "prompts": hashes}


def _selections(
    candidates: Mapping[str, list[Candidate]], tool: Tool, max_questions: int
) -> tuple[dict[str, method.Selection], dict[str, Failed]]:
    """What is asked about each image, and the images that the tool has no good answer for."""
    tool.prepare([[method.whole_statements(each) for each in rows] for rows in candidates.values()])
    selections: dict[str, method.Selection] = {}
    unread: dict[str, Failed] = {}
    for key, rows in candidates.items():
        try:
            selection = method.select(rows, tool, max_questions)
            for each in selection.asked:
                tool.decompose(each.text)
            selections[key] = selection
        except ToolFailed as error:
            unread[key] = Failed(sample=rows[0].sample, key=key, reason=f"tool: {error}")
    return selections, unread


@dataclass(frozen=True)
class Asker:
    """Asks a verifier about the statements of images, and again about what it could not decide."""

    tool: Tool
    distrusted: Collection[str]  # kinds that are not asked again
    calibration: qa.Calibration
    verifier: str  # its hash
    reask: tuple[str, ...]
    plan: list[View]  # of a square image

    def ask(
        self,
        engine: Engine,
        part: list[ImageRow],
        candidates: Mapping[str, list[Candidate]],
        selections: Mapping[str, method.Selection],
        failed: list[Failed],
        advance: Callable[[], None],
    ) -> dict[str, list[Claim]]:
        """The claims of each image by key, after one question each."""
        from captioner.engines import QuestionBatch

        asked: list[tuple[Candidate, list[Statement]]] = []  # of each image that the engine was given

        def requests() -> Iterator[QuestionBatch]:
            for row, image, sample in _load([row for row in part if row.key in candidates], failed, advance):
                first, statements = candidates[row.key][0], selections[row.key].asked
                if first.sample == sample and statements:
                    asked.append((first, statements))
                    yield QuestionBatch(image, [self.tool.decompose(each.text).text for each in statements])
                else:
                    reason = NO_STATEMENT if first.sample == sample else CHANGED
                    failed.append(Failed(sample=sample, key=row.key, reason=reason))
                    advance()

        claims: dict[str, list[Claim]] = {}
        for number, answers in enumerate(engine.p_yes(requests())):
            candidate, statements = asked[number]
            if all(isfinite(answer.p_yes) for answer in answers):
                claims[candidate.key] = method.claims(
                    candidate, statements, answers, self.tool, self.verifier, self.calibration.temperature
                )
            else:
                failed.append(Failed(sample=candidate.sample, key=candidate.key, reason=NOT_FINITE))
            advance()
        return claims

    def ask_again(
        self, engine: Engine, part: list[ImageRow], claims: dict[str, list[Claim]], failed: list[Failed]
    ) -> list[list[Claim]]:
        """The claims with the answers to second questions where the first left them undecided."""
        from captioner.engines import QuestionBatch

        second: dict[str, dict[int, list[tuple[str, str]]]] = defaultdict(dict)  # key -> claim -> asked
        for key, own in claims.items():
            for index, claim in enumerate(own):
                unsure = claim.expected == "yes" and qa.undecided(claim.p_yes, self.calibration)
                if unsure and claim.kind not in self.distrusted:
                    ways = [
                        method.second_question(way, claim.text, claim.question, self.plan)
                        for way in self.reask
                    ]
                    if asked := [way for way in ways if way]:
                        second[key][index] = asked
        batches: list[tuple[str, list[tuple[int, int]]]] = []  # key, (claim, number of its question)

        def requests() -> Iterator[QuestionBatch]:
            for row, image, sample in _load([row for row in part if row.key in second], failed, lambda: None):
                if claims[row.key][0].sample != sample:
                    failed.append(Failed(sample=sample, key=row.key, reason=CHANGED))
                    continue
                for view in sorted({view for asked in second[row.key].values() for view, _ in asked}):
                    places = [
                        (i, n)
                        for i, asked in second[row.key].items()
                        for n in range(len(asked))
                        if asked[n][0] == view
                    ]
                    batches.append((row.key, places))
                    yield QuestionBatch(image, [second[row.key][i][n][1] for i, n in places], view)

        answers: dict[tuple[str, int, int], YesNo] = {}
        for number, replies in enumerate(engine.p_yes(requests())):
            key, places = batches[number]
            answers |= {(key, i, n): reply for (i, n), reply in zip(places, replies, strict=True)}
        lost = {row.key for row in failed}
        for key in second.keys() - lost:
            for i, asked in second[key].items():
                replies = [answers[key, i, n] for n in range(len(asked))]
                if all(isfinite(reply.p_yes) for reply in replies):
                    again = method.asked_again(claims[key][i], asked, replies, self.calibration.temperature)
                    claims[key][i] = again
        return [own for key, own in claims.items() if key not in lost]


def _load(
    part: list[ImageRow], failed: list[Failed], advance: Callable[[], None]
) -> Iterator[tuple[ImageRow, Image.Image, str]]:
    """(row, image, sha256) of each image that can be read; the others go to ``failed``."""
    for row in part:
        try:
            image, sample = load_row(row)
        except BadImage as error:
            failed.append(Failed(sample="", key=row.key, reason=error.reason))
            advance()
            continue
        yield row, image, sample


def _fill(
    output: Output[RecordT],
    description: str,
    parts: list[list[ImageRow]],
    checkpoint: Path,
    config: Config,
    work: Callable[[Engine, list[ImageRow], Callable[[], None]], tuple[list[RecordT], list[Failed]]],
) -> None:
    """Make the missing shards, of several processes each its share; the model is loaded only for that."""
    missing = [index for index in range(len(parts)) if not output.rows.has(index)]
    distributed.barrier()  # before the first is written
    own = distributed.share_out(missing)
    if own:
        total = sum(len(parts[index]) for index in own)
        with _engine(checkpoint, config) as engine, progress(description, total) as bar:
            for index in own:
                rows, failed = work(engine, parts[index], bar.advance)
                output.write(index, rows, failed)
    distributed.barrier()


@contextmanager
def _engine(checkpoint: Path, config: Config) -> Iterator[Engine]:
    """The one model in memory: captioner and verifier are never loaded together."""
    engine = make_engine(checkpoint, config)
    try:
        yield engine
    finally:
        engine.close()


# ---------------------------------------------------------------- the stages that derive


def settle(ledger: Shards[Claim], samples: int, asked: list[Planted], thresholds: Thresholds) -> None:
    """Judge the claims of the whole ledger: whoever reads it sees what the captions follow."""
    shards = [ledger.read(index) for index in range(_count(ledger))]
    claims = [claim for rows in shards for claim in rows]
    judged = iter(method.judge(method.weigh(claims, samples, asked, thresholds.distrusted), thresholds))
    for index, rows in enumerate(shards):
        made = list(islice(judged, len(rows)))
        if made != rows:
            ledger.write(index, made)


def _plan_golden(run: Run, plan: Plan, distrusted: Collection[str]) -> StagePlan:
    home = run.stage_dir(f"round-{plan.number}")
    section = run.config.golden.model_dump(mode="json", include={"abstain", "max_tokens", "keep", "drop"})
    section |= {"distrusted": sorted(distrusted)}
    inputs = {name: home / name for name in STAGES[:2]}
    return StagePlan(f"round-{plan.number}/golden", inputs, section)


def _golden(run: Run, plan: Plan, config: Config, images: int, thresholds: Thresholds, redo: bool) -> None:
    settings = config.golden
    home = run.stage_dir(f"round-{plan.number}")
    if redo:
        remove_dir(home / "pairs")
    stage = _derived(run, _plan_golden(run, plan, thresholds.distrusted), redo)
    if stage.done:
        return
    output = Output(stage.dir, Golden)
    candidates, ledger = Shards(home / "candidates", Candidate), Shards(home / "claims", Claim)
    missing = [index for index in range(_count(ledger)) if not output.rows.has(index)]
    count_tokens = _token_counter(plan.captioner) if missing else len
    for index in missing:
        samples = Counter(row.key for row in candidates.read(index))
        rows: list[Golden] = []
        failed: list[Failed] = []
        for key, claims in by_key(ledger.read(index)).items():
            made = method.build(claims, samples[key], settings, count_tokens)
            if isinstance(made, Golden):
                rows.append(made)
            else:
                failed.append(Failed(sample=claims[0].sample, key=key, reason=made))
        output.write(index, rows, failed)
    captions = output.rows.read_all()
    counts = {"images": images, "golden": len(captions), **verdict_counts(ledger.read_all())}
    _finish(stage, run, counts, images)


def _plan_pairs(run: Run, plan: Plan) -> StagePlan:
    home = run.stage_dir(f"round-{plan.number}")
    inputs = {name: home / name for name in STAGES[:3]}
    return StagePlan(f"round-{plan.number}/pairs", inputs, run.config.pairs.model_dump(mode="json"))


def _pairs(run: Run, plan: Plan, config: Config, images: int) -> dict[str, int]:
    home = run.stage_dir(f"round-{plan.number}")
    stage = _derived(run, _plan_pairs(run, plan), False)
    candidates, ledger = Shards(home / "candidates", Candidate), Shards(home / "claims", Claim)
    captions, output = Shards(home / "golden", Golden), Shards(stage.dir, Pair)
    reasons: Counter[str] = Counter()
    for index in range(_count(ledger)):
        golden_of = {row.key: row for row in captions.read(index)}
        claims_of = by_key(ledger.read(index))
        rows: list[Pair] = []
        for key, sampled in by_key(candidates.read(index)).items():
            made = pairs.build(golden_of.get(key), sampled, claims_of.get(key, []), config.pairs)
            if not made:
                reasons[pairs.why_none(golden_of.get(key), sampled)] += 1
            rows += made
        if not output.has(index):
            output.write(index, rows)
    claims = ledger.read_all()
    counts = {
        "images": images,
        "candidates": len(candidates.read_all()),
        "claims": len(claims),
        **verdict_counts(claims),
        "pairs": len(output.read_all()),
        "failed": sum(_failures(home / name).total() for name in STAGES[:3]),
    }
    if not stage.done:
        stage.finish(counts, without_pair=dict(reasons))
    return counts


def _derived(run: Run, planned: StagePlan, redo: bool) -> Stage:
    try:
        return begin(run, planned, redo)
    except RunError as error:
        if "stale" not in error.what:
            raise
        raise RunError(
            error.what,
            where=error.where,
            fix="--rethreshold KEEP derives anew, --redo samples and asks anew, too",
        ) from error


def _token_counter(checkpoint: Path) -> Callable[[str], int]:
    """Tokens of a caption, the end token included. Reads the tokenizer's files only."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids) + 1


# ---------------------------------------------------------------- rows and counts


def by_key(rows: Iterable[RowT]) -> dict[str, list[RowT]]:
    """Rows of each image, which stand together, in order."""
    return {key: list(group) for key, group in groupby(rows, key=lambda row: row.key)}


def verdict_counts(claims: Iterable[Claim]) -> dict[str, int]:
    verdicts = Counter(claim.verdict for claim in claims)
    return {"kept": verdicts["keep"], "dropped": verdicts["drop"], "abstained": verdicts["abstain"]}


def _parts(images: list[ImageRow], size: int) -> list[list[ImageRow]]:
    return [images[start : start + size] for start in range(0, len(images), size)]


def _count(shards: Shards[RecordT]) -> int:
    return len(list(shards.dir.glob("[0-9]*.parquet")))


def _failures(folder: Path) -> Counter[str]:
    return Counter(row.reason for row in Shards(folder / "failed", Failed).read_all())


def _finish(
    stage: Stage, run: Run, counts: dict[str, int], images: int, metrics: dict[str, object] | None = None
) -> None:
    """Publish the stage, unless more images failed up to here than the limit allows."""
    reasons = _failures(stage.dir)
    before = STAGES[: STAGES.index(stage.dir.name)]
    failed = reasons.total() + sum(_failures(stage.dir.parent / name).total() for name in before)
    if failed > run.config.max_failed * images:
        listed = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        raise Refused(
            f"{failed} of {images} images failed ({listed}), the limit is {run.config.max_failed:.0%}",
            where=str(stage.dir),
            fix="look at failed/ there; --max-failed raises the limit",
        )
    stage.finish({**counts, "failed": reasons.total()}, metrics, failed_reasons=dict(reasons))
