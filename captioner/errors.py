"""Errors a person can fix: what is wrong, where, and the command that fixes it."""

import re
import signal

_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def masked(text: str) -> str:
    """The text without the names and passwords of addresses such as ``https://name:password@host``."""
    return _PASSWORD.sub("***", text)


def printable(text: str) -> str:
    """Text of somebody else on one line: no character that a terminal obeys."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


class CaptionerError(Exception):
    """Base of every typed error. ``exit_code`` is what the command line returns."""

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", fix: str = ""):
        self.what, self.where, self.fix = what, where, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        text = masked("\n".join(lines))
        return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


class UserError(CaptionerError):
    """The user can fix it; the command line prints it without a traceback and exits 2."""


class ConfigError(UserError):
    """A field, file or flag of the configuration."""


class DataError(UserError):
    """An input data set: missing, empty, keys that do not join, hostile."""


class CheckpointError(UserError):
    """A checkpoint: another architecture, missing files, pickled weights."""


class RunError(UserError):
    """A run directory: a missing stage, a stale stage, another configuration."""


class EngineError(UserError):
    """An engine: no server answers, it serves another model, it reads a prompt differently."""


class CrashedError(CaptionerError):
    """A process of a command ended by an error of ours, which it has printed; exits 1."""

    exit_code = 1


class Refused(CaptionerError):
    """A gate refused, or more rows failed than the limit allows; exits 3."""

    exit_code = 3


class Ended(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number  # as a shell has it
