"""Resolve a config from files and flags; an error names the field, where it stands and what is meant."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from captioner.config.sections import Config
from captioner.errors import ConfigError, masked


def load(
    toml: Path | None = None, overrides: Mapping[str, str] | None = None, base: Config | None = None
) -> Config:
    """Resolve a config: defaults (or ``base``, the run's own) < ``toml`` < ``overrides``.

    ``overrides`` maps dotted fields to their text as typed (``{"dpo.beta": "0.1"}``). The text ``none``
    stands for None where a field may be None, and a comma separates the members of a tuple; both hold in
    TOML too. Raises ConfigError naming the field, where it stands and the nearest known field.
    """
    merged = (base or Config()).model_dump(mode="json")
    origins: dict[str, str] = {}
    if toml is not None:
        tree, lines = _read_toml(toml)
        for name, value in _leaves(tree):
            _put(merged, name, value, f"{toml} line {lines[name]}" if name in lines else str(toml), origins)
    # a `type` picks the kind of its section, so it comes before that section's other fields
    for name, text in sorted(
        (overrides or {}).items(), key=lambda item: item[0].rpartition(".")[2] != "type"
    ):
        _put(merged, name, text, f"--{name} {text}", origins)
    return _validate(merged, origins)


def load_json(path: Path) -> Config:
    """Read a config that :class:`captioner.runs.Run` stored. Raises ConfigError."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the stored config: {error}", where=str(path)) from error
    old = [name for name, _ in _leaves(tree) if _renamed(name)] if isinstance(tree, dict) else []
    if old:
        raise ConfigError(
            f"the run was made by captioner 0.1: {old[0]} is now called {_renamed(old[0])}",
            where=str(path),
            fix="start another run with --run DIR; its checkpoints can be used there with --model.path",
        )
    return _validate(tree, {"": str(path)})


def fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf of a section as (dotted name, field); of a section of several kinds, the fields of each."""
    seen: set[str] = set()
    for name, info in section.model_fields.items():
        kinds = _kinds(info.annotation)
        if not kinds:
            yield prefix + name, info
            continue
        for kind in kinds:
            for dotted, leaf in fields(kind, f"{prefix}{name}."):
                if dotted not in seen:
                    seen.add(dotted)
                    yield dotted, leaf


def values(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf of a config value as (dotted name, value)."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from values(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


DATA_FIELDS = ("sft.data", "sft.validation", "qa.data", "golden.images", "evaluate.data", "gate.data")


def defaulted(config: Config, source: str) -> str | None:
    """The data field that still names the default scenes ``source`` although the model is not their base.

    Scenes teach and measure the shipped base; for another model they would be a silent mistake.
    """
    if config.model.path == Config().model.path:
        return None
    before, now = dict(values(Config())), dict(values(config))
    for name in DATA_FIELDS:
        default = before[name]
        sources = default if isinstance(default, tuple) else (default,)
        if now[name] == default and source in sources:
            return name
    return None


def shown(value: object) -> str:
    """A field's value as it is typed on the command line."""
    if isinstance(value, tuple):
        return masked(",".join(map(str, value)))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _kinds(annotation: object) -> list[type[BaseModel]]:
    """The section classes an annotation allows; empty for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _kinds(part)]


@cache
def _known() -> dict[str, FieldInfo]:
    return dict(fields())


# fields of 0.1, by the end of their dotted name, and what they are called now
RENAMED = {
    "training.steps": "max_steps",
    "training.batch_size": "per_device_train_batch_size",
    "training.accumulation": "gradient_accumulation_steps",
    "training.warmup": "warmup_ratio",
    "training.log_steps": "logging_steps",
    "training.patience": "early_stopping_patience",
    "tuning.rank": "r",
    "tuning.alpha": "lora_alpha",
    "tuning.dropout": "lora_dropout",
    "tuning.rank_stabilized": "use_rslora",
    "engine.batch_size": "max_num_seqs",
    "dpo.loss": "loss_type",
    "qa.language_width": "tuning.language_width",
}
# what people call a field elsewhere
SYNONYMS = {
    "lr": "learning_rate",
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "accumulation": "gradient_accumulation_steps",
    "warmup": "warmup_ratio",
    "warmup_steps": "warmup_ratio",
    "log_steps": "logging_steps",
    "wd": "weight_decay",
    "grad_clip": "max_grad_norm",
    "clip_grad_norm": "max_grad_norm",
    "patience": "early_stopping_patience",
    "rank": "r",
    "lora_r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "loss": "loss_type",
    "max_new_tokens": "max_tokens",
    "n": "samples",
    "num_generations": "samples",
    "model_name_or_path": "path",
    "torch_dtype": "dtype",
}


def _renamed(name: str) -> str | None:
    """What a field of 0.1 is called now, None for any other."""
    head, _, leaf = name.rpartition(".")
    new = RENAMED.get(f"{head.rpartition('.')[2]}.{leaf}")
    return f"{head}.{new}" if new and f"{head}.{new}" in _known() else None


def nearest(name: str) -> str:
    """The known field that is meant most likely: of its own or nearest section, "" where none is near."""
    known = list(_known())
    section, _, leaf = name.rpartition(".")
    leaf = SYNONYMS.get(leaf, leaf)
    same = [other for other in known if other.rpartition(".")[2] == leaf]
    if not same:
        own = [other for other in known if section and other.startswith(section.split(".")[0] + ".")]
        for among in (own, known):
            leaves = [other.rpartition(".")[2] for other in among]
            close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)
            if same := [other for other in among if close and other.endswith(f".{close[0]}")]:
                break

    def likeness(other: str) -> tuple[bool, float]:
        head = other.rpartition(".")[0]
        return head.split(".")[0] == section.split(".")[0], difflib.SequenceMatcher(
            None, section, head
        ).ratio()

    return max(same, key=likeness, default="")


def _unknown(name: str, where: str, value: object = "VALUE") -> ConfigError:
    if new := _renamed(name):
        return ConfigError(f"{name} is now called {new}", where=where, fix=f"--{new} {shown(value)}")
    near = nearest(name)
    fix = f"did you mean {near}?" if near else "`captioner COMMAND --help-all` lists the fields"
    return ConfigError(f"unknown field {name}", where=where, fix=fix)


def _read_toml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The tree of a TOML file, and the line of each field where it can be told."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read the config file: {error.strerror}", where=str(path)) from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise ConfigError(f"not a TOML file: {error}", where=str(path)) from error
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([\w.\-]+)\]", line):
            table = header[1] + "."
        elif key := re.match(r"\s*([\w.\-]+)\s*=", line):
            lines.setdefault(table + key[1], number)
    return tree, lines


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a TOML tree; `type` first, since it picks the kind of its section."""
    for name, value in sorted(tree.items(), key=lambda item: item[0] != "type"):
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _put(merged: dict[str, Any], name: str, value: Any, where: str, origins: dict[str, str]) -> None:
    """Set one field in the tree of raw values, and remember where it stood."""
    info = _known().get(name)
    if info is None:
        inner = [other for other in _known() if other.startswith(name + ".")]
        if inner:
            raise ConfigError(
                f"{name} is a section, not a field", where=where, fix=f"set one of {', '.join(inner)}"
            )
        raise _unknown(name, where, value)
    *sections, leaf = name.split(".")
    tree = merged
    for section in sections:
        tree = tree.setdefault(section, {})
    if isinstance(value, str):
        value = _from_text(value, info)
    if leaf == "type" and value != tree.get("type"):
        tree.clear()  # another kind of section has other fields: it starts from its own defaults
    tree[leaf] = value
    origins[name] = where


def _from_text(text: str, info: FieldInfo) -> Any:
    """A field's raw value from text: None and tuples here, numbers and choices by pydantic."""
    kinds = (info.annotation, *get_args(info.annotation))
    if type(None) in kinds and text.lower() == "none":
        return None
    if any(get_origin(kind) is tuple for kind in kinds):
        return [part.strip().strip("'\"") for part in text.strip().strip("[]").split(",") if part.strip()]
    return text


def _validate(tree: Any, origins: Mapping[str, str]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    known = _known()
    name = ""
    for part in first["loc"]:  # pydantic also names the kind of a tagged section and the index in a tuple
        dotted = f"{name}.{part}".lstrip(".")
        if any(other == dotted or other.startswith(dotted + ".") for other in known):
            name = dotted
    if first["type"] == "extra_forbidden":
        if name not in known:
            unknown = f"{name}.{first['loc'][-1]}".lstrip(".")
            raise _unknown(unknown, origins.get("", ""))
        kind = name.rpartition(".")[0] + ".type"
        raise ConfigError(
            f"{name} is not a field of that {kind}",
            where=origins.get(name) or origins.get("", ""),
            fix=f"set {kind} too, or leave {name} out",
        )
    value = first["input"]
    if first["type"] == "union_tag_invalid":
        name, value = f"{name}.type", value["type"]
    where = (
        origins.get(name)
        or origins.get("")
        or ", ".join(w for n, w in origins.items() if n.startswith(name + "."))
    )
    shown = "" if isinstance(value, dict) else f" = {value!r}"
    fix = f"its meaning: {known[name].description}" if name in known else None
    reason = first["msg"].removeprefix("Value error, ")
    raise ConfigError(f"{name}{shown}: {reason}", where=where, fix=fix or "")
