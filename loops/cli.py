"""captioner: the command line; a table of commands, each a module of this package.

A loop module has a docstring that starts with its command and ``run(config, args: Args) -> int | None``;
where it has flags of its own, ``add_flags(parser)``; where the table cannot say what it reads and writes,
``plan(config, args) -> dict``, which touches nothing. It imports heavy libraries inside ``run``: help and dry
runs stay fast.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from captioner.errors import CaptionerError, ConfigError

if TYPE_CHECKING:  # pydantic takes a quarter of a second, and `captioner --help` needs none of it
    from captioner.config import Config


class Args(argparse.Namespace):
    """What a loop gets beside the config; flags of its own are further attributes."""

    run_dir: Path
    dry_run: bool
    redo: bool
    round: int
    rounds: list[int] | None


class Command(NamedTuple):
    """A row of the table: what `--help` and `--dry-run` say of a command without running it."""

    module: str
    help: str
    sections: tuple[str, ...] = ()  # of the config: what the command is made with
    reads: tuple[str, ...] = ()  # templates over `config`, `run` and the parsed flags
    writes: tuple[str, ...] = ()


_CURRENT = "{run}: captioner of the last promoted round, else of sft"
_ROUND = "{run}/round-{round}"
_ENGINE = ("model", "views", "engine")

COMMANDS: dict[str, Command] = {
    "sft": Command(
        "loops.sft",
        "supervised fine-tuning of the captioner",
        ("model", "views", "sft"),
        ("{config.model.path}", "{config.sft.data}", "{config.sft.validation}"),
        ("{run}/sft",),
    ),
    "qa": Command(
        "loops.qa",
        "train the question answerer of a round, report its accuracy by kind of question",
        (*_ENGINE, "qa"),
        (_CURRENT, "{config.qa.data}"),
        (_ROUND + "/qa",),
    ),
    "golden": Command(
        "loops.golden",
        "sample captions, measure the verifier, ask about every claim, write golden captions and pairs",
        (*_ENGINE, "tool", "golden", "pairs"),
        (_CURRENT, _ROUND + "/qa", "{config.golden.images}"),
        tuple(f"{_ROUND}/{name}" for name in ("candidates", "planted", "claims", "golden", "pairs")),
    ),
    "dpo": Command(
        "loops.dpo",
        "preference training on the pairs of a round",
        (*_ENGINE, "pairs", "dpo"),
        (_CURRENT, _ROUND + "/golden", _ROUND + "/pairs", "{config.gate.data}", "{config.evaluate.data}"),
        (_ROUND + "/dpo", _ROUND + "/captioner"),
    ),
    "iterate": Command(
        "loops.iterate",
        "whole rounds: qa, golden, dpo, evaluate, gate",
        (*_ENGINE, "qa", "tool", "golden", "pairs", "dpo", "gate"),
        (_CURRENT, "{config.qa.data}", "{config.golden.images}", "{config.gate.data}"),
        (_ROUND,),
    ),
    "caption": Command(
        "loops.caption",
        "caption a data set; resumable",
        (*_ENGINE, "caption"),
        ("{input}", "{config.caption.checkpoint}"),
        ("{out}",),
    ),
    "evaluate": Command(
        "loops.evaluate",
        "metrics with confidence intervals",
        (*_ENGINE, "evaluate"),
        ("{config.evaluate.data}",),
        ("{run}/evaluation",),
    ),
    "report": Command("loops.report", "HTML report of a run", (), ("{run}",), ("{run}/report.html",)),
    "review": Command("loops.review", "check claims of a round by hand, on a local page", (), ("{run}",)),
    "export": Command(
        "loops.export",
        "write a captioner of the run as a stock checkpoint",
        ("model",),
        (_CURRENT,),
        ("{out}",),
    ),
    "serve": Command("loops.serve", "start a vLLM server with the right flags for a captioner", _ENGINE),
    "data": Command(
        "loops.data",
        "look at a data set, convert captions to other formats, filter or reformulate them",
        ("tool",),
        ("{folder}", "{images}"),
        ("{out}",),
    ),
    "scenes": Command("loops.scenes", "render the procedural data set"),
    "study": Command("loops.study", "a claim of the method as a table over seeds, on the scenes"),
    "demo": Command(
        "loops.demo",
        "the whole story on the embedded default, minutes on a CPU",
        (*_ENGINE, "sft", "qa", "golden", "pairs", "dpo", "gate", "evaluate", "caption"),
        ("{config.model.path}",),
        ("{run}",),
    ),
}
PARALLEL = ("sft", "qa", "golden", "dpo")  # commands that several processes may run together


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 the user can mend it, 3 refused; 130, 141 cut short."""
    words = list(sys.argv[1:] if argv is None else argv)
    return _guarded(lambda: _run(words))


