"""The exported checkpoint is the same function, is stock, and is there whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from captioner.config import Config, ModelConfig, ViewsConfig, load
from captioner.errors import CheckpointError, ConfigError, RunError
from captioner.models import adapters, checkpoint, fuse, model, soft_prompt, stock
from captioner.models.model import Captioner
from loops import export, sft
from tests.test_adapters import add, inputs, logits, shake
from tests.tiny import tiny_captioner, tiny_checkpoint, tokenizer

FAMILIES = list(model.FAMILIES)
STOCK = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
for folder in map(Path, sys.argv[1:]):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(folder)
    fed = load_file(folder.with_suffix(".fed"))
    with torch.no_grad():
        logits = model(**fed).logits
        tokens = model.generate(**fed, max_new_tokens=12, do_sample=False)
    ids = torch.tensor(processor.tokenizer.encode("<|soft_0|> red"))
    save_file({"logits": logits, "tokens": tokens, "ids": ids}, folder.with_suffix(".result"))
assert not any(name.split(".")[0] in ("captioner", "adapters") for name in sys.modules)
"""


def adapted(family: str, dtype: torch.dtype, widths: tuple[int, int] = (5, 7), soft: int = 3) -> Captioner:
    captioner = tiny_captioner(family, dtype)
    add(captioner, "captioner", *widths)
    if soft:
        soft_prompt.attach(captioner, soft, "Caption in shorthand.")
    shake(captioner)
    return captioner


