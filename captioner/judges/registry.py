"""Every benchmark by name, and the one function that a command calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from captioner.errors import ConfigError, DataError
from captioner.judges import amber, chair, dcscore, fixed_budget, mmhal, pope, references
from captioner.judges.scores import Scores


@dataclass(frozen=True)
class Benchmark:
    """``score(given, annotations, **options)``, what is given to it by key, and what the annotations are."""

    score: Callable[..., Scores]
    given: str
    annotations: str
    form: Any = dict[str, str]  # of what is given


_REFERENCES = "a file: captions_*.json of COCO, or JSONL of {key, references} or {example_id, description}"
BENCHMARKS: Mapping[str, Benchmark] = {
    "cider": Benchmark(references.cider, "captions", _REFERENCES),
    "bleu": Benchmark(references.bleu, "captions", _REFERENCES),
    "meteor": Benchmark(references.meteor, "captions", _REFERENCES),
    "rouge_l": Benchmark(references.rouge_l, "captions", _REFERENCES),
    "chair": Benchmark(
        chair.chair, "captions", "a folder: instances_*.json and captions_*.json of COCO, synonyms.txt"
    ),
    "amber": Benchmark(
        amber.amber, "captions", "a folder: annotations.json, relation.json and safe_words.txt of AMBER"
    ),
    "pope": Benchmark(pope.pope, "answers by SPLIT/QUESTION_ID", "a folder: coco_pope_SPLIT.json"),
    "mmhal": Benchmark(
        mmhal.mmhal, "a judge's texts by the question's place", "a folder: response_template.json"
    ),
    "dcscore": Benchmark(
        dcscore.dcscore,
        "judged units by image name",
        f"a folder: {dcscore.FACTS} of DeCapBench",
        dict[str, list[dcscore.Unit]],
    ),
    "fixed_budget": Benchmark(
        fixed_budget.fixed_budget, "captions", "CaptionQA's Parquet files, or JSONL of {id, questions}"
    ),
}


def score(name: str, given: Mapping[str, Any], annotations: Path, **options: Any) -> Scores:
    """Scores of ``given`` (see :class:`Benchmark`) by the benchmark of that name.

    ``options`` are the benchmark's own: ``similar`` of amber; ``answerer``, ``budgets`` and ``seed`` of
    fixed_budget. ConfigError for an unknown name, DataError for what does not fit.
    """
    benchmark = of(name)
    try:
        checked = TypeAdapter(benchmark.form).validate_python(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{name} takes {benchmark.given}: {place} {first['msg']}") from error
    return benchmark.score(checked, annotations, **options)


def of(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise ConfigError(f"no benchmark is called {name!r}", fix=f"choose from {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