def rank() -> int:
    """One of the processes of ``--gpus N``; captioner.fit.distributed puts the command on stdin."""
    from captioner.config import Config
    from captioner.runs import end_with

    end_with(os.getppid(), lambda: os._exit(1))
    job = json.load(sys.stdin)
    module = importlib.import_module(COMMANDS[job["command"]].module)
    args = Args(**job["args"] | {"run_dir": Path(job["args"]["run_dir"])})
    return _guarded(lambda: module.run(Config.model_validate(job["config"]), args) or 0)


def _guarded(run: Callable[[], int]) -> int:
    try:
        code = run()
        if _processes() > 1:
            from captioner.fit import distributed

            distributed.leave()
        sys.stdout.flush()
        return code
    except CaptionerError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` for instance, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    name = words[0]
    if name == "--version":
        from captioner import __version__

        print(f"captioner {__version__}")
        return 0
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        mend = f"did you mean `captioner {near[0]}`?" if near else "`captioner --help` lists the commands"
        raise ConfigError(f"unknown command {name}", mend=mend)
    if name not in PARALLEL and _processes() > 1:
        mend = "start it without torchrun or accelerate launch"
        raise ConfigError(f"captioner {name} runs in one process", mend=mend)
    module = importlib.import_module(command.module)
    words, toml, overrides = _split_fields(words[1:])
    args = _parser(name, command, module).parse_args(words, Args())
    for flag, default in (("round", 1), ("rounds", None)):
        vars(args).setdefault(flag, default)
    config = _config(args.run_dir, toml or getattr(module, "TOML", None), overrides)
    if args.dry_run:
        print(_plan(name, command, module, config, args))
        return 0
    return module.run(config, args) or 0


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _overview() -> str:
    rows = [f"  {name:10}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: captioner COMMAND [FILE.toml] [--section.field VALUE ...] [--run DIR] [--dry-run]",
            "",
            "An image captioner that corrects itself, and captions whole datasets.",
            "",
            *rows,
            "",
            "`captioner COMMAND --help` lists the flags and fields of a command. Settings come from, the",
            "later the stronger: defaults, the run's stored config, FILE.toml, --section.field VALUE.",
            "Exit codes: 0 done, 1 a bug of ours, 2 you can mend it, 3 a gate or limit refused.",
        ]
    )


class _Parser(argparse.ArgumentParser):
    """argparse that raises what the rest of the command line raises."""

    def error(self, message: str) -> Any:
        raise ConfigError(message, mend=f"{self.prog} --help")


def _parser(name: str, command: Command, module: Any) -> argparse.ArgumentParser:
    wide = shutil.get_terminal_size().columns

    class Help(argparse.RawDescriptionHelpFormatter):
        def format_help(self) -> str:
            return super().format_help() + _field_help(command.sections, wide)

    parser = _Parser(
        prog=f"captioner {name}",
        description=f"{command.help}\n\nA FILE.toml among the arguments is read as the config.",
        formatter_class=Help,
        allow_abbrev=False,
        conflict_handler="resolve",  # a module's own flag of the same name wins
    )
    parser.add_argument("--run", dest="run_dir", type=Path, default=Path("runs/default"), metavar="DIR",
                        help="run directory (default runs/default)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the resolved plan and touch nothing")
    parser.add_argument(
        "--redo", action="store_true", help="make the stage anew, its old results are removed"
    )
    if any("{round}" in place for place in command.reads + command.writes):
        parser.add_argument("--round", type=_round, default=1, metavar="N", help="round, from 1 (default 1)")
    if name == "iterate":
        parser.add_argument(
            "--rounds", type=_rounds, metavar="A-B", help="several rounds one after the other"
        )
    if name in (*PARALLEL, "iterate", "demo"):
        parser.add_argument(
            "--gpus",
            type=int,
            default=2 if name == "demo" else 1,
            metavar="N",
            help="processes, a GPU each (default %(default)s)",
        )
    if hasattr(module, "add_flags"):
        module.add_flags(parser)
    return parser


def _round(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no round: a whole number from 1")
    return int(text)


def _rounds(text: str) -> list[int]:
    first, _, last = text.partition("-")
    rounds = list(range(_round(first), _round(last or first) + 1))
    if not rounds:
        raise argparse.ArgumentTypeError(f"{text!r} is no range of rounds such as 1-3")
    return rounds


def _split_fields(words: list[str]) -> tuple[list[str], Path | None, dict[str, str]]:
    """Take `--section.field value`, `--seed`, `--max-failed` and FILE.toml out of the words."""
    rest: list[str] = []
    toml: Path | None = None
    overrides: dict[str, str] = {}
    queue = iter(words)
    for word in queue:
        flag, equals, value = word.partition("=")
        field = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and ("." in flag or field in ("seed", "max_failed")):
            text = value if equals else next(queue, None)
            if text is None:
                raise ConfigError(f"{flag} needs a value", where="the end of the command line")
            overrides[field] = text
        elif word.endswith(".toml") and not word.startswith("-"):
            if toml is not None:
                raise ConfigError("two config files", where=f"{toml} and {word}", mend="name one")
            toml = Path(word)
        else:
            rest.append(word)
    return rest, toml, overrides


def _config(run_dir: Path, toml: Path | None, overrides: dict[str, str]) -> Config:
    from captioner.config import load, shown, values
    from captioner.runs import stored_config

    stored = stored_config(run_dir)
    config = load(toml, overrides, stored)
    if stored and toml:  # a line that was taken out of the file does not take the setting back
        afresh = dict(values(load(toml, overrides)))
        kept = [f"{name} = {shown(value)}" for name, value in values(config) if afresh.get(name) != value]
        if kept:
            print(f"kept from {run_dir}/config.json, not set in {toml}: {', '.join(kept)}", file=sys.stderr)
    return config


def _field_help(sections: Sequence[str], wide: int) -> str:
    """A line per config field of the sections: name, default, what it is."""
    from captioner.config import Config, fields, shown, values

    defaults = dict(values(Config()))
    lines = ["", "config fields (in FILE.toml, or as flags):"]
    for dotted, info in fields():
        if _concerns(dotted, sections):
            text = f"{info.description} (default {shown(defaults.get(dotted, info.default))})"
            lines.append(f"  --{dotted}")
            lines += textwrap.wrap(text, max(wide, 48), initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines) + "\n"


def _concerns(dotted: str, sections: Sequence[str]) -> bool:
    return "." not in dotted or dotted.partition(".")[0] in sections


def _plan(name: str, command: Command, module: Any, config: Config, args: Args) -> str:
    """What the command would be made with, read and write: by the module's ``plan``, else by the table."""
    from captioner.config import Config, shown, values

    slots = {**vars(args), "run": args.run_dir, "config": config}
    defaults = dict(values(Config()))
    lines = [f"captioner {name}: the plan (--dry-run touches nothing)", "config:"]
    for dotted, value in values(config):
        if _concerns(dotted, command.sections):
            was = f"   # default {shown(defaults[dotted])}" if value != defaults.get(dotted, value) else ""
            lines.append(f"  {dotted} = {shown(value)}{was}")
    if hasattr(module, "plan"):
        return "\n".join([*lines, *(f"{key}: {value}" for key, value in module.plan(config, args).items())])
    for verb, templates in (("reads", command.reads), ("writes", command.writes)):
        lines.append(f"{verb}:")
        for template in templates:
            place = template.format(**slots)
            lines += [f"  {place}{_state(Path(place))}"] if place != "None" else []
    return "\n".join(lines)


def _state(place: Path) -> str:
    if (place / "stage.json").is_file():
        return "   (done)"
    return "   (begun, would continue)" if (place / "begun.json").is_file() else ""
