"""`captioner data preferences`: TRL's own DPOTrainer trains on what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import load_dataset
from PIL import Image
from skimage import data as photographs
from trl import DPOConfig, DPOTrainer

from captioner.config import Config
from captioner.errors import Refused
from captioner.records import Pair
from captioner.runs import Run, Shards
from loops import cli
from loops.data.preferences import preferences
from tests.tiny import tiny_checkpoint

SAID = {"cat": ("cat, green eyes", "cat, red hat"), "coffee": ("cup of coffee, spoon", "cup of tea")}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A round of two photographs and three pairs; the image of the third is gone."""
    images = tmp_path / "photos"
    (images / "in").mkdir(parents=True)
    for name in SAID:
        Image.fromarray(getattr(photographs, name if name != "cat" else "chelsea")()).resize((96, 64)).save(
            images / "in" / f"{name}.jpg"
        )
    run = Run.open(tmp_path / "run", Config())
    stage = run.stage("round-1/candidates", {}, {"images": images})
    stage.finish({})
    pairs = [
        Pair(sample="0" * 64, key=f"in/{name}", chosen=chosen, rejected=rejected, k=0, refuted_in_rejected=1)
        for name, (chosen, rejected) in SAID.items()
    ]
    home = run.stage_dir("round-1/pairs")
    home.mkdir(parents=True)
    Shards(home, Pair).write(0, [*pairs, pairs[0].model_copy(update={"key": "in/gone"})])
    return run


@pytest.mark.slow
def test_trl_trains_on_it(run: Run, tmp_path: Path) -> None:
    out = preferences(run, Config(max_failed=0.4), out=tmp_path / "pairs")
    rows = load_dataset(
        "parquet", data_files=str(out / "train.parquet"), split="train", cache_dir=str(tmp_path)
    )
    assert [row["chosen"][0]["content"] for row in rows] == [chosen for chosen, _ in SAID.values()]
    assert [row["images"][0].size for row in rows] == [(96, 64)] * 2
    captioner = tiny_checkpoint(tmp_path / "tiny")
    arguments = DPOConfig(
        output_dir=str(tmp_path / "dpo"), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
        use_cpu=True, report_to=[], max_length=None, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    before = captioner.model.get_input_embeddings().weight.detach().clone()
    trainer = DPOTrainer(
        captioner.model, args=arguments, train_dataset=rows, processing_class=captioner.processor
    )
    result = trainer.train()
    assert result.training_loss == pytest.approx(
        0.6931, abs=1e-3
    )  # log 2: the first step from its own reference
    assert (captioner.model.get_input_embeddings().weight != before).any()


def test_swift_reads_lines(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    words = ["data", "preferences", "--run", str(run.path), "--to", "swift", "--out", str(out)]
    assert cli.main([*words, "--max-failed", "0.4"]) == 0
    rows = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    for row, (chosen, rejected) in zip(rows, SAID.values(), strict=True):
        assert row["messages"][1] == {"role": "assistant", "content": chosen}
        assert row["rejected_response"] == rejected and row["messages"][0]["content"].startswith("<image>")
        with Image.open(out / row["images"][0]) as image:
            assert image.size == (96, 64)


def test_lost_images_and_a_round_without_pairs_are_told(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Refused, match="1 of 3 failed"):
        preferences(run, Config(max_failed=0.1), out=tmp_path / "pairs")
    words = ["data", "preferences", "--run", str(run.path), "--round", "2", "--out", str(tmp_path / "none")]
    assert cli.main(words) == 2 and "captioner golden --round 2" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
