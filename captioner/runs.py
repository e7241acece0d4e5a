"""The run directory: stages that are done or not, and resumable shards.

A stage's ``stage.json`` comes last. A stage killed at any point continues with the same command.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Generic

from pydantic import BaseModel

from captioner import __version__
from captioner.config import Config, load_json
from captioner.errors import CheckpointError, DataError, RunError, masked
from captioner.files import (
    Lock,
    atomic_file,
    atomic_write_json,
    atomic_write_text,
    clear_leftovers,
    hash_json,
    hash_path,
    lock,
    read_json,
    remove_dir,
)
from captioner.processes import is_main
from captioner.records import RecordT, read_parquet, write_parquet

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PACKAGES = ("torch", "transformers", "adapters", "trl", "peft", "datasets", "pyarrow", "pydantic", "vllm")


def config_hash(config: Config) -> str:
    """sha256 of the resolved config."""
    return hash_json(config.model_dump(mode="json"))


def checkpoint_path(path: str) -> Path:
    """The directory of a checkpoint; ``scenes-base`` is the one shipped with the repository or the wheel.

    ``OWNER/NAME`` that is no directory is looked for in the hub's cache. Nothing is downloaded: raises
    CheckpointError, which names the command that fetches it, where it is not there.
    """
    if path != "scenes-base":
        return Path(path) if Path(path).exists() or not HUB_ID.fullmatch(path) else _from_hub(path)
    package = Path(__file__).resolve().parent
    places = (package.parent / "data" / "scenes" / "base", package / "_scenes_base")
    return next((place for place in places if place.is_dir()), places[0])


def _from_hub(name: str) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return Path(name)
    if not isinstance(found, str):
        raise CheckpointError(
            "no such directory, and no such model in the hub's cache",
            where=name,
            fix=f"check the path, or fetch the model: hf download {name}",
        )
    return Path(found).parent


class Shards(Generic[RecordT]):
    """Numbered Parquet files of one record in a directory, each published by rename."""

    def __init__(self, dir: Path, record: type[RecordT]):
        self.dir, self.record = dir, record

    def path(self, index: int) -> Path:
        return self.dir / f"{index:05d}.parquet"

    def has(self, index: int) -> bool:
        return self.path(index).is_file()

    def write(self, index: int, rows: Iterable[RecordT]) -> None:
        with atomic_file(self.path(index)) as part:
            write_parquet(part, rows, self.record)

    def read(self, index: int) -> list[RecordT]:
        """The rows of one shard. Raises DataError if it is missing or damaged."""
        return read_parquet(self.path(index), self.record)

    def read_all(self) -> list[RecordT]:
        """All rows in order. Raises DataError if a shard is missing between others."""
        count = len(list(self.dir.glob("[0-9]*.parquet")))
        missing = [index for index in range(count) if not self.has(index)]
        if missing:
            raise DataError(f"shard {missing[0]} is missing", where=str(self.dir), fix="run the stage again")
        return [row for index in range(count) for row in self.read(index)]


class Stage:
    """One stage of a run, made by :meth:`Run.stage`.

    ``done`` tells whether ``stage.json`` stands; else work into ``dir`` and call :meth:`finish`.
    """

    def __init__(self, run: Run, name: str, section: Mapping[str, Any], inputs: Mapping[str, Path]):
        self.name, self.dir, self.done = name, run.stage_dir(name), False
        self._run = run
        self._made_of = {
            "section": _plain({"seed": run.config.seed, **section}),
            "inputs": {key: hash_path(path) for key, path in inputs.items()},
        }
        self.lock: Lock | None = None  # of a stage in work
        self.inputs = inputs
        self._start = time.monotonic()

    def changed(self) -> list[str]:
        """What differs between now and what the directory was begun with; empty where nothing is begun."""
        for file in ("stage.json", "begun.json"):
            if (self.dir / file).is_file():
                stored = read_json(self.dir / file)
                return _differences({key: stored[key] for key in self._made_of}, self._made_of)
        return []

    def begin(self) -> None:
        """Check what stands in the directory against section and inputs; RunError if it is stale."""
        if changed := self.changed():
            raise RunError(
                f"stage {self.name} is stale: {'; '.join(changed[:3])}",
                where=str(self.dir),
                fix="add --redo to make it anew, or restore what it was made with",
            )
        self.done = (self.dir / "stage.json").is_file()
        if self.done:
            return
        clear_leftovers(self.dir.rglob(".*.part-*"))
        clear_leftovers(self.dir.parent.glob(f".{self.dir.name}.trash-*"))
        # from here on a killed stage may be continued, but only with this section and these inputs
        atomic_write_json(self.dir / "begun.json", self._made_of)

    def finish(
        self,
        counts: Mapping[str, int],
        metrics: Mapping[str, Any] | None = None,
        device_s: float | None = None,
        **extra: Any,
    ) -> None:
        """Publish ``stage.json``: the stage is done, and later commands of the run begin with its config.

        ``device_s``: by default the wall time (one device).
        """
        wall_s = time.monotonic() - self._start
        manifest = {
            "stage": self.name,
            "finished": _now(),
            **self._made_of,
            "input_paths": {key: os.path.relpath(path, self.dir) for key, path in self.inputs.items()},
            "seeds": _seeds(self._made_of["section"]),
            "wall_s": round(wall_s, 3),
            "device_s": round(wall_s if device_s is None else device_s, 3),
            "counts": dict(counts),
            "metrics": _plain(metrics or {}),
            "versions": _versions(),
            **_plain(extra),
        }
        self._run.store_config()
        atomic_write_json(self.dir / "stage.json", manifest)
        self.done, self.lock = True, None


def input_of(stage: Path, name: str) -> Path | None:
    """Where an input of a finished stage lies, by the stage's manifest; None where the stage is not done."""
    manifest = stage / "stage.json"
    if not manifest.is_file():
        return None
    return (stage / read_json(manifest)["input_paths"][name]).resolve()


