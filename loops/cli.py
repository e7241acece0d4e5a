"""captioner: the command line, a thin edge over the functions of this package.

Each command is a function ``verb(run, config, ...)``. Its other parameters are the command's flags, their
help stands in its docstring, and cyclopts parses them. ``--section.field VALUE`` and FILE.toml make the
config. The module's ``plan(run, ...)`` tells what the command reads and writes, for ``--dry-run``.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

from captioner.errors import CaptionerError, ConfigError, Ended

if TYPE_CHECKING:  # pydantic and cyclopts take a third of a second, and `captioner --version` needs neither
    from cyclopts import App

    from captioner.config import Config


class Command(NamedTuple):
    """A row of the table of commands."""

    verb: str  # module and function
    help: str
    sections: tuple[str, ...] = ()  # of the config, which the command reads


_ENGINE = ("model", "views", "engine")
_ROUND = (*_ENGINE, "qa", "tool", "golden", "pairs", "dpo", "evaluate", "gate")

COMMANDS: dict[str, Command] = {
    "sft": Command("loops.sft:sft", "Fine-tune the captioner on captions", ("model", "views", "sft")),
    "qa": Command("loops.qa:qa", "Train and measure the verifier of a round", (*_ENGINE, "qa")),
    "golden": Command(
        "loops.golden:golden",
        "Sample captions, verify every claim, write golden captions and preference pairs",
        (*_ENGINE, "tool", "golden", "pairs"),
    ),
    "dpo": Command(
        "loops.dpo:dpo", "Train on the preference pairs of a round", ("model", "views", "pairs", "dpo")
    ),
    "iterate": Command("loops.iterate:iterate", "Run whole rounds: qa, golden, dpo, evaluate, gate", _ROUND),
    "caption": Command(
        "loops.caption:caption", "Caption a data set of any size; resumable", (*_ENGINE, "caption")
    ),
    "verify": Command(
        "loops.verify:verify", "Check captions that somebody else wrote, claim by claim", (*_ENGINE, "golden")
    ),
    "evaluate": Command(
        "loops.evaluate:evaluate",
        "Score captioners on held-out images, with confidence intervals",
        (*_ENGINE, "tool", "evaluate", "gate"),
    ),
    "report": Command("loops.report:report", "Write the HTML report of a run"),
    "review": Command("loops.review:review", "Check claims of a round by hand, on a local page"),
    "export": Command("loops.export:export", "Write a captioner as a stock checkpoint", ("model", "views")),
    "serve": Command(
        "loops.serve:serve", "Start a vLLM server with the right flags for a captioner", _ENGINE
    ),
    "data prepare": Command("loops.data.photographs:prepare", "Copy photographs, with a table to fill in"),
    "data check": Command("loops.data.photographs:check", "Name what a set of captions lacks"),
    "data boxes": Command("loops.data.photographs:boxes", "Make questions and facts of COCO's boxes"),
    "data stats": Command("loops.data.stats:stats", "Print the numbers of a data set"),
    "data convert": Command("loops.data.convert:convert", "Write captions in another format"),
    "data filter": Command("loops.data.curate:filter", "Drop images and captions by rules"),
    "data recaption": Command(
        "loops.data.recaption:recaption",
        "Caption images with a teacher: a server, or a checkpoint",
        (*_ENGINE, "tool", "caption"),
    ),
    "data reformulate": Command(
        "loops.data.make:reformulate", "Turn prose captions into shorthand", ("tool",)
    ),
    "data preferences": Command(
        "loops.data.preferences:preferences", "Write the pairs of a round for other trainers"
    ),
    "data questions": Command("loops.data.make:questions", "Make a balanced yes/no set from captions"),
    "init": Command("loops.init:init", "Write settings for a model and a machine to start from"),
    "scenes": Command("loops.scenes:scenes", "Draw procedural scenes as an image folder"),
    "study": Command("loops.study:study", "Measure a claim of the method on scenes, over several seeds"),
    "demo": Command(
        "loops.demo:demo",
        "Run the whole method on the built-in scenes, minutes on a CPU",
        (*_ROUND, "sft", "caption"),
    ),
}
PARALLEL = ("sft", "qa", "golden", "dpo")  # commands that several processes may run together
SETTINGS = """\
Settings, the later the stronger: defaults, the run's stored config, FILE.toml, --section.field VALUE."""
NOTES = f"""\
`captioner COMMAND --help` lists the flags of a command, `--help SECTION` the settings of one section of the
config, `--help-all` both.

{SETTINGS}
Exit codes: 0 done, 1 a bug in captioner, 2 an error that you can fix, 3 refused by a gate or limit."""
HELP = ("-h", "--help", "--help-all")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 the user can fix it, 3 refused, 128 + N: a signal."""
    words = list(sys.argv[1:] if argv is None else argv)
    return _guarded(lambda: _run(words))


def rank() -> int:
    """One of the processes of ``--gpus N``; captioner.fit.distributed puts the command on stdin."""
    from captioner.config import Config
    from captioner.processes import end_with

    end_with(os.getppid(), lambda: os._exit(1))
    job = json.load(sys.stdin)
    verb = load(COMMANDS[job["command"]])

    def work() -> int:
        verb(job["run"], Config.model_validate(job["config"]), **job["flags"])
        return 0

    return _guarded(work)


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
    except Ended as error:
        print(f"ended by {error}; the same command continues where it stopped", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader, `head` for instance, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _run(words: list[str]) -> int:
    if words[:1] == ["--version"]:
        from captioner import __version__

        print(f"captioner {__version__}")
        return 0
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else " ".join(words[:1])
    if name not in COMMANDS:
        print(_overview(name))
        return 0
    command, rest = COMMANDS[name], words[len(name.split()) :]
    if asked := next((word for word in rest if word in HELP), None):
        after = rest[rest.index(asked) + 1 :]
        print(_help(name, asked == "--help-all", after[0] if after else None))
        return 0
    if name not in PARALLEL and _processes() > 1:
        fix = "start it without torchrun or accelerate launch"
        raise ConfigError(f"captioner {name} runs in one process", fix=fix)
    verb = load(command)
    module = sys.modules[verb.__module__]
    rest, toml, overrides = _split_fields(rest)
    flags = _parse(name, verb, rest)
    run_dir, dry_run = flags.pop("run_dir"), flags.pop("dry_run")
    config = _config(run_dir, toml or getattr(module, "TOML", None), overrides)
    if dry_run:
        _print_plan(name, module, run_dir, config, flags)
        return 0
    done = verb(run_dir, config, **flags)
    return done if isinstance(done, int) else 0


def load(command: Command) -> Callable[..., Any]:
    """The function of a command."""
    module, _, function = command.verb.partition(":")
    verb: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return verb


# ---------------------------------------------------------------- flags


def _parse(name: str, verb: Callable[..., Any], words: list[str]) -> dict[str, Any]:
    """The arguments of the verb, and ``run_dir`` and ``dry_run``. Raises ConfigError."""
    from cyclopts import CycloptsError, UnknownOptionError, UnusedCliTokensError

    try:
        _, bound, _ = _app(name, verb).parse_args(words, print_error=False, exit_on_error=False)
    except UnusedCliTokensError as error:
        what = f"unexpected argument {' '.join(error.unused_tokens or ())}"
        raise ConfigError(what, fix=f"captioner {name} --help") from error
    except UnknownOptionError as error:
        flag = str(error.token.keyword)
        raise ConfigError(f"Unknown option: {flag}", fix=_meant(name, flag)) from error
    except CycloptsError as error:
        raise ConfigError(str(error), fix=f"captioner {name} --help") from error
    bound.apply_defaults()
    return dict(bound.arguments)


def _meant(name: str, flag: str) -> str:
    """The flag or the setting of the command that is most like an unknown flag."""
    from captioner.config import nearest

    flags = [f"--{parameter.replace('_', '-')}" for parameter in flags_of(COMMANDS[name])]
    near = difflib.get_close_matches(flag, [*flags, "--run", "--dry-run"], n=1, cutoff=0.75)
    sections = COMMANDS[name].sections
    field = nearest(f"{name if name in sections else ''}.{flag.lstrip('-').replace('-', '_')}")
    if not near and field.partition(".")[0] in sections:
        near = [f"--{field}"]
    return f"did you mean {near[0]}?" if near else f"captioner {name} --help"


def _app(command: str, verb: Callable[..., Any]) -> App:
    """The parser of a command: the parameters of its function but run and config, and the common ones."""
    from cyclopts import App, Group, Parameter
    from cyclopts.help import DefaultFormatter, PanelSpec
    from rich.box import Box

    own, common = Group("Options", sort_key=1), Group("Common options", sort_key=2)
    keyword, hints, docs = inspect.Parameter.KEYWORD_ONLY, get_type_hints(verb), flags_of(COMMANDS[command])
    parameters = [
        parameter.replace(
            annotation=Annotated[hints[name], _about(parameter, docs.get(name, ""))], kind=_kind(parameter)
        )
        for name, parameter in inspect.signature(verb).parameters.items()
        if name not in ("run", "config")
    ]
    run = Annotated[Path, Parameter(name="--run", help="Run directory.", group=common)]
    parameters.append(inspect.Parameter("run_dir", keyword, default=Path("runs/default"), annotation=run))
    says = "Print the plan and check its inputs; write nothing."
    dry = Annotated[bool, Parameter(help=says, group=common, show_default=False)]
    parameters.append(inspect.Parameter("dry_run", keyword, default=False, annotation=dry))

    def flags(**_: Any) -> None: ...

    flags.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flags.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    blank = PanelSpec(box=Box("    \n" * 8), padding=(0, 1))
    app = App(
        name=f"captioner {command}",
        help=COMMANDS[command].help + ".",
        help_format="plaintext",
        help_flags=(),
        version_flags=(),
        help_formatter=DefaultFormatter(panel_spec=blank),
        default_parameter=Parameter(negative=()),
        group_parameters=own,
        group_arguments=Group("Arguments", sort_key=0),
        usage=_usage(command, parameters),
    )
    app.default(flags)
    return app


def flags_of(command: Command) -> dict[str, str]:
    """The parameters of a command's function but run and config, and what its docstring says of them."""
    import docstring_parser

    verb = load(command)
    said = docstring_parser.parse(verb.__doc__ or "").params
    docs = {each.arg_name: " ".join((each.description or "").split()) for each in said}
    return {n: docs.get(n, "") for n in inspect.signature(verb).parameters if n not in ("run", "config")}


