"""captioner golden --round N [--gpus N] [--rethreshold KEEP]: sample, verify, write golden captions, pairs.

Stages of a round: `candidates` (the captioner samples), `planted` (the verifier is measured on claims whose
answers are known, where something knows them; it may refuse the round), `claims` (the verifier answers one
question per statement), `verdicts`, `golden` and `pairs` (derived from the claims, no model). A killed stage
continues at its first missing shard; of several processes each fills its share of the shards.
`--rethreshold` makes the last three stages anew from the claims that are there.
"""

from __future__ import annotations

from captioner.config import Config
from captioner.errors import ConfigError, RunError
from captioner.files import remove_dir
from captioner.fit import distributed
from captioner.method import candidates, claims, pairs, planted, rounds, verdicts, verifier
from captioner.method import golden as method
from captioner.method.llm import make_tool
from captioner.method.rounds import Plan
from captioner.method.verdicts import Thresholds
from captioner.pipeline import stages
from captioner.processes import is_main
from captioner.runs import Run, RunDir, Stage
from captioner.sources import resolve
from captioner.sources.folder import read_folder
from loops.stages import StagePlan, begin, check


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
        gpus: Processes to start, one per GPU, each with its engine (`vllm`, and `server` with `engine.serve`,
            start one each).
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
    fed = config.engine.type == "server" and not config.engine.serve  # this process keeps all servers busy
    if distributed.wanted(gpus) and keep is None and not fed:
        distributed.launch("golden", run, config, gpus, round=round, redo=redo)
        return {}
    run = Run.open(run, config, create=False)
    counts = make_golden(run, plan_round(run, round), config, redo=redo, rethreshold=keep is not None)
    if counts:
        print(f"round {round}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return counts


def plan(run: Run, round: int) -> list[StagePlan]:
    """What the stages of a round read, are made with and write."""
    return list(_plans(run, _of_round(run, round), run.config).values())


def _plans(run: Run, plan: Plan, config: Config) -> dict[str, StagePlan]:
    """The stages by name, with the trust in the verifier as it is now."""
    thresholds = Thresholds(config.golden.keep, config.golden.drop, *planted.stored(plan.home))
    made_of = {
        "candidates": candidates.made_of(plan, config),
        "planted": planted.made_of(plan, config),
        "claims": claims.made_of(plan, config),
        "verdicts": verdicts.made_of(plan, config, thresholds),
        "golden": method.made_of(plan, config, thresholds),
        "pairs": pairs.made_of(plan, config),
    }
    if "verdicts" not in rounds.judged(plan.home):
        del made_of["verdicts"]
    return {name: StagePlan(f"round-{plan.number}/{name}", *made) for name, made in made_of.items()}


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
    source = rounds.round_source(run.config.golden.images, number)
    home = run.stage_dir(f"round-{number}")
    return Plan(number, source, run.current_captioner(number), home / "qa", home)


def make_golden(run: Run, plan: Plan, config: Config, *, redo: bool, rethreshold: bool) -> dict[str, int]:
    """All stages, each from where it stands; returns the counts of the closing line.

    Raises Refused where the verifier is not good enough or too many images failed.
    """
    if rethreshold and not (plan.home / "claims" / "stage.json").is_file():
        raise RunError(
            "there are no claims to apply a threshold to",
            where=str(plan.home / "claims"),
            fix=f"captioner golden --round {plan.number} --run {run.path}",
        )
    with distributed.main_first(stages.meeting(config)):
        folder = resolve(plan.source, run)
    images = read_folder(folder, captions=False)
    stage = _begin(run, plan, config, "candidates", redo)
    candidates.fill(stage, run, plan, config, images)
    if rethreshold or "verdicts" in rounds.judged(plan.home):
        planted.fill(_begin(run, plan, config, "planted"), run, plan, config, folder)
        trust = planted.trusted(run, plan, config)
    else:  # finished by 0.1: it stays as it was decided
        trust = planted.Trust(None, *planted.stored(plan.home), reasons=())
    known = (plan.lab.kind_of, plan.lab.slot_of) if plan.lab else (None, None)
    tool = make_tool(config.tool, run.path / "tool", *known)
    try:
        stage = _begin(run, plan, config, "claims")
        claims.fill(stage, run, plan, config, images, tool, trust.distrusted)
    finally:
        tool.close()
    return _derive(run, plan, config, len(images), trust, rethreshold) if is_main() else {}


def _derive(
    run: Run, plan: Plan, config: Config, images: int, trust: planted.Trust, redo: bool
) -> dict[str, int]:
    """The stages that need no model."""
    thresholds = Thresholds(config.golden.keep, config.golden.drop, trust.distrusted, trust.cautious)
    if redo:
        for name in ("pairs", "golden", "verdicts"):
            remove_dir(plan.home / name)
    if "verdicts" in rounds.judged(plan.home):
        verdicts.fill(_derived(run, plan, config, "verdicts"), plan, config, thresholds)
    verifier.export(run, plan.number, plan.verifier, plan.calibration, thresholds)
    method.fill(_derived(run, plan, config, "golden"), run, plan, config, images, thresholds)
    return pairs.fill(_derived(run, plan, config, "pairs"), plan, config, images, thresholds.neutral)


def _begin(run: Run, plan: Plan, config: Config, name: str, redo: bool = False) -> Stage:
    """Begin a stage that runs a model; ``redo`` removes what derives from it, too."""
    with distributed.main_first(stages.meeting(config)):
        stage = begin(run, _plans(run, plan, config)[name], redo)
        if redo and is_main():
            for other in (*rounds.STAGES[:0:-1], "planted"):
                remove_dir(plan.home / other)
    return stage


def _derived(run: Run, plan: Plan, config: Config, name: str) -> Stage:
    """Begin a stage that runs no model."""
    try:
        return begin(run, _plans(run, plan, config)[name])
    except RunError as error:
        if "stale" not in error.what:
            raise
        raise RunError(
            error.what,
            where=error.where,
            fix="--rethreshold KEEP derives anew, --redo samples and asks anew, too",
        ) from error
