"""captioner iterate --round N | --rounds A-B [--accept-unjudged] [--gpus N]: whole rounds of self-correction.

A round is qa, golden, dpo, an evaluation on the gate's images and the gate. What is done already is skipped,
so the same command continues a killed round. A round that the gate refuses, or an alarm stops, keeps its
files and its captioner is not used. The command stops there: with exit code 3, but 0 where it has promoted a
round before, which then is the best.

Where no judge can tell whether the captions of ``gate.data`` are true, the gate refuses.
``--accept-unjudged`` promotes such a round on the user's word; gate.json and the report say so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from captioner.config import Config
from captioner.errors import ConfigError, Refused, RunError
from captioner.files import atomic_write_json
from captioner.judges.gate import Decision, decide
from captioner.runs import Run, RunDir
from loops import dpo, evaluate, golden, qa
from loops.stages import StagePlan, check_named

STEPS: tuple[Callable[..., object], ...] = (qa.qa, golden.golden, dpo.dpo)


def plan(run: Run, round: int, rounds: str | None = None) -> list[StagePlan]:
    """What the stages of the (first) round read, are made with and write."""
    number = _numbers(rounds)[0] if rounds else round
    return [
        *qa.plan(run, number),
        *golden.plan(run, number),
        *dpo.plan(run, number),
        *qa.plan_judge(run),
    ]


def iterate(
    run: RunDir,
    config: Config,
    round: int = 1,
    *,
    rounds: str | None = None,
    accept_unjudged: bool = False,
    redo: bool = False,
    gpus: int = 1,
) -> Path:
    """Run whole rounds and their gates; returns the checkpoint of the newest promoted captioner.

    Args:
        run: Run directory with a captioner.
        config: Settings; those of `qa`, `golden`, `dpo`, `evaluate` and `gate` are read.
        round: Number of the round, from 1.
        rounds: Several rounds one after the other, as in 1-3; instead of `round`.
        accept_unjudged: Promote rounds of which no judge can tell whether their captions are true.
        redo: Remove the results of the rounds' stages and make them anew.
        gpus: Processes to start, one per GPU.

    Raises:
        RunError: the round before is missing.
        Refused: the first of the rounds was refused.
    """
    numbers = _numbers(rounds) if rounds else [round]
    run = Run.open(run, config, create=False)
    data = (config.qa.data, config.golden.images, config.gate.data, config.evaluate.data)
    for source in data:  # before hours of training
        check_named(config, source)
    promoted: list[int] = []
    for number in numbers:
        try:
            run_round(run, number, redo=redo, gpus=gpus, accept_unjudged=accept_unjudged)
        except Refused as refusal:
            if not promoted:
                raise
            print(f"{refusal}\nround {promoted[-1]} is the best and stays")
            break
        promoted.append(number)
    print(f"rounds done: {', '.join(map(str, promoted))}; the captioner is {run.newest_captioner()}")
    return run.newest_captioner()


def _numbers(rounds: str) -> list[int]:
    first, _, last = rounds.partition("-")
    if first.isdigit() and (last or first).isdigit() and 1 <= int(first) <= int(last or first):
        return list(range(int(first), int(last or first) + 1))
    raise ConfigError(f"rounds {rounds!r} must be a range of whole numbers from 1", fix="--rounds 1-3")


def run_round(
    run: Run, number: int, *, redo: bool = False, gpus: int = 1, accept_unjudged: bool = False
) -> None:
    """One round, each step from where it stands, and its gate."""
    earlier = run.path / f"round-{number - 1}" / "gate.json"
    if number > 1 and not earlier.is_file():
        raise RunError(
            f"round {number} needs round {number - 1}, which has not been done",
            where=str(earlier),
            fix=f"captioner iterate --round {number - 1} --run {run.path}",
        )
    run.current_captioner(number)  # names the missing command before anything is done
    for step in STEPS:
        step(run.path, run.config, number, redo=redo, gpus=gpus)
    gate(run, number, accept_unjudged=accept_unjudged)


def gate(run: Run, number: int, *, accept_unjudged: bool = False) -> None:
    """Compare the captioner of a round with its start; write gate.json. Raises Refused if it may not stay."""
    if not accept_unjudged:
        qa.judge(run)
    summary, _, [step] = evaluate.evaluate_round(run, number)
    decision = decide(step, run.config.gate, accept_unjudged=accept_unjudged)
    _record(run, number, summary, decision)
    evaluate.print_table(summary)
    print("\n".join(f"  {reason}" for reason in decision.reasons))
    if not decision.promoted:
        why = [reason for reason in decision.reasons if reason.startswith("REFUSED")]
        raise Refused(
            f"the gate refused round {number}: {'; '.join(why)}",
            where=str(run.path / f"round-{number}" / "gate.json"),
            fix=_fix(number, decision, summary["captioners"][0]["checkpoint"]),
        )
    word = " unjudged" if decision.unjudged else ""
    print(f"round {number} is promoted{word}: {run.captioner_dir(number)}")


def _fix(number: int, decision: Decision, start: str) -> str:
    stays = f"the captioner stays {start}"
    if decision.unjudged:
        return (
            f"{stays}; a list of the facts of each image (gate.judge.facts FILE.jsonl), people's answers "
            f"(captioner review --gate --round {number}) or a verifier (gate.judge.checkpoint, or "
            f"gate.judge.train) would decide; or look at what both say in `captioner report` and take the "
            f"round on your own word: "
            f"captioner iterate --round {number} --accept-unjudged"
        )
    return f"{stays}; more images, other thresholds or a gentler dpo section with --redo may fix the round"


def _record(run: Run, number: int, summary: dict[str, Any], decision: Decision) -> None:
    start, made = summary["captioners"]
    gate = {
        "round": number,
        "promoted": decision.promoted,
        "judge": decision.judge,
        "notes": list(decision.notes),
        "unjudged": decision.unjudged,
        "reasons": list(decision.reasons),
        "start": start["checkpoint"],
        "captioner": made["checkpoint"],
        "difference": {name: x.to_json() for name, x in decision.difference.items()},
        "settings": run.config.gate.model_dump(mode="json"),
    }
    atomic_write_json(run.path / f"round-{number}" / "gate.json", gate)
