"""What a command reads, is made with and writes: declared once, for the run, `--dry-run` and staleness.

Each loop has ``plan(run, ...) -> list[StagePlan]``. A stage of a run begins with :func:`begin`, which checks
that its inputs exist; the dry run prints the same plans with :func:`shown`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captioner import sources
from captioner.config import Config, defaulted
from captioner.errors import CaptionerError, ConfigError, RunError
from captioner.files import remove_dir
from captioner.fit import distributed
from captioner.processes import is_main
from captioner.runs import Run, RunDir, Stage

# which command makes a stage of a round; `captioner` is made by a whole round
MADE_BY = {
    "qa": "qa",
    "candidates": "golden",
    "planted": "golden",
    "claims": "golden",
    "verdicts": "golden",
    "golden": "golden",
    "pairs": "golden",
    "dpo": "dpo",
    "captioner": "iterate",
}


@dataclass(frozen=True)
class StagePlan:
    """One stage: its inputs, the settings that change its results, and its outputs."""

    name: str  # directory in the run, such as round-1/qa; "" for a command that is not a stage of a run
    inputs: Mapping[str, Path | str]  # a Path, or a data source as the config names it
    section: Mapping[str, Any] = field(default_factory=dict)
    outputs: Sequence[Path] = ()  # beside the stage's directory
    starts: str = ""  # the command that is started, where that is all


@contextmanager
def opened(place: RunDir, config: Config, create: bool = True) -> Iterator[Run]:
    """Open a run, or make it; one that is made here goes again where its first command makes nothing."""
    fresh = not (Run.path_of(place) / "run.json").is_file()
    with distributed.main_first(config.model.device):
        run = Run.open(place, config, create)
    try:
        yield run
    except CaptionerError:
        if fresh and is_main() and not _made(run):
            remove_dir(run.path)
        raise


def _made(run: Run) -> bool:
    """Whether the run holds more than its description, drawn scenes and stages that were only begun."""
    files = (path.relative_to(run.path) for path in run.path.rglob("*") if path.is_file())
    return any(f.parts[0] != "data" and f.name not in ("run.json", "begun.json", ".lock") for f in files)


def begin(run: Run, plan: StagePlan, redo: bool = False) -> Stage:
    """Begin, continue or find done the stage; see :meth:`captioner.runs.Run.stage`.

    Scenes that an input names are drawn. Raises RunError where an input does not exist.
    """
    check(run, plan)
    inputs = {
        name: at if isinstance(at, Path) else sources.resolve(at, run) for name, at in plan.inputs.items()
    }
    return run.stage(plan.name, plan.section, inputs, redo)


def check(run: Run, plan: StagePlan, made_before: Sequence[Path] = ()) -> None:
    """Raise RunError for the first input that neither exists nor lies in ``made_before``."""
    for name, at in plan.inputs.items():
        if isinstance(at, str):
            check_named(run.config, at)
        if not exists(run, at) and not _within(at, made_before):
            user = f"stage {plan.name}" if plan.name else "the command"
            raise RunError(f"{user} needs {name}, which does not exist", where=str(at), fix=_fix(run, at))


def check_named(config: Config, source: str) -> None:
    """Raise ConfigError for default scenes where the model is not their base and needs data of its own."""
    if field := defaulted(config, source):
        raise ConfigError(
            f"{field} is not set: its default, {source}, is for the shipped base only",
            where=f"model.path = {config.model.path}",
            fix=f"set {field} to your data (docs/formats.md), or to other scenes if you mean them",
        )


def exists(run: Run, at: Path | str) -> bool:
    """Whether an input is there; a stage must be done, and scenes can always be drawn."""
    if isinstance(at, str):
        return sources.exists(at)
    return (at / "stage.json").is_file() if _stage_of(run, at) == at else at.exists()


def shown(run: Run, plans: Sequence[StagePlan]) -> Iterator[str]:
    """The plans as lines: every input and output with its state."""
    made: list[Path] = []
    for plan in plans:
        if plan.name:
            yield f"stage {plan.name}:"
        for name, at in plan.inputs.items():
            missing = not exists(run, at) and not _within(at, made)
            yield f"  reads   {name}: {at}" + ("   (MISSING)" if missing else "")
        made += [run.stage_dir(plan.name)] * bool(plan.name) + list(plan.outputs)
        if plan.name:
            yield f"  writes  {run.stage_dir(plan.name)}{_state(run, plan)}"
        if plan.starts:
            yield f"  starts  {plan.starts}"
        for at in plan.outputs:
            yield f"  writes  {at}" + ("   (exists)" if at.exists() else "")


def check_all(run: Run, plans: Sequence[StagePlan]) -> None:
    """:func:`check` for stages that run one after the other."""
    made: list[Path] = []
    for plan in plans:
        check(run, plan, made)
        made += [run.stage_dir(plan.name)] * bool(plan.name) + list(plan.outputs)


def _state(run: Run, plan: StagePlan) -> str:
    home = run.stage_dir(plan.name)
    done = (home / "stage.json").is_file()
    if not done and not (home / "begun.json").is_file():
        return ""
    places = {n: at if isinstance(at, Path) else sources.locate(at, run) for n, at in plan.inputs.items()}
    inputs = {name: path for name, path in places.items() if path and path.exists()}
    if inputs.keys() == plan.inputs.keys():
        changed = Stage(run, plan.name, plan.section, inputs).changed()
        if changed:
            return f"   (stale: {'; '.join(changed[:3])}; needs --redo)"
    return "   (done)" if done else "   (begun, would continue)"


def _within(at: Path | str, folders: Sequence[Path]) -> bool:
    return isinstance(at, Path) and any(at.is_relative_to(folder) for folder in folders)


def _stage_of(run: Run, at: Path) -> Path | None:
    """The directory of the stage that ``at`` is or lies in; None outside the run's stages."""
    if not at.is_relative_to(run.path):
        return None
    parts = at.relative_to(run.path).parts
    if parts[:1] == ("sft",):
        return run.path / "sft"
    if len(parts) > 1 and re.fullmatch(r"round-\d+", parts[0]) and parts[1] in MADE_BY:
        return run.path / parts[0] / parts[1] if parts[1] != "captioner" else run.path / parts[0] / "dpo"
    return None


def _fix(run: Run, at: Path | str) -> str:
    if isinstance(at, str) or (stage := _stage_of(run, at)) is None:
        return "check the path"
    where = stage.relative_to(run.path)
    if where.parts[0] == "sft":
        return f"captioner sft --run {run.path}"
    number = where.parts[0].removeprefix("round-")
    return f"captioner {MADE_BY[at.relative_to(run.path).parts[1]]} --round {number} --run {run.path}"
