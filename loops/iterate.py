"""captioner iterate --round N | --rounds A-B [--accept-unjudged] [--gpus N]: whole rounds of self-correction.

A round is qa, golden, dpo, an evaluation on the gate's images and the gate. What is done already is skipped,
so the same command continues a killed round. A round that the gate refuses, or an alarm stops, keeps its
files and its captioner is not used. The command stops there: with exit code 3, but 0 where it has promoted a
round before, which then is the best.

Where no judge can tell whether the captions of ``gate.data`` are true, the gate refuses.
``--accept-unjudged`` promotes such a round on the user's word; gate.json and the report say so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from captioner.config import Config
from captioner.errors import Refused, RunError
from captioner.judges.gate import Decision, decide
from captioner.runs import Run, atomic_write_json
from loops import dpo, evaluate, golden, qa

STEPS: tuple[ModuleType, ...] = (qa, golden, dpo)


def add_flags(parser: argparse.ArgumentParser) -> None:
    help_unjudged = "promote rounds of which no judge can tell whether their captions are true"
    parser.add_argument("--accept-unjudged", action="store_true", help=help_unjudged)


def run(config: Config, args: argparse.Namespace) -> int:
    """Raises RunError where the round before is missing, Refused where the first round of them is refused."""
    run = Run.open(args.run_dir, config, create=False)
    rounds = args.rounds or [args.round]
    promoted: list[int] = []
    for number in rounds:
        try:
            run_round(run, number, args, accept_unjudged=args.accept_unjudged)
        except Refused as refusal:
            if not promoted:
                raise
            print(f"{refusal}\nround {promoted[-1]} is the best and stays")
            break
        promoted.append(number)
    print(f"rounds done: {', '.join(map(str, promoted))}; the captioner is {run.newest_captioner()}")
    return 0


def run_round(run: Run, number: int, args: argparse.Namespace, *, accept_unjudged: bool = False) -> None:
    """One round, each step from where it stands, and its gate."""
    earlier = run.path / f"round-{number - 1}" / "gate.json"
    if number > 1 and not earlier.is_file():
        raise RunError(
            f"round {number} needs round {number - 1}, which has not been done",
            where=str(earlier),
            mend=f"captioner iterate --round {number - 1} --run {run.path}",
        )
    run.current_captioner(number)  # names the missing command before anything is done
    for step in STEPS:
        code = step.run(run.config, arguments(step, args, round=number))
        if code:
            raise Refused(
                f"{step.__name__} of round {number} was refused", where=str(run.path / f"round-{number}")
            )
    gate(run, number, accept_unjudged=accept_unjudged)


def gate(run: Run, number: int, *, accept_unjudged: bool = False) -> None:
    """Compare the captioner of a round with its start; write gate.json. Raises Refused if it may not stay."""
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
            mend=_mend(number, decision, summary["captioners"][0]["checkpoint"]),
        )
    word = " unjudged" if decision.unjudged else ""
    print(f"round {number} is promoted{word}: {run.captioner_dir(number)}")


def _mend(number: int, decision: Decision, start: str) -> str:
    stays = f"the captioner stays {start}"
    if decision.unjudged:
        return (
            f"{stays}; a list of the facts of each image would decide (gate.judge.facts FILE.jsonl), or look "
            f"at what both say in `captioner report` and take the round on your own word: "
            f"captioner iterate --round {number} --accept-unjudged"
        )
    return f"{stays}; more images, other thresholds or a gentler dpo section with --redo may mend the round"


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


def arguments(
    step: ModuleType, args: argparse.Namespace, words: Sequence[str] = (), **values: Any
) -> argparse.Namespace:
    """The arguments that the command line would give ``step``: its own (``words``) and the common ones."""
    parser = argparse.ArgumentParser()
    if hasattr(step, "add_flags"):
        step.add_flags(parser)
    common = {"run_dir": args.run_dir, "redo": args.redo, "dry_run": False, "round": None, "rounds": None}
    common["gpus"] = getattr(args, "gpus", 1)
    return argparse.Namespace(**{**common, **vars(parser.parse_args(words)), **values})
