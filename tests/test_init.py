"""`captioner init`: settings for a model and a machine, and what stops where data are not named."""

import json
import tomllib
from pathlib import Path

import pytest

from captioner import presets
from captioner.config import DATA_FIELDS, Config, defaulted, load
from captioner.errors import CheckpointError, ConfigError
from captioner.runs import Run, checkpoint_path
from loops import cli, iterate, sft, stages

BILLIONS = {"Qwen3-VL-2B": 2.1, "Qwen3-VL-4B": 4.4, "Qwen3-VL-8B": 8.8, "Qwen2.5-VL-7B": 8.3}
MACHINES = [(1, 24.0), (1, 80.0), (8, 80.0)]


def checkpoint(folder: Path, billions: float) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "qwen3_vl"}')
    index = {"metadata": {"total_size": round(billions * 2e9)}, "weight_map": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("model", BILLIONS)
@pytest.mark.parametrize("machine", MACHINES)
def test_every_preset_is_a_config(model: str, machine: tuple[int, float], tmp_path: Path) -> None:
    where = checkpoint(tmp_path / model, BILLIONS[model])
    out = tmp_path / "captioner.toml"
    words = ["init", "--model", str(where), "--gpus", str(machine[0]), "--gpu-memory", str(machine[1])]
    assert cli.main([*words, "--out", str(out)]) == 0
    config = load(out)
    training = config.sft.training
    assert config.model.path == str(where)
    assert config.model.load_in_4bit == (machine[1] == 24 and BILLIONS[model] > 7)
    assert (
        32 <= training.per_device_train_batch_size * training.gradient_accumulation_steps * machine[0] <= 128
    )
    assert training.learning_rate < 1e-3 and training.num_train_epochs == 3
    longest = config.golden.sampling.max_tokens
    assert longest == config.pairs.max_tokens == config.evaluate.max_tokens > config.golden.max_tokens
    tree = tomllib.loads(out.read_text())
    assert "data" not in tree["sft"] and "images" not in tree["golden"]
    said = out.read_text()
    assert all(f"# {name.partition('.')[2]} = " in said for name in DATA_FIELDS)


def test_an_existing_file_and_a_card_too_small_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = checkpoint(tmp_path / "model", 30.0)
    words = ["init", "--model", str(where), "--gpu-memory", "24", "--out", str(tmp_path / "a.toml")]
    assert cli.main(words) == 2
    assert "take a card of 30 GB or more" in capsys.readouterr().err
    (tmp_path / "a.toml").write_text("mine")
    assert cli.main([*words[:3], "--out", str(tmp_path / "a.toml")]) == 2
    assert (tmp_path / "a.toml").read_text() == "mine"
    assert cli.main([*words[:3], "--out", str(tmp_path / "a.toml"), "--force"]) == 0


def test_a_checkpoint_without_weights_or_index_is_refused(tmp_path: Path) -> None:
    where = checkpoint(tmp_path / "model", 2.0)
    (where / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="no index that tells their size"):
        presets.read_sizes(where)
    (where / "model.safetensors").write_bytes(b"0" * 4000)
    assert presets.read_sizes(where).parameters == pytest.approx(2e-6)


@pytest.mark.parametrize("field", DATA_FIELDS)
def test_scenes_are_never_the_silent_default_of_another_model(field: str, tmp_path: Path) -> None:
    """The default names its field; other scenes, own data and the shipped base are as they were."""
    section, name = field.split(".")
    default = getattr(getattr(Config(), section), name)
    source = default[0] if isinstance(default, tuple) else default
    other = load(None, {"model.path": str(tmp_path)})
    assert defaulted(Config(), source) is None
    assert defaulted(other, source) == field
    assert defaulted(load(None, {"model.path": str(tmp_path), field: "scenes:sft:3"}), "scenes:sft:3") is None
    planned = stages.StagePlan("", {"data": source})
    with pytest.raises(ConfigError, match=f"{field} is not set"):
        stages.check(Run(tmp_path / "run", other), planned)


def test_commands_stop_before_they_train(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    own = {"model.path": str(tmp_path / "model"), "sft.data": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"sft\.validation is not set"):
        sft.sft(tmp_path / "run", load(None, own))
    run = Run.open(tmp_path / "run", Config())
    named = own | {"qa.data": str(tmp_path), "golden.images": str(tmp_path), "gate.data": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"evaluate\.data is not set"):
        iterate.iterate(run, load(None, named))


def test_a_hub_id_is_found_in_the_cache_or_its_command_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="hf download Qwen/Some-VL"):
        checkpoint_path("Qwen/Some-VL")
    home = tmp_path / "models--Qwen--Some-VL"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    checkpoint(home / "snapshots" / "abc", 2.0)
    assert checkpoint_path("Qwen/Some-VL") == home / "snapshots" / "abc"
    assert checkpoint_path(str(tmp_path)) == tmp_path