def _plain(value: Any) -> Any:
    """A value as JSON has it: sections as mappings, tuples as lists, paths as text."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """The leaves that differ, as "section.field: old -> new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*new, *(key for key in old if key not in new)]
        return [
            d for key in keys for d in _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
        ]
    if old == new:
        return []
    short = [text if len(text) <= 40 else text[:12] + "..." for text in (str(old), str(new))]
    return [f"{name.removeprefix('section.')}: {short[0]} -> {short[1]}"]


def _seeds(section: Any, name: str = "") -> dict[str, int]:
    """Every field called `seed`, by its dotted name."""
    if not isinstance(section, dict):
        return {}
    own = {f"{name}seed": section["seed"]} if "seed" in section else {}
    return own | {k: v for key, inner in section.items() for k, v in _seeds(inner, f"{name}{key}.").items()}


class Run:
    """A run directory and the config its stages are made with; opened with :meth:`Run.open`."""

    def __init__(self, path: Path, config: Config):
        self.path, self.config = path, config

    @classmethod
    def open(cls, place: RunDir, config: Config, create: bool = True) -> Run:
        """Open a run directory, or make it. Raises RunError if it is missing, or another kind of directory.

        Its config is stored when a stage is done: what a failed command was made with is not inherited.
        """
        path = cls.path_of(place)
        run = cls(path, config)
        if (path / "run.json").is_file():
            return run
        if not create:
            raise RunError("no such run", where=str(path), fix=f"captioner sft --run {path}")
        strange = path.is_file() or any(not file.name.startswith(".") for file in path.glob("*"))
        if strange:
            raise RunError(
                "neither empty nor a run directory", where=str(path), fix="name another with --run DIR"
            )
        run._describe()
        return run

    @staticmethod
    def path_of(place: RunDir) -> Path:
        return place.path if isinstance(place, Run) else Path(place)

    def stage_dir(self, name: str) -> Path:
        """The directory of a stage such as ``sft`` or ``round-1/qa``."""
        return self.path / name

    def stage(
        self,
        name: str,
        section: BaseModel | Mapping[str, Any],
        inputs: Mapping[str, Path],
        redo: bool = False,
    ) -> Stage:
        """Begin, continue or find done a stage made of a config section and input files or directories.

        Raises RunError if it was made or begun with others (``redo`` removes it first), and if another
        process works in this run. Where several processes train together, rank 0 does this, and the others
        get what it began.
        """
        if not is_main():
            begun = Stage(self, name, _plain(section), inputs)
            begun.done = (begun.dir / "stage.json").is_file()
            return begun
        held = lock(self.path)
        stage = Stage(self, name, _plain(section), inputs)
        if redo:
            remove_dir(stage.dir)
        stage.begin()
        if not stage.done:
            stage.lock = held
            clear_leftovers(self.path.glob(".*.part-*"))
            self._describe()
        return stage

    def captioner_dir(self, round: int) -> Path:
        """Where the checkpoint lies that round ``round`` made; round 0 is SFT."""
        return self.path / (f"round-{round}" if round else "sft") / "captioner"

    def current_captioner(self, round: int) -> Path:
        """The checkpoint that a round starts from: that of the last promoted round before it, else of SFT.

        Raises RunError naming the command that makes it, also where an earlier round was trained and not
        yet gated.
        """
        if round < 1:
            raise RunError(f"round {round} must be a whole number from 1", fix="--round 1")
        for earlier in range(round - 1, 0, -1):
            promoted = self._promoted(earlier)
            if promoted:
                return self._existing(earlier)
            if promoted is None and self.captioner_dir(earlier).is_dir():
                raise RunError(
                    f"round {earlier} is trained, and no gate has promoted or refused it",
                    where=str(self.path / f"round-{earlier}"),
                    fix=f"captioner iterate --round {earlier} --run {self.path}",
                )
        return self._existing(0)

    def newest_captioner(self) -> Path:
        """The checkpoint of the newest promoted round, else of SFT. Raises RunError if there is none."""
        rounds = sorted(
            (int(path.parent.name[6:]) for path in self.path.glob("round-*/gate.json")), reverse=True
        )
        return self._existing(next((number for number in rounds if self._promoted(number)), 0))

    def _promoted(self, round: int) -> bool | None:
        """What the gate of a round said; None if it has not spoken."""
        gate = self.path / f"round-{round}" / "gate.json"
        return bool(read_json(gate)["promoted"]) if gate.is_file() else None

    def _existing(self, round: int) -> Path:
        path = self.captioner_dir(round)
        if not path.is_dir():
            command = f"captioner iterate --round {round}" if round else "captioner sft"
            raise RunError("there is no captioner yet", where=str(path), fix=f"{command} --run {self.path}")
        return path

    def store_config(self) -> None:
        """Write config.json: what later commands of the run start from."""
        atomic_write_text(self.path / "config.json", masked(self.config.model_dump_json(indent=2)) + "\n")

    def _describe(self) -> None:
        """Write run.json, which makes the directory a run."""
        file = self.path / "run.json"
        created = read_json(file)["created"] if file.is_file() else _now()
        about = {
            "name": self.path.resolve().name,
            "created": created,
            "versions": _versions(),
            "git_commit": _git_commit(),
            "machine": _machine(),
            "config_hash": config_hash(self.config),
        }
        atomic_write_json(file, about)


RunDir = Run | Path | str  # how a command names the run it works in


def stored_config(path: Path) -> Config | None:
    """The config that a run directory holds, None if there is none; ConfigError if it cannot be read."""
    file = path / "config.json"
    return load_json(file) if file.is_file() else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def _versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that results depend on."""
    installed = {}
    for package in _PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"captioner": __version__, "python": platform.python_version(), **installed}


@cache
def _git_commit() -> str | None:
    """The commit of the checkout this code runs from, with "-dirty" after local changes; None outside one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _machine() -> dict[str, Any]:
    """Kind of machine; accelerators by name if torch is loaded anyway."""
    torch = sys.modules.get("torch")
    cuda = torch.cuda if torch is not None and torch.cuda.is_available() else None
    devices = [cuda.get_device_name(index) for index in range(cuda.device_count())] if cuda else []
    return {"platform": platform.platform(), "cpus": os.cpu_count(), "devices": devices}
