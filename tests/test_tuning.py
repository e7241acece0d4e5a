"""Every way to tune: what trains, what stays bit-equal, and that the export is the tuned function."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from captioner.config import (
    AdapterTuning,
    Config,
    FullTuning,
    LoraTuning,
    ModelConfig,
    PartsTuning,
    SoftPromptConfig,
    Tuning,
    ViewsConfig,
    load,
)
from captioner.errors import CheckpointError, ConfigError, Refused
from captioner.fit import fit
from captioner.models import adapters, fuse, model, soft_prompt
from captioner.models.card import model_card
from captioner.models.model import Captioner, describe_trainable
from captioner.models.render import Prompt, Renderer
from loops.studies import _arms
from loops.studies import tuning as study
from loops.study import measure
from tests.test_adapters import inputs, logits, shake, snapshot
from tests.test_adapters import train as step
from tests.test_fuse import reload
from tests.tiny import tiny_captioner, tiny_checkpoint

FAMILIES = list(model.FAMILIES)
EVERYWHERE: Any = ("language", "vision", "merger")
TUNINGS: dict[str, Tuning] = {
    "adapters": AdapterTuning(vision_width=5, language_width=7),
    "adapters in some layers": AdapterTuning(
        vision_width=5, language_width=7, vision_layers=(-1,), language_layers=(0,)
    ),
    "lora": LoraTuning(r=3, lora_alpha=3.0, targets=EVERYWHERE),
    "rslora": LoraTuning(r=3, lora_alpha=3.0, use_rslora=True),
    "dora": LoraTuning(method="dora", r=3, lora_alpha=3.0, targets=EVERYWHERE),
    "vera": LoraTuning(method="vera", r=8, targets=EVERYWHERE),
    "lora and merger": LoraTuning(r=3, lora_alpha=3.0, parts=("merger",)),
    "merger": PartsTuning(parts=("merger",)),
    "vision": PartsTuning(parts=("vision",)),
    "language": PartsTuning(parts=("language",)),
    "head": PartsTuning(parts=("head",)),
    "soft prompt": PartsTuning(parts=()),
    "full": FullTuning(),
}
SOFT = SoftPromptConfig(length=3, init="Caption in shorthand.")


def tuned(tuning: Tuning, family: str = "qwen3_vl", dtype: torch.dtype = torch.float32) -> Captioner:
    captioner = tiny_captioner(family, dtype)
    fit.tune(captioner, tuning, SOFT, seed=4)
    return captioner


def fed(captioner: Captioner) -> dict[str, torch.Tensor]:
    return inputs(captioner, [*captioner.soft_prompt_ids, 40, 41, 42, 43])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TUNINGS)
def test_frozen_stays_trainable_moves_and_the_export_is_the_same(
    name: str, family: str, tmp_path: Path
) -> None:
    captioner = tuned(TUNINGS[name], family, torch.float64)
    words = captioner.tokenizer.encode("Caption in shorthand.")[:3]
    plain = logits(tiny_captioner(family, torch.float64), inputs(captioner, [*words, 40, 41, 42, 43]))
    torch.testing.assert_close(logits(captioner, fed(captioner)), plain, atol=1e-12, rtol=1e-12)

    if name != "full":
        shake(captioner)  # at first some matrices are zero, and their partners get no gradient
    frozen = snapshot(captioner, lambda p: not p.requires_grad)
    moving = snapshot(captioner, lambda p: p.requires_grad)
    step(captioner, fed=fed(captioner))
    now = dict(captioner.model.named_parameters())
    assert all(torch.equal(now[key], value) for key, value in frozen.items())
    still = [key for key, value in moving.items() if torch.equal(now[key], value)]
    assert still == [] or (name in ("full", "vision") and all(".pos_embed" in key for key in still))

    expected = logits(captioner, fed(captioner))
    assert (expected - plain).abs().max() > 1e-2
    fuse.export(captioner, tmp_path / "out", adapters.name_of(captioner))
    again = reload(tmp_path / "out", captioner)
    scale = float(expected.abs().max())
    assert (logits(again, fed(captioner)) - expected).abs().max() <= 1e-12 * scale
    assert torch.equal(logits(captioner, fed(captioner)), expected)  # exporting changes nothing


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "dora", "vera", "lora and merger", "adapters in some layers"])
def test_float32_export_and_saved_adapter(name: str, tmp_path: Path) -> None:
    captioner = tiny_checkpoint(tmp_path / "base")
    fit.tune(captioner, TUNINGS[name], SOFT, seed=4)
    shake(captioner)
    expected = logits(captioner, fed(captioner))
    adapters.save(captioner, fit.ADAPTER, tmp_path / "adapter")
    soft_prompt.save(captioner, tmp_path / "adapter")
    again = model.load(tmp_path / "base")
    adapters.load(again, "other", tmp_path / "adapter")
    soft_prompt.load(again, tmp_path / "adapter")
    assert torch.equal(logits(again, fed(captioner)), expected)
    fuse.export(again, tmp_path / "out", "other")
    found = logits(model.load(tmp_path / "out"), fed(captioner))
    assert (found - expected).abs().max() <= 1e-5 * float(expected.abs().max())
    manifest = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert manifest["type"] == TUNINGS[name].type and manifest["base"] == adapters.fingerprint(
        model.load(tmp_path / "base")
    )
    with pytest.raises(CheckpointError, match="another base"):
        adapters.load(tiny_captioner(seed=1), "captioner", tmp_path / "adapter")


def test_table_of_what_trains() -> None:
    def rows(name: str) -> dict[str, int]:
        return {module: count for module, count, _ in describe_trainable(tuned(TUNINGS[name]).model)}

    soft = {"model.language_model.embed_tokens": 3 * 64}
    assert rows("soft prompt") == soft
    merger = rows("merger")
    assert set(merger) - set(soft) and all(
        ".visual." in key and "merger" in key for key in set(merger) - set(soft)
    )
    assert any("deepstack_merger_list" in key for key in merger)
    assert all(".visual." in key and "merger" not in key for key in set(rows("vision")) - set(soft))
    lora = rows("rslora")
    down = "model.language_model.layers.*.mlp.down_proj"
    assert lora[f"{down}.lora_A.captioner"] == 2 * 3 * 96 and lora[f"{down}.lora_B.captioner"] == 2 * 3 * 64
    assert not any("visual" in key for key in lora)
    some = rows("adapters in some layers")
    assert sum(count for key, count in some.items() if "language_model.layers" in key) == 3 * 7 * 64
    head = rows("head")  # tied: the one matrix that is head and embedding
    assert head == {
        "model.language_model.embed_tokens": len(tuned(TUNINGS["head"]).tokenizer) * 64 - 3 * 64 + 3 * 64
    }
    table = fit.trainable_table(tuned(TUNINGS["merger"]).model)
    assert "model.visual.merger" in table and "%" in table


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("multiple", [16, 64])
def test_padded_widths_are_the_same_function(family: str, multiple: int, tmp_path: Path) -> None:
    captioner = tuned(TUNINGS["adapters in some layers"], family, torch.float64)
    shake(captioner)
    expected = logits(captioner, fed(captioner))
    fuse.export(captioner, tmp_path / "out", multiple=multiple)
    again = reload(tmp_path / "out", captioner)
    assert (logits(again, fed(captioner)) - expected).abs().max() <= 1e-12 * float(expected.abs().max())
    for tower, width in (("language", 96 + 7), ("vision", (144 if family == "qwen2_vl" else 96) + 5)):
        mlp = getattr(captioner.family, f"{tower}_mlp")
        for block in again.blocks[tower]:
            out = again.model.get_submodule(block).get_submodule(mlp.output).weight
            whole = family == "qwen2_vl" and tower == "vision"  # mlp_ratio
            step = math.lcm(multiple, 96) if whole else multiple
            assert out.shape[1] == -(-width // step) * step
            assert (out[:, width:] == 0).all()


def prompts(captioner: Captioner) -> list[Prompt]:
    renderer = Renderer(captioner, ViewsConfig())
    return [renderer.prompt(Image.new("RGB", (128, 96), color)) for color in ("red", "gray")]


def test_verified_export_says_how_far_it_is_and_refuses_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = tuned(TUNINGS["lora"])
    shake(captioner)
    difference = fuse.export(captioner, tmp_path / "out", prompts=prompts(captioner))
    assert difference and difference.relative < 1e-5 and difference.same_tokens == 1.0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "## Verified" in text and f"{difference.largest:.3g}" in text
    monkeypatch.setattr(adapters, "merged", lambda _captioner: {})  # the base instead of what was tuned
    with pytest.raises(Refused, match="logits differ"):
        fuse.export(captioner, tmp_path / "wrong", prompts=prompts(captioner))
    assert not (tmp_path / "wrong").exists()


def test_merged_weight_that_does_not_fit_or_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = tuned(TUNINGS["lora"])
    key = "model.language_model.layers.0.mlp.up_proj.weight"
    with monkeypatch.context() as patched:
        patched.setattr(adapters, "merged", lambda _captioner: {key: torch.zeros(3, 3)})
        with pytest.raises(CheckpointError, match=r"\(3, 3\)") as caught:
            fuse.export(captioner, tmp_path / "out")
    assert caught.value.where == key
    next(p for p in captioner.model.parameters() if p.requires_grad).data.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        fuse.export(captioner, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_model_card_keeps_paths_and_tables_to_itself() -> None:
    captioner = tuned(TUNINGS["soft prompt"])
    card = {"Training": {"sft": {"data": ["/home/me/images", "scenes:sft:4"], "note": "a|b\nc"}}}
    text = model_card(captioner, card | {"Metrics": {"loss": 0.123456}})
    assert "| sft.data | images, scenes:sft:4 |" in text and "/home" not in text
    assert "| sft.note | a\\|b c |" in text and "| loss | 0.1235 |" in text
    assert "<|soft_0|><|soft_1|><|soft_2|>" in text


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"type": "parts", "parts": "projector"}, ["'merger', 'vision', 'language', 'head' or 'embeddings'"]),
        ({"type": "lora", "targets": "merger,head"}, ["'language', 'vision' or 'merger'"]),
        ({"type": "lora", "targets": "merger", "parts": "merger"}, ["merger cannot be a target and a part"]),
        ({"type": "lora", "method": "vera", "use_rslora": "true"}, ["no scale"]),
        ({"type": "lora", "vision_width": "3"}, ["not a field of that sft.tuning.type"]),
    ],
)
def test_wrong_tuning(fields: dict[str, str], said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(None, {f"sft.tuning.{key}": value for key, value in fields.items()})
    for part in said:
        assert part in str(error.value)


def test_tuning_from_the_command_line() -> None:
    config = load(
        None,
        {
            "sft.tuning.type": "lora",
            "sft.tuning.method": "dora",
            "sft.tuning.targets": "language,vision",
            "sft.tuning.parts": "merger",
        },
    )
    assert config.sft.tuning == LoraTuning(method="dora", targets=("language", "vision"), parts=("merger",))
    config = load(None, {"sft.tuning.vision_layers": "0,-1", "sft.tuning.language_layers": "none"})
    assert config.sft.tuning == AdapterTuning(vision_layers=(0, -1))
    assert load(None, {"sft.tuning.type": "parts", "sft.tuning.parts": ""}).sft.tuning == PartsTuning(
        parts=()
    )


def test_unknown_layer_nothing_that_trains_and_text_without_tokens() -> None:
    with pytest.raises(ConfigError, match="no language layer 2: the model has 2"):
        tuned(AdapterTuning(language_layers=(0, 2)))
    for tuning in (PartsTuning(parts=()), AdapterTuning(vision_width=0, language_width=0)):
        with pytest.raises(ConfigError, match="Nothing would train"):
            fit.tune(tiny_captioner(), tuning, None, seed=0)
        with pytest.raises(ConfigError, match="Nothing would train"):
            fit.tune(tiny_captioner(), tuning, SoftPromptConfig(trainable=False), seed=0)
    with pytest.raises(ConfigError, match="has no tokens"):
        fit.tune(tiny_captioner(), PartsTuning(), SoftPromptConfig(init=""), seed=0)


def test_frozen_soft_prompt_stays() -> None:
    captioner = tiny_captioner()
    fit.tune(captioner, TUNINGS["lora"], SOFT.model_copy(update={"trainable": False}), seed=0)
    assert not soft_prompt.rows(captioner).requires_grad
    before = soft_prompt.rows(captioner).detach().clone()
    step(captioner, fed=fed(captioner))
    assert torch.equal(soft_prompt.rows(captioner), before)


@pytest.mark.parametrize("tuning", [TUNINGS["lora"], TUNINGS["merger"]])
def test_no_tuning_on_a_tuned_captioner(tuning: Any) -> None:
    captioner = tuned(tuning)
    with pytest.raises(ConfigError, match="already has the adapter"):
        adapters.tune(captioner, tuning, "again")


def test_four_bits_need_a_gpu_and_their_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(tmp_path)
    config = Config(model=ModelConfig(path=str(tmp_path), device="cpu", load_in_4bit=True)).model
    with pytest.raises(ConfigError, match="need a CUDA device"):
        model.load(config)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="need bitsandbytes") as caught:
        model._four_bits(model.FAMILIES["qwen3_vl"], torch.bfloat16, "cuda")
    assert caught.value.fix == "pip install bitsandbytes"


def test_pickled_adapter_is_not_read(tmp_path: Path) -> None:
    captioner = tuned(TUNINGS["lora"])
    adapters.save(captioner, fit.ADAPTER, tmp_path)
    (tmp_path / "adapter.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read"):
        adapters.load(tiny_captioner(), "captioner", tmp_path)


# ── the study ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_study_measures_every_arm_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in its third training, it goes on there; done, it trains nothing."""
    tiny_checkpoint(tmp_path / "base")
    kept = ("soft prompt only", "adapters, sequential", "LoRA")
    monkeypatch.setattr(study, "ARMS", {name: study.ARMS[name] for name in kept})
    fields = {
        "model.path": str(tmp_path / "base"),
        "sft.data": "scenes:sft:4",
        "evaluate.data": "scenes:test:2",
    }
    fields |= {
        "sft.training.max_steps": "1",
        "sft.training.per_device_train_batch_size": "2",
        "evaluate.max_tokens": "4",
    }
    fields |= {"views.levels": "1", "views.center": "false"}
    config = load(None, fields)
    real, trained = _arms.train, list[str]()

    def train_or_die(settings: Config, work: Path, home: Path) -> Captioner:
        trained.append(home.name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return real(settings, work, home)

    monkeypatch.setattr(study, "train", train_or_die)
    with pytest.raises(KeyboardInterrupt):
        measure(study, config, tmp_path / "study", 0)
    results = measure(study, config, tmp_path / "study", 0)
    assert trained == ["soft-prompt-only", "adapters-sequential", "LoRA", "LoRA"]
    assert list(results) == [study.BASE, *kept]
    assert results["soft prompt only"]["parameters"] == study.SOFT * 64 / 1e3
    costs = [results[name] for name in kept]
    assert all(cost["step"] > 0 and cost["memory"] > 0 for cost in costs)
    assert costs[0]["memory"] < costs[2]["memory"]  # fewer moments and fewer activations
    assert measure(study, config, tmp_path / "study", 0) == results and len(trained) == 4