def reload(folder: Path, captioner: Captioner) -> Captioner:
    settings = {
        "path": str(folder),
        "dtype": str(captioner.model.dtype).removeprefix("torch."),
        "device": "cpu",
    }
    return model.load(ModelConfig.model_validate(settings))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_fused_is_the_same_function(
    family: str, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    captioner = adapted(family, dtype)
    fed = inputs(captioner, [*captioner.soft_prompt_ids, 40, 41])
    expected = logits(captioner, fed)
    assert (
        expected - logits(tiny_captioner(family, dtype), inputs(captioner, [40, 41, 42, 43, 44]))
    ).abs().max() > 0.5
    fuse.export(captioner, tmp_path / "out")
    again = reload(tmp_path / "out", captioner)
    assert again.soft_prompt_ids == captioner.soft_prompt_ids
    scale = float(expected.abs().max())
    assert (logits(again, fed) - expected).abs().max() <= tolerance * scale
    assert adapters.name_of(again) is None and again.model.dtype == dtype


@pytest.mark.slow
def test_stock_transformers_loads_and_generates_the_same(tmp_path: Path) -> None:
    captioners = {tmp_path / family: adapted(family, torch.float32) for family in FAMILIES}
    for folder, captioner in captioners.items():
        fuse.export(captioner, folder)
        save_file(inputs(captioner, [*captioner.soft_prompt_ids, 40, 41]), folder.with_suffix(".fed"))
    result = subprocess.run(
        [sys.executable, "-c", STOCK, *captioners],
        cwd=tmp_path,  # where this package cannot be imported from
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    base = len(tokenizer())
    for folder, captioner in captioners.items():
        stock, fed = load_file(folder.with_suffix(".result")), load_file(folder.with_suffix(".fed"))
        assert stock["logits"].shape[-1] == base + 3
        expected = logits(captioner, fed)
        assert (stock["logits"][..., :base] - expected).abs().max() <= 1e-5 * float(expected.abs().max())
        with torch.no_grad():
            tokens = captioner.model.generate(**fed, max_new_tokens=12, do_sample=False)
        assert torch.equal(stock["tokens"], tokens)
        assert stock["ids"].tolist() == [captioner.soft_prompt_ids[0], *captioner.tokenizer.encode(" red")]


@pytest.mark.parametrize("family", FAMILIES)
def test_config_names_the_new_widths(family: str, tmp_path: Path) -> None:
    captioner = adapted(family, torch.float32)
    fuse.export(captioner, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [stock.stock_class(captioner.model)]
    assert config["text_config"]["intermediate_size"] == 96 + 7
    vision = config["vision_config"]
    if family == "qwen2_vl":  # 144 + 5 units, as a whole number of times the encoder's width
        assert vision["embed_dim"] == 96 and vision["mlp_ratio"] == 2 and type(vision["mlp_ratio"]) is int
    else:
        assert vision["intermediate_size"] == 96 + 5


def test_soft_tokens_are_never_generated(tmp_path: Path) -> None:
    """Make them the likeliest tokens of all: with tied embeddings they would win."""
    captioner = adapted("qwen3_vl", torch.float32)
    with torch.no_grad():
        hidden = captioner.model.model(**inputs(captioner, [40])).last_hidden_state[0, -1]
        soft_prompt.rows(captioner).copy_(hidden * 100)
    fuse.export(captioner, tmp_path)
    from transformers import AutoModelForImageTextToText

    stock = AutoModelForImageTextToText.from_pretrained(tmp_path, local_files_only=True)
    fed = inputs(captioner, [40])
    with torch.no_grad():
        assert int(stock(**fed).logits[0, -1].argmax()) in captioner.soft_prompt_ids
        tokens = stock.generate(**fed, max_new_tokens=8, do_sample=False)[0, fed["input_ids"].shape[1] :]
    assert not set(tokens.tolist()) & set(captioner.soft_prompt_ids)
    assert tokens[0] == logits(captioner, fed)[0, -1].argmax()
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == captioner.soft_prompt_ids
    assert generation["eos_token_id"][0] == captioner.tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("widths", [(0, 6), (6, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_tower_alone(family: str, widths: tuple[int, int], tmp_path: Path) -> None:
    captioner = adapted(family, torch.float64, widths, soft=0)
    expected = logits(captioner)
    fuse.export(captioner, tmp_path / "out")
    torch.testing.assert_close(logits(reload(tmp_path / "out", captioner)), expected, atol=1e-12, rtol=1e-12)


def test_full_tuning_just_writes(tmp_path: Path) -> None:
    captioner = tiny_captioner()
    shake(captioner)
    fuse.export(captioner, tmp_path / "out", adapter=None, card={"Metrics": {"loss": 0.5}})
    assert torch.equal(logits(model.load(tmp_path / "out")), logits(captioner))
    assert "| loss | 0.5 |" in (tmp_path / "out" / "README.md").read_text()
    assert "soft_prompt_ids" not in json.loads((tmp_path / "out" / "config.json").read_text())["captioner"]


def test_views_it_was_trained_with_travel_along(tmp_path: Path) -> None:
    captioner = adapted("qwen3_vl", torch.float32)
    captioner.views = ViewsConfig(levels=(1, 3), tags=False)
    fuse.export(captioner, tmp_path / "out")
    assert model.load(tmp_path / "out").views == captioner.views


def test_untied_head(tmp_path: Path) -> None:
    from tests.tiny import VIEW_SIZE, architecture

    config = architecture("qwen3_vl", len(tokenizer()))
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    captioner = model.build_random(tmp_path / "base", config, tokenizer(), view_size=VIEW_SIZE)
    add(captioner, "captioner", 5, 7)
    soft_prompt.attach(captioner, 3, "Caption")
    shake(captioner)
    fed = inputs(captioner, captioner.soft_prompt_ids)
    expected = logits(captioner, fed)
    fuse.export(captioner, tmp_path / "out")
    again = model.load(tmp_path / "out")
    torch.testing.assert_close(logits(again, fed), expected, atol=1e-4, rtol=1e-5)
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert (
        state["lm_head.weight"].shape
        == state["model.language_model.embed_tokens.weight"].shape
        == (len(tokenizer()) + 3, 64)
    )
    assert (state["lm_head.weight"][-3:] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_rounds(family: str, tmp_path: Path) -> None:
    """Load what was exported, add an adapter, train, export again; the soft prompt travels along."""
    captioner = adapted(family, torch.float64)
    for number in (1, 2):
        fuse.export(captioner, tmp_path / f"round-{number}")
        captioner = reload(tmp_path / f"round-{number}", captioner)
        assert not soft_prompt.rows(captioner).requires_grad
        add(captioner, "captioner", 4, 6, seed=number)
        assert not soft_prompt.rows(captioner).requires_grad
        shake(captioner, seed=number)
    fed = inputs(captioner, captioner.soft_prompt_ids)
    expected = logits(captioner, fed)
    fuse.export(captioner, tmp_path / "last")
    last = reload(tmp_path / "last", captioner)
    torch.testing.assert_close(logits(last, fed), expected, atol=1e-11, rtol=1e-11)
    assert len(last.tokenizer) == len(tokenizer()) + 3
    assert last.model.config.text_config.intermediate_size == 96 + 7 + 6 + 6
    mlp = captioner.family.vision_mlp  # zeros that filled a block up are not kept from round to round
    width = last.visual.blocks[0].mlp.get_submodule(mlp.output).weight.shape[1]
    assert width == (192 if family == "qwen2_vl" else 96 + 5 + 4 + 4)


def test_exporting_leaves_the_captioner_as_it_was(tmp_path: Path) -> None:
    captioner = adapted("qwen3_vl", torch.float32)
    before, config = logits(captioner), captioner.model.config.to_dict()
    fuse.export(captioner, tmp_path / "out")
    assert torch.equal(logits(captioner), before)
    assert captioner.model.config.to_dict() == config and adapters.name_of(captioner) == "captioner"


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_no_half_written_directory(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = adapted("qwen3_vl", torch.float32)
    out = tmp_path / "out"
    if exists:
        tiny_checkpoint(out)
    before = {file.name: file.read_bytes() for file in out.iterdir()} if exists else None

    def fail(folder: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(captioner.processor, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        fuse.export(captioner, out)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if exists else [])
    assert before is None or before == {file.name: file.read_bytes() for file in out.iterdir()}


def test_sequential_and_unknown_adapters_are_refused(tmp_path: Path) -> None:
    captioner = tiny_captioner()
    add(captioner, "captioner", 5, 7, "sequential")
    with pytest.raises(ConfigError, match="sequential adapter cannot be exported"):
        fuse.export(captioner, tmp_path / "out")
    with pytest.raises(ConfigError, match="no adapter 'qa'"):
        fuse.export(captioner, tmp_path / "out", adapter="qa")
    assert not list(tmp_path.iterdir())


def test_misfitting_plan_changes_nothing() -> None:
    captioner = adapted("qwen3_vl", torch.float32)
    plan = adapters.delta(captioner, "captioner")
    plan[-1].weights["up_proj"] = plan[-1].weights["up_proj"][:, :-1]
    state = adapters.base_state(captioner)
    before = dict(state)
    with pytest.raises(CheckpointError, match="expected") as caught:
        fuse.fuse(state, plan)
    assert caught.value.where == "model.language_model.layers.1.mlp.up_proj.weight"
    assert all(state[name] is value for name, value in before.items())


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────


def test_export_command_fuses_an_adapter_folder(tmp_path: Path) -> None:
    captioner = tiny_checkpoint(tmp_path / "base", "qwen3_vl")
    add(captioner, "captioner", 5, 7)
    soft_prompt.attach(captioner, 3, "Caption")
    shake(captioner)
    adapters.save(captioner, "captioner", tmp_path / "adapter")
    soft_prompt.save(captioner, tmp_path / "adapter")
    config = Config(model=ModelConfig(path=str(tmp_path / "base")))
    out = tmp_path / "out"
    export.export("none", config, adapter=tmp_path / "adapter", out=out)
    fed = inputs(captioner, captioner.soft_prompt_ids)
    torch.testing.assert_close(logits(model.load(out), fed), logits(captioner, fed), atol=1e-4, rtol=1e-4)
    with pytest.raises(RunError, match="something at the place"):
        export.export("none", config, adapter=tmp_path / "adapter", out=out)
    export.export("none", config, adapter=tmp_path / "adapter", out=out, redo=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="holds no adapter"):
        export.export("none", config, adapter=tmp_path / "empty", out=tmp_path / "other")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    with pytest.raises(RunError, match="something at the place"):
        export.export("none", config, adapter=tmp_path / "adapter", out=tmp_path / "precious", redo=True)


def test_export_command_writes_the_runs_captioner(tmp_path: Path) -> None:
    from captioner.runs import Run

    config = Config(model=ModelConfig(path="unused"))
    run = Run.open(tmp_path / "run", config)
    captioner = adapted("qwen2_vl", torch.float64)
    fuse.export(captioner, run.captioner_dir(0))
    export.export(tmp_path / "run", config, out=tmp_path / "out")
    fed = inputs(captioner, captioner.soft_prompt_ids)
    again = reload(tmp_path / "out", captioner)  # float64, as it was stored
    torch.testing.assert_close(logits(again, fed), logits(captioner, fed), atol=1e-12, rtol=1e-12)
    assert checkpoint.stored_dtype(tmp_path / "out") == "float64"


@pytest.mark.slow
def test_export_command_verifies_and_tells_of_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A LoRA training of the sft command, exported from its adapter folder and from the run."""
    tiny_checkpoint(tmp_path / "base")
    fields = {
        "model.path": str(tmp_path / "base"),
        "sft.data": "scenes:sft:3",
        "sft.validation": "none",
        "sft.tuning.type": "lora",
        "sft.tuning.parts": "merger",
        "sft.training.logging_steps": "1",
        "sft.soft_prompt.length": "2",
        "sft.training.max_steps": "2",
        "sft.training.per_device_train_batch_size": "1",
    }
    config = load(None, fields)
    run = tmp_path / "run"
    sft.sft(run, config)
    assert "lora_A" in capsys.readouterr().out
    adapter = run / "sft" / "adapter"
    export.export(run, config, out=tmp_path / "out", adapter=adapter, verify=True, multiple=32)
    assert "verified on 4 prompts: logits differ by at most" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("## Verified", "## Training: sft", "sft.tuning.type | lora", "| loss |", "scenes:sft:3"):
        assert part in card, part
    assert str(tmp_path) not in card
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["intermediate_size"] == 96
    )
    export.export(run, config, out=tmp_path / "again", verify=True)
    assert "differ by at most 0 of" in capsys.readouterr().out  # it was a stock checkpoint before


@pytest.mark.slow
def test_sequential_adapters_are_trained_and_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_checkpoint(tmp_path / "base")
    fields = {
        "model.path": str(tmp_path / "base"),
        "sft.data": "scenes:sft:2",
        "sft.validation": "none",
        "sft.tuning.placement": "sequential",
        "sft.training.max_steps": "1",
        "sft.training.per_device_train_batch_size": "1",
    }
    config = load(None, fields)
    sft.sft(tmp_path / "run", config)
    assert "cannot hold sequential adapters" in capsys.readouterr().out
    home = tmp_path / "run" / "sft"
    assert (home / "stage.json").is_file() and not (home / "captioner").exists()
    with pytest.raises(ConfigError, match="sequential adapter cannot be exported"):
        export.export("none", config, adapter=home / "adapter", out=tmp_path / "out")
    with pytest.raises(RunError, match="no captioner yet"):
        export.export(tmp_path / "run", config, out=tmp_path / "out")