def _kind(parameter: inspect.Parameter) -> Any:
    """Without a default an argument by position, else a flag."""
    if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty:
        return parameter.POSITIONAL_ONLY
    return parameter.KEYWORD_ONLY


def _about(parameter: inspect.Parameter, doc: str) -> Any:
    from cyclopts import Parameter
    from cyclopts.validators import Number

    checked = Number(gte=1) if parameter.name == "round" else None
    return Parameter(help=doc, validator=checked, show_default=parameter.default not in (False, None, ()))


def _usage(name: str, parameters: Sequence[inspect.Parameter]) -> str:
    places = [p.name.upper() for p in parameters if p.kind is p.POSITIONAL_ONLY]
    return " ".join(["Usage: captioner", name, *places, "[FILE.toml] [OPTIONS] [--section.field VALUE ...]"])


# ---------------------------------------------------------------- the config


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
        elif word.endswith(".toml") and not word.startswith("-") and rest[-1:] != ["--out"]:
            if toml is not None:
                raise ConfigError("two config files", where=f"{toml} and {word}", fix="name one")
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


# ---------------------------------------------------------------- help and plans


def _overview(group: str) -> str:
    """Every command, or those of a group such as `data`. Raises ConfigError for another word."""
    names = [name for name in COMMANDS if group in ("", *HELP) or name.startswith(f"{group} ")]
    if not names:
        near = difflib.get_close_matches(group, COMMANDS, n=1)
        fix = f"did you mean `captioner {near[0]}`?" if near else "`captioner --help` lists the commands"
        raise ConfigError(f"unknown command {group}", fix=fix)
    rows = [f"  {name:18}{COMMANDS[name].help}" for name in names]
    usage = "Usage: captioner COMMAND [FILE.toml] [OPTIONS] [--section.field VALUE ...]"
    about = "Train an image captioner that corrects itself, and caption data sets with it."
    return "\n".join([usage, "", about, "", *rows, "", NOTES])


