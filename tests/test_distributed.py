"""Several processes train as one: real processes, gloo on the CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from captioner.config import Config, load, load_json
from captioner.errors import ConfigError
from captioner.fit import distributed, sharding
from captioner.method import rounds
from captioner.models import soft_prompt
from loops import golden, qa, sft
from loops.cli import main
from tests import killed
from tests.test_adapters import inputs, logits, snapshot
from tests.test_adapters import train as step
from tests.test_demo import small
from tests.tiny import tiny_captioner, tiny_checkpoint

FIELDS = {
    "model.device": "cpu",
    "sft.data": "scenes:sft:11",
    "sft.validation": "scenes:validation:5",
    "sft.columns": "shorthand,questions",
    "sft.questions_per_image": "2",
    "sft.multi_view_share": "0.5",
    "sft.soft_prompt.length": "3",
    "sft.training.max_steps": "16",
    "sft.training.per_device_train_batch_size": "1",
    "sft.training.learning_rate": "3e-3",
    "sft.training.save_steps": "4",
    "sft.training.logging_steps": "1",
}
MAIN = "import sys; from loops.cli import main; sys.exit(main(sys.argv[1:]))"


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python")
TORCHRUN += ("--", sys.executable)  # else torchrun takes our --run for one of its own


def start(
    run: Path, fields: dict[str, str], *words: str, launcher: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    flags = [word for name, value in fields.items() for word in (f"--{name}", value)]
    command = [sys.executable, *launcher, "-c", MAIN, "sft", "--run", str(run), *flags, *words]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def logged(run: Path, name: str) -> list[float]:
    lines = map(json.loads, (run / "sft" / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_two_processes_equal_one_with_twice_the_accumulation_and_a_killed_rank_stops_both(
    tmp_path: Path,
) -> None:
    tiny_checkpoint(tmp_path / "base")
    fields = FIELDS | {"model.path": str(tmp_path / "base")}
    one: Config = load(None, fields | {"sft.training.gradient_accumulation_steps": "2"})
    sft.sft(tmp_path / "one", one)

    two = start(tmp_path / "two", fields, "--gpus", "2")
    while two.poll() is None and not list((tmp_path / "two").glob("sft/checkpoints/*/trainer_state.json")):
        time.sleep(0.01)
    ranks = children(two.pid)
    os.kill(ranks[1], signal.SIGKILL)
    _, said = two.communicate(timeout=400)
    assert two.returncode == 2, said
    assert said.splitlines() == [
        "rank 1 of 2 was killed by signal 9; the others were stopped",
        "  fix:   the same command goes on from the last checkpoint",
    ]
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)

    again = start(tmp_path / "two", fields, "--gpus", "2")
    told, said = again.communicate(timeout=400)
    assert again.returncode == 0, said
    assert "resuming from step" in told and told.count("trained parameters:") == 1
    for name in ("loss", "validation_loss"):
        expected = logged(tmp_path / "one", name)
        assert len(expected) == (16 if name == "loss" else 4)
        # metrics.jsonl has losses rounded to four decimals, validation losses in full
        assert logged(tmp_path / "two", name) == pytest.approx(expected, abs=1.01e-4, rel=1e-5)
    assert logged(tmp_path / "two", "validation_loss") == pytest.approx(
        logged(tmp_path / "one", "validation_loss"), rel=1e-5
    )


@pytest.mark.slow
def test_two_processes_fill_the_shards_of_a_round_with_the_rows_of_one(tmp_path: Path) -> None:
    settings = small(tmp_path)
    settings["golden"]["shard_rows"] = 2  # three shards: the ranks' shares are not equal
    config = Config.model_validate(settings)
    sft.sft(tmp_path / "one", config)
    qa.qa(tmp_path / "one", config, 1)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    golden.golden(tmp_path / "one", config, 1)
    golden.golden(tmp_path / "two", config, 1, gpus=2)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one/round-1").rglob("*.parquet")]
    assert sum(path.parent.name in ("candidates", "claims", "pairs") for path in files) == 9
    count = Counter[str]()
    for file in files:
        rows = [pq.read_table(tmp_path / name / file).to_pylist() for name in ("one", "two")]
        assert rows[0] == rows[1], file
        count[file.parent.name] += len(rows[0])
    assert all(count[name] for name in ("candidates", "claims", "pairs"))


@pytest.mark.slow
def test_iterate_in_two_processes_killed_in_the_middle_ends_with_the_rows_of_one(tmp_path: Path) -> None:
    run = killed.begin(tmp_path / "two")
    two = killed.Iterate(sys.executable, run, "--gpus", "2")
    two.killed_in("candidates")
    two.done()
    killed.check_rows(run)
    one = killed.copied(run, tmp_path / "one")
    for name in (*rounds.STAGES, "planted"):
        shutil.rmtree(one / "round-1" / name)
    golden.golden(one, load_json(run / "config.json"), 1)
    for name in rounds.STAGES:
        for part in ("", "failed"):
            assert killed.rows(one / "round-1" / name / part) == killed.rows(run / "round-1" / name / part)
        assert killed.rows(one / "round-1" / name)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_ranks_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """kill -9 of the launcher alone, once its ranks, found in /proc, have begun; then they have a minute."""
    tiny_checkpoint(tmp_path / "base")
    launcher = start(tmp_path / "run", FIELDS | {"model.path": str(tmp_path / "base")}, "--gpus", "2")
    while not (ranks := children(launcher.pid)) or not (tmp_path / "run" / "sft").exists():
        time.sleep(0.01)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_full_tuning_in_parts_under_torchrun(tmp_path: Path) -> None:
    """Sharded over two processes that are killed on the way: the losses and the checkpoint of one process."""
    tiny_checkpoint(tmp_path / "base")
    fields = FIELDS | {"model.path": str(tmp_path / "base"), "sft.tuning.type": "full"}
    fields |= {"sft.training.max_steps": "8", "sft.training.early_stopping_patience": "9"}
    one: Config = load(None, fields | {"sft.training.gradient_accumulation_steps": "2"})
    sft.sft(tmp_path / "one", one)

    two = start(tmp_path / "two", fields, launcher=TORCHRUN)
    while two.poll() is None and not list((tmp_path / "two").glob("sft/checkpoints/*/trainer_state.json")):
        time.sleep(0.01)
    os.kill(children(two.pid)[1], signal.SIGKILL)
    two.communicate(timeout=400)
    assert two.returncode != 0 and not (tmp_path / "two" / "sft" / "stage.json").exists()
    again = start(tmp_path / "two", fields, launcher=TORCHRUN)
    told, said = again.communicate(timeout=400)
    assert again.returncode == 0, said
    assert "resuming from step 4" in told

    assert len(logged(tmp_path / "one", "loss")) == 8
    assert logged(tmp_path / "two", "loss") == pytest.approx(logged(tmp_path / "one", "loss"), abs=1.01e-4)
    for name in ("grad_norm", "validation_loss"):
        assert logged(tmp_path / "two", name) == pytest.approx(logged(tmp_path / "one", name), rel=1e-4)
    wanted, found = (
        load_file(tmp_path / name / "sft" / "captioner" / "model.safetensors") for name in ("one", "two")
    )
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=1e-4, msg=name)
    name = "model.language_model.layers.0.mlp.gate_proj.weight"
    assert (wanted[name] - base[name]).abs().max() > 5e-3


@pytest.mark.parametrize("half", [False, True])
def test_sharded_parameters_and_the_model_that_comes_out(half: bool) -> None:
    captioner = tiny_captioner()
    soft_prompt.attach(captioner, 3, "Caption")
    before, stock = snapshot(captioner, lambda _: True), type(captioner.model)
    fed = inputs(captioner, [*captioner.soft_prompt_ids, 40, 41, 42, 43])
    expected = logits(captioner, fed)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with sharding.sharded(captioner, "cpu", bfloat16=half):
            assert all(isinstance(p, DTensor) for p in captioner.model.parameters())
            found = logits(captioner, fed)
            assert found.dtype == (torch.bfloat16 if half else torch.float32)
            assert torch.equal(found, expected) != half
            assert (found - expected).abs().max() < 0.1 * expected.abs().max()
            step(captioner, fed=fed)
            assert {p.grad.dtype for p in captioner.model.parameters()} == {torch.float32}  # type: ignore[union-attr]
            moved = {name: p.full_tensor() for name, p in captioner.model.named_parameters()}  # type: ignore[attr-defined]
    finally:
        torch.distributed.destroy_process_group()
    assert type(captioner.model) is stock
    assert captioner.model.get_output_embeddings().weight is captioner.model.get_input_embeddings().weight
    after = dict(captioner.model.named_parameters())
    assert not any(isinstance(p, DTensor) for p in after.values()) and after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in moved.items())
    still = [name for name, value in before.items() if torch.equal(after[name], value)]
    assert [name for name in still if ".pos_embed" not in name] == []
    logits(captioner, fed)


@pytest.mark.slow
def test_a_message_of_another_rank_is_passed_on(tmp_path: Path) -> None:
    """Of two images one breaks after it was looked at; with a batch of one it is rank 0's or rank 1's."""
    tiny_checkpoint(tmp_path / "base")
    from captioner.lab import grid as scenes

    scenes.write("sft", 2, tmp_path / "images")
    bad = sorted((tmp_path / "images" / "images").glob("*.png"))[1]
    fields = FIELDS | {"model.path": str(tmp_path / "base"), "sft.data": str(tmp_path / "images")}
    broken = start(tmp_path / "run", fields | {"sft.validation": "none"}, "--gpus", "2")
    while broken.poll() is None and not list((tmp_path / "run").glob("sft/failed/*.parquet")):
        time.sleep(0.01)
    bad.write_bytes(b"no image")
    _, said = broken.communicate(timeout=400)
    assert broken.returncode == 2
    assert said.count("bad image") == 1 and "captioner sft ended with exit code 2" in said
    assert str(bad) in said and "Traceback" not in said


def test_fewer_gpus_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match="--gpus 3, and there are 1") as caught:
        distributed.launch("sft", "run", Config(), 3)
    assert caught.value.fix == "--gpus 1"


def test_other_commands_refuse_several_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["caption", "images/"]) == 2
    assert "captioner caption runs in one process" in capsys.readouterr().err
