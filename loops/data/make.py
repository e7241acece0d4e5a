"""captioner data reformulate SET | questions SET, both --out OUTPUT: training sets from captions.

``reformulate`` makes the set for SFT: prose captions become dense shorthand, by the tool LLM. ``questions``
makes the set for the verifier: balanced yes/no questions, of which no model can tell the answers by their
words alone.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from captioner.config import Config
from captioner.errors import ConfigError, DataError
from captioner.files import atomic_dir, atomic_write_json
from captioner.records import Failed
from captioner.runs import Run, RunDir, Shards
from captioner.sources.folder import json_line, link_image, read_folder
from loops.data.edge import check_free, folder_of, plan, report

__all__ = ["plan", "questions", "reformulate"]


def reformulate(
    run: RunDir, config: Config, source: str, *, out: Path | None = None, check: bool = False
) -> Path | None:
    """Make the set for SFT: prose captions of images become shorthand; returns the new folder.

    Args:
        run: Run directory that keeps the answers of the tool LLM.
        config: Settings; `tool` and `max_failed` are read.
        source: Images with prose captions.
        out: Folder to write; a new one.
        check: Write nothing: measure which facts are kept. SOURCE is a file like data/reformulation.jsonl.

    Raises:
        Refused: more than `max_failed` of the captions failed.
    """
    from captioner.method import reformulate as method
    from captioner.method.llm import make_tool

    if out is None and not check:
        raise ConfigError("no output to write", where="--out", fix="add --out FOLDER, or --check")
    home = Run.path_of(run)
    tool = make_tool(config.tool, home / "tool")
    try:
        if out is None:
            print(method.fidelity_table(method.read_checked(Path(source)), tool))
            return None
        check_free(out)
        with folder_of(source) as folder:
            count, failed = method.reformulate(folder, out, tool)
    finally:
        tool.close()
    report(count, Counter(each.reason for each in failed), config.max_failed, out, "captions reformulated")
    return out


def questions(run: RunDir, config: Config, source: str, *, out: Path, per_image: int = 16) -> Path:
    """Make the set for the verifier: balanced yes/no questions from captions; returns the new folder.

    Args:
        run: Not read.
        config: Settings; `seed` and `max_failed` are read.
        source: Images with captions, prose or shorthand.
        out: Folder to write; a new one. It is a source of `qa.data`.
        per_image: Questions of an image at most, half of them with the answer yes.

    Raises:
        Refused: more than `max_failed` of the images have no caption, or none that can be asked about.
    """
    from captioner.method.asking import ask

    check_free(out)
    with folder_of(source) as folder:
        rows = read_folder(folder)
        told = {row.key: row for row in rows if row.caption and not row.error}
        if not told:
            raise DataError("no image has a caption", where=source, fix="docs/formats.md has the forms")
        asked = ask({key: row.caption or "" for key, row in told.items()}, per_image, config.seed)
        failed = [
            Failed(
                sample="",
                key=row.key,
                reason=row.error or ("nothing to ask about" if row.caption else "no caption"),
            )
            for row in rows
            if row.key not in asked.questions
        ]
        with atomic_dir(out) as part:
            with (part / "metadata.jsonl").open("w", encoding="utf-8") as file:
                for key, own in asked.questions.items():
                    name = link_image(told[key], folder, part)
                    file.write(json_line({"file_name": name, "text": told[key].caption, "questions": own}))
            Shards(part / "failed", Failed).write(0, failed)
            atomic_write_json(part / "blind.json", _blind(asked))
    print(_table(asked))
    report(
        len(asked.questions),
        Counter(each.reason for each in failed),
        config.max_failed,
        out,
        "images asked about",
    )
    return out


def _blind(asked: Any) -> dict[str, Any]:
    """What a model without the images reaches, as JSON; NaN as null."""
    about = {
        "blind_accuracy": asked.blind,
        "blind_accuracy_before_balancing": asked.blind_before,
        "by_kind": {
            kind: {"questions": n, "blind_accuracy": blind} for kind, (n, blind) in asked.by_kind.items()
        },
        "by_stratum": asked.by_stratum,
        "pairs_left_out": asked.left_out,
    }
    return json.loads(json.dumps(about), parse_constant=lambda name: None)  # type: ignore[no-any-return]


def _table(asked: Any) -> str:
    lines = [f"{'kind':10}{'questions':>10}{'blind':>8}"]
    lines += [f"{kind:10}{count:10,}{blind:8.2f}" for kind, (count, blind) in asked.by_kind.items()]
    count = sum(count for count, _ in asked.by_kind.values())
    lines.append(f"{'all':10}{count:10,}{asked.blind:8.2f}")
    strata = ", ".join(f"{count:,} {stratum}" for stratum, count in asked.by_stratum.items())
    lines.append(f"false statements: {strata}")
    lines.append(
        f"a model that sees words alone tells {asked.blind:.0%} of the answers (chance 50%; before balancing "
        f"{asked.blind_before:.0%}); {asked.left_out:,} pairs left for that"
    )
    return "\n".join(lines)