def _help(name: str, everything: bool, section: str | None) -> str:
    """The flags of a command, with the settings of its sections, or those of one section alone."""
    from rich.console import Console

    from captioner.config import Config

    width = shutil.get_terminal_size((100, 24)).columns
    sections = COMMANDS[name].sections
    if section in Config.model_fields:
        return _field_help([section], width)
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        _app(name, load(COMMANDS[name])).help_print([], console=console)
    # rich puts a panel's title three columns in
    text = "\n".join(re.sub("^   (?=[A-Z])", "", line.rstrip()) for line in capture.get().splitlines())
    if everything:
        return f"{text.rstrip()}\n\n{_field_help(['', *sections], width)}"
    notes = [SETTINGS, "--seed and --max-failed are settings of every command."]
    if sections:
        one = f"`captioner {name} --help {sections[-1]}`"
        notes.append(f"Sections: {', '.join(sections)}. {one} lists the fields of one, --help-all of all.")
    return "\n".join([text.rstrip(), "", *(line for note in notes for line in textwrap.wrap(note, width))])


def _field_help(sections: Sequence[str], width: int) -> str:
    """A line per config field of the sections ("": those in none): name, default, what it is."""
    from captioner.config import Config, fields, shown, values

    defaults = dict(values(Config()))
    lines = ["Settings, in FILE.toml or as flags:"]
    for dotted, info in fields():
        if _section(dotted) in sections:
            text = f"{info.description} (default {shown(defaults.get(dotted, info.default))})"
            lines.append(f"  --{dotted}")
            lines += textwrap.wrap(text, max(width, 48), initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def _section(dotted: str) -> str:
    return dotted.partition(".")[0] if "." in dotted else ""


def _print_plan(name: str, module: Any, run_dir: Path, config: Config, flags: dict[str, Any]) -> None:
    """What the command is made with, reads and writes. Raises RunError where an input is missing."""
    from captioner.config import Config, shown, values
    from captioner.runs import Run
    from loops import stages

    defaults = dict(values(Config()))
    print(f"captioner {name}: the plan (--dry-run writes nothing)\nsettings:")
    for dotted, value in values(config):
        if _section(dotted) in ("", *COMMANDS[name].sections):
            changed = value != defaults.get(dotted, value)
            print(
                f"  {dotted} = {shown(value)}"
                + (f"   # default {shown(defaults[dotted])}" if changed else "")
            )
    run, wanted = Run(run_dir, config), inspect.signature(module.plan).parameters
    plans = module.plan(run, **{flag: value for flag, value in flags.items() if flag in wanted})
    print("\n".join(stages.shown(run, plans)))
    stages.check_all(run, plans)
