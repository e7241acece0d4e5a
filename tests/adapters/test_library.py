"""With transformers 4.57 and the `adapters` library, in an interpreter of its own (see conftest)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from captioner.errors import ConfigError
from captioner.models import adapters, fuse
from tests.adapters.conftest import REPO, Runs
from tests.test_adapters import add, shake
from tests.tiny import tiny_captioner

pytestmark = [pytest.mark.adapters, pytest.mark.xdist_group("adapters")]


def test_inside(there: Runs) -> None:
    """Parity of our hook with the library's, and its own kinds: inside.py says what is held."""
    said = there("-m", "pytest", "-q", "-p", "no:cacheprovider", REPO / "tests" / "adapters" / "inside.py")
    assert " passed" in said and "failed" not in said and "skipped" not in said, said


def test_training_losses_and_what_0_1_trained(there: Runs) -> None:
    """The training code on transformers 4.57: the same stored losses, the same frozen captions."""
    files = [REPO / "tests" / name for name in ("test_losses.py", "test_fixture.py")]
    said = there("-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    assert " passed" in said and "failed" not in said, said


def test_an_older_transformers_reads_what_is_exported_here(there: Runs, tmp_path: Path) -> None:
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        captioner = tiny_captioner(family)
        add(captioner, "captioner", 5, 7)
        shake(captioner)
        fuse.export(captioner, tmp_path / family)
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            torch.save(captioner.model(input_ids=ids).logits, tmp_path / f"{family}.pt")
        (tmp_path / f"{family}.txt").write_text(repr(captioner.tokenizer.encode("<|im_start|>north red")))
    there("-c", _READ, tmp_path)


_READ = """
import sys
from pathlib import Path
import torch, transformers
from transformers import AutoModelForImageTextToText, AutoProcessor
assert transformers.__version__.startswith("4.57")
for expected in Path(sys.argv[1]).glob("*.pt"):
    folder = expected.with_suffix("")
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
    torch.testing.assert_close(logits, torch.load(expected, weights_only=True), atol=1e-5, rtol=1e-5)
    processor = AutoProcessor.from_pretrained(folder)
    ids = processor.tokenizer.encode("<|im_start|>north red")
    assert repr(ids) == expected.with_suffix(".txt").read_text()
    assert processor.image_processor.patch_size == 8
"""


@pytest.mark.parametrize("kind", ["pfeiffer", "houlsby"])
def test_without_the_library_its_kinds_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="need the `adapters` library") as caught:
        add(tiny_captioner(), "captioner", 5, 7, kind)  # type: ignore[arg-type]
    assert "parallel or sequential" in caught.value.fix


def test_sequential_ones_are_not_exported(tmp_path: Path) -> None:
    captioner = tiny_captioner()
    add(captioner, "captioner", 5, 7, "sequential")
    with pytest.raises(ConfigError, match="A sequential adapter cannot be exported"):
        fuse.export(captioner, tmp_path / "out")
    assert adapters.name_of(captioner) == "captioner" and not (tmp_path / "out").exists()
