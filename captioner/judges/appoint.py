"""Who judges: the best judge that there is for some images, and the answers it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from captioner.config import Config
from captioner.judges import asking, checked, facts, verifier
from captioner.judges.base import Judge, NoJudge, Said
from captioner.judges.checked import CheckedJudge
from captioner.judges.facts import FactsJudge
from captioner.judges.verifier import Errors, VerifierJudge
from captioner.laboratory import Facts
from captioner.runs import Run, input_of
from captioner.sources.folder import ImageRow, read_folder

Pool = dict[str, dict[str, float]]


def appoint(
    run: Run, folder: Path, images: Sequence[ImageRow], said: Sequence[Said], pool: Callable[[], Pool]
) -> Judge:
    """The facts of the images, people's answers, a verifier, nobody: the first that there is.

    ``said`` are the captions to judge. ``pool`` gives the verifier's pool of claims; it is called only if a
    verifier judges, as samples have to be drawn for it.
    """
    settings = run.config.gate.judge
    images = [row for row in images if not row.error]
    known = known_facts(run.config, folder, images)
    missing = facts.unknown([row.key for row in images], known)
    if missing is None:
        return FactsJudge(known)
    if settings.checked is not None:
        return CheckedJudge(checked.known_of(checked.read_checked(Path(settings.checked))))
    people = _people(run, said)
    if people is not None and (short := people.short(said)) is None:
        return people
    judge = asking.checkpoint_of(run)
    if judge is None:
        return NoJudge(f"{missing}; {short}" if people is not None else missing)
    return _verifier(run, judge, folder, images, said, pool())


def _people(run: Run, said: Sequence[Said]) -> CheckedJudge | None:
    """By the answers of `captioner review --gate` about these very images, if there are any."""
    shown = {key: row.id for side in said for key, row in side.captions.items()}
    files = sorted((run.path / "review").glob("gate-*.jsonl"))
    rows = [row for file in files for row in checked.read_checked(file) if shown.get(row.key) == row.sample]
    return CheckedJudge(checked.known_of(rows)) if rows else None


def known_facts(config: Config, folder: Path, images: Sequence[ImageRow]) -> dict[str, Facts]:
    """The facts of each image of which some are known."""
    if config.gate.judge.facts is not None:
        listed = facts.read_file(Path(config.gate.judge.facts))
        names = {row.key: row.path.relative_to(folder).as_posix() for row in images}
        return {key: listed[name] for key, name in names.items() if name in listed}
    told = {row.key: facts.read(row.facts) for row in images}
    return {key: each for key, each in told.items() if each is not None}


def _verifier(
    run: Run, judge: Path, folder: Path, images: Sequence[ImageRow], said: Sequence[Said], pool: Pool
) -> VerifierJudge:
    temperature, passes, notes = asking.measured(judge)
    claims = {key: dict.fromkeys(own) for key, own in pool.items()}
    for side in said:
        for key, row in side.captions.items():
            own = verifier.claims_of(row.caption or "", side.prose)
            claims.setdefault(key, {}).update(dict.fromkeys(own))
    wanted = {key: list(own) for key, own in claims.items()}
    asked = asking.ask(run, judge, folder, images, wanted, temperature)
    errors = Errors(passes, _false_pass(run, judge, temperature), run.config.gate.judge.false_pass)
    return VerifierJudge(asked, pool, errors, notes)


def _false_pass(run: Run, judge: Path, temperature: float) -> dict[str, float]:
    """How often the judge confirms what a round's verifier let through and a person denied, by kind."""
    votes: list[tuple[str, bool]] = []
    for file in sorted((run.path / "review").glob("round-*.jsonl")):
        folder = input_of(run.path / file.stem / "candidates", "images")
        let_through = [
            row
            for row in checked.read_checked(file)
            if row.holds is False and (row.p_yes >= 0.5) == (row.expected == "yes")
        ]
        if folder is None or not let_through:
            continue
        claims: dict[str, list[str]] = {}
        for row in let_through:
            claims.setdefault(row.key, []).append(row.text)
        images = [row for row in read_folder(folder, captions=False) if row.key in claims]
        for answers in asking.ask(run, judge, folder, images, claims, temperature).values():
            votes += [(each.kind, each.p >= 0.5) for each in answers.values()]
    return verifier.false_pass_of(votes)
