"""Benchmarks by name."""

import subprocess
import sys
from pathlib import Path

import pytest

from captioner.errors import ConfigError
from captioner.judges.pope import pope
from captioner.judges.registry import BENCHMARKS, score


def test_a_benchmark_is_found_by_name_and_takes_its_own_options(tmp_path: Path) -> None:
    (tmp_path / "coco_pope_random.json").write_text(
        '{"question_id": 1, "image": "a.jpg", "text": "Is there a cat in the image?", "label": "yes"}'
    )
    answers = {"random/1": "yes"}
    assert str(score("pope", answers, tmp_path).corpus()) == str(pope(answers, tmp_path).corpus())
    with pytest.raises(TypeError, match="answerer"):
        score("fixed_budget", {"a": "a cat"}, tmp_path)
    assert {"cider", "bleu", "meteor", "rouge_l", "chair", "amber", "pope"} <= set(BENCHMARKS)


def test_an_unknown_benchmark_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'spice'[\s\S]*cider, bleu"):
        score("spice", {}, tmp_path)


def test_the_page_speaks_of_every_benchmark() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert [name for name in BENCHMARKS if f"`{name}`" not in page] == []


@pytest.mark.slow
def test_no_torch_is_loaded() -> None:
    program = "import sys, captioner.judges.registry; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
