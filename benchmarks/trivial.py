"""python -m benchmarks.trivial [--seeds 3]: what needs no training, on the demo's test scenes.

Greedy captions of the shipped base, as they are and without the kinds of statements that the demo's verifier
distrusts (marks and relations). What the rounds reach has to be seen beside these rows.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from captioner.config import load
from captioner.judges import metrics
from captioner.judges.appoint import known_facts
from captioner.judges.base import Said
from captioner.judges.facts import FactsJudge
from captioner.runs import Run
from captioner.sources import resolve
from captioner.sources.folder import read_folder
from loops import demo, evaluate

DISTRUSTED = ("mark", "relation")


def counts(seed: int, home: Path) -> dict[str, list[metrics.Counts]]:
    """Counts of the base's captions by row of the table, for the scenes of one seed."""
    config = load(demo.TOML).model_copy(update={"seed": seed})
    run = Run.open(home, config)
    folder = resolve(config.evaluate.data, run)
    images = read_folder(folder)
    judge = FactsJudge(known_facts(config, folder, images))
    base = evaluate.run_entries(run, config)[0]
    _, rows = evaluate.caption(run, base, folder, images)
    kept = [
        row.model_copy(update={"caption": demo.without(row.caption or "", base.prose, DISTRUSTED)})
        for row in rows
    ]
    return {
        "base": judge.count(Said("base", rows, prose=base.prose)),
        f"base, {' and '.join(DISTRUSTED)} statements deleted": judge.count(Said("deleted", kept)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="scenes of seeds 0 to N-1 (default 3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        runs = [counts(seed, Path(home) / str(seed)) for seed in range(args.seeds)]
    print("| captioner | precision | recall | F1 | hallucinated |\n|---|---|---|---|---|")
    for name in runs[0]:
        found = metrics.evaluate_runs([run[name] for run in runs])
        cells = (found[metric] for metric in ("precision", "recall", "f1", "hallucinated"))
        texts = (f"{100 * x.value:.1f} ({100 * x.low:.1f}–{100 * x.high:.1f})" for x in cells)
        print(f"| {name} | {' | '.join(texts)} |")


if __name__ == "__main__":
    main()
