"""Lines of code by capability, at another commit and now: blank lines, comments and docstrings do not count.

python -m benchmarks.size --before 4c542e4
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import tokenize
from collections import Counter
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
# The first prefix that a file's path begins with decides.
CAPABILITIES = {
    "laboratory: scenes, bases, their judge": (
        *("captioner/lab", "captioner/scenes.py", "loops/scenes.py", "loops/demo.py"),
        "captioner/laboratory.py",
    ),
    "studies": ("loops/stud",),
    "data sets: read, write, make, filter": (
        *("captioner/sources", "captioner/layouts", "captioner/formats", "loops/data"),
        *(
            "captioner/method/reformulate.py",
            "captioner/method/shorthand.py",
            "captioner/method/annotations.py",
        ),
    ),
    "images into views": ("captioner/views.py",),
    "models: load, adapters, render, fuse, export": (
        *("captioner/models", "captioner/adapters.py", "captioner/model.py", "captioner/render.py"),
        *("captioner/fuse.py", "captioner/soft_prompt.py", "loops/export.py"),
    ),
    "engines: transformers, vLLM, servers": ("captioner/engines", "loops/serve.py"),
    "bulk jobs": ("captioner/pipeline", "captioner/bulk", "loops/caption.py"),
    "training: SFT, QA, preferences": (
        *("captioner/fit", "captioner/train.py", "captioner/preference.py", "captioner/losses.py"),
        *("captioner/alarms.py", "captioner/distributed.py", "captioner/sharding.py"),
        *("loops/sft.py", "loops/dpo.py", "loops/qa.py"),
    ),
    "rounds: tool, questions, verdicts, golden captions": (
        *("captioner/method", "captioner/golden.py", "captioner/pairs.py", "captioner/planted.py"),
        *("captioner/qa.py", "captioner/tool.py", "loops/golden.py", "loops/iterate.py"),
    ),
    "truth: judges, gate, references, verify, review": (
        *("captioner/judges", "captioner/metrics.py", "loops/evaluate.py", "loops/verify.py"),
        *("loops/review.py", "captioner/report/review"),
    ),
    "report": ("captioner/report", "loops/report.py"),
    "settings, records, runs, command line": ("captioner", "loops"),
}


def lines(source: str) -> int:
    """Lines that hold code."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.body and isinstance(node.body[0], ast.Expr) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in silent | {tokenize.ENDMARKER}
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(code - documented)


def counted(files: dict[str, str]) -> Counter[str]:
    """Lines of each capability."""
    found: Counter[str] = Counter()
    for path, source in files.items():
        of = next(name for name, starts in CAPABILITIES.items() if path.startswith(starts))
        found[of] += lines(source)
    return found


def at(commit: str) -> dict[str, str]:
    """The sources at a commit."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=REPO, capture_output=True, text=True, check=True).stdout

    listed = git("ls-tree", "-r", "--name-only", commit, "captioner", "loops").splitlines()
    return {path: git("show", f"{commit}:{path}") for path in listed if path.endswith(".py")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--before", default="4c542e4", help="commit to compare with (default: version 0.1)")
    before = counted(at(parser.parse_args().before))
    here = [*(REPO / "captioner").rglob("*.py"), *(REPO / "loops").rglob("*.py")]
    now = counted({str(file.relative_to(REPO)): file.read_text(encoding="utf-8") for file in here})
    print("| capability | before | now |\n|---|---|---|")
    for name in CAPABILITIES:
        print(f"| {name} | {before[name]:,} | {now[name]:,} |")
    print(f"| all | {before.total():,} | {now.total():,} |")


if __name__ == "__main__":
    main()
