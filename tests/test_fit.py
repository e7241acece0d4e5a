"""captioner/fit/fit.py: every tuning with every objective, and every field of `training` with each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from captioner.config import (
    AdapterTuning,
    Config,
    DPOConfig,
    EngineConfig,
    FullTuning,
    LoraTuning,
    PartsTuning,
    QAConfig,
    SamplingConfig,
    SFTConfig,
    SoftPromptConfig,
    TrainingConfig,
    Tuning,
)
from captioner.engines import CaptionRequest
from captioner.engines.hf import HFEngine
from captioner.errors import ConfigError
from captioner.fit import fit, trainers
from captioner.fit.examples import PairedImages
from captioner.fit.trainers import CrossEntropy, Preference
from captioner.models import adapters, model, soft_prompt
from captioner.models.model import Captioner
from captioner.models.render import Renderer
from loops import qa, sft
from tests.test_losses import IMAGES, pairs, rows
from tests.tiny import tiny_checkpoint

TUNINGS: dict[str, Tuning] = {
    "adapters": AdapterTuning(vision_width=4, language_width=4),
    "lora": LoraTuning(r=4),
    "parts": PartsTuning(parts=("merger",)),
    "full": FullTuning(),
}
PATHS = {path.stem: path for path in IMAGES}
QUIET: Any = {"every": 0, "chosen_below": 0}
DPO, KTO = (DPOConfig.model_validate({"loss_type": [name], "alarms": QUIET}) for name in ("sigmoid", "kto"))
CAPTIONS = sft.training_images(rows(), SFTConfig())
OBJECTIVES: dict[str, tuple[Any, trainers.Objective, SoftPromptConfig | None]] = {
    "sft": (CAPTIONS, CrossEntropy(CAPTIONS), SoftPromptConfig(length=3)),
    "qa": (qa.training_images(rows(), QAConfig(questions_per_image=4)), CrossEntropy(), None),
    "dpo": (PairedImages(pairs(), PATHS), Preference(DPO), None),
    "kto": (PairedImages(pairs(), PATHS), Preference(KTO), None),
}
TRAINING = TrainingConfig(
    max_steps=2, per_device_train_batch_size=2, learning_rate=0.1, warmup_ratio=0, save_steps=2, seed=3
)


def captions(captioner: Captioner) -> list[str]:
    engine = HFEngine(captioner, captioner.views, EngineConfig())
    requests = [CaptionRequest(path.stem, path, path.stem) for path in IMAGES]
    return [one.text for [one] in engine.sample(requests, 1, SamplingConfig(temperature=0, max_tokens=12))]


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("tuning", TUNINGS)
def test_every_tuning_trains_for_every_objective(tuning: str, objective: str, tmp_path: Path) -> None:
    """What is exported says something else than the base; the base with what was saved says the same."""
    tiny_checkpoint(tmp_path / "base")
    config = Config.model_validate({"model": {"path": str(tmp_path / "base"), "device": "cpu"}})
    examples, goal, prompt = OBJECTIVES[objective]
    out = tmp_path / "out"
    metrics = fit.fit(fit.Start(config), TUNINGS[tuning], examples, goal, TRAINING, out, prompt=prompt)
    assert metrics["steps"] == 2 and ("validation_loss" in metrics) == (objective == "sft")
    before, after = (load_file(at / "model.safetensors") for at in (tmp_path / "base", out / "captioner"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    said = captions(model.load(out / "captioner"))
    assert said != captions(model.load(tmp_path / "base"))
    assert (out / "adapter" / "adapter.safetensors").exists() == (tuning != "full")
    if tuning != "full":
        again = model.load(tmp_path / "base")
        again.views = model.load(out / "captioner").views
        adapters.load(again, fit.ADAPTER, out / "adapter")
        if prompt:
            soft_prompt.load(again, out / "adapter")
        assert captions(again) == said


# a value of every field of `training`, and what TRL's trainer is told then
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "max_steps": (9, {"max_steps": 9}),
    "num_train_epochs": (6.0, {"max_steps": 3 * len(IMAGES)}),
    "per_device_train_batch_size": (4, {"per_device_train_batch_size": 4}),
    "gradient_accumulation_steps": (3, {"gradient_accumulation_steps": 3}),
    "learning_rate": (0.5, {"learning_rate": 0.5}),
    "warmup_ratio": (0.5, {"warmup_steps": 1}),
    "weight_decay": (0.1, {"weight_decay": 0.1}),
    "max_grad_norm": (0.3, {"max_grad_norm": 0.3}),
    "save_steps": (1, {"save_steps": 1}),
    "logging_steps": (1, {"logging_steps": 1}),
    "early_stopping_patience": (1, {}),  # refused without a validation loss
    "gradient_checkpointing": (True, {"gradient_checkpointing": True}),
    "report_to": (("tensorboard",), {"report_to": ["tensorboard"]}),
    "seed": (8, {"seed": 8}),
    "microbatch_size": (1, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_field_of_training_means_the_same_for_every_objective(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CHANGES.keys() == TrainingConfig.model_fields.keys()
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: True)
    examples, goal, _ = OBJECTIVES[objective]
    renderer = Renderer(tiny_checkpoint(tmp_path / "base"), Config().views)

    def told(training: TrainingConfig) -> dict[str, Any]:
        training = fit.by_steps(training, len(examples), 1)
        trainers.check(goal, training, shard=False)
        assert goal.collator(renderer, examples, training).seed == training.seed
        _, args = goal.arguments(trainers.arguments(renderer.captioner, training, tmp_path))
        found: dict[str, Any] = args.to_dict()
        return found

    before = told(TRAINING)
    for field, (value, expected) in CHANGES.items():
        changed = TRAINING.model_copy(update={field: value})
        if field == "early_stopping_patience":
            if goal.validation is None:
                with pytest.raises(ConfigError, match="needs a validation loss"):
                    told(changed)
            continue
        now = told(changed)
        assert {name: now[name] for name in expected} == expected, field
        assert {name: before[name] for name in expected} != expected, field


def test_preferences_are_not_trained_in_parts() -> None:
    with pytest.raises(ConfigError, match="need the whole model in each process") as caught:
        trainers.check(Preference(DPO), TRAINING, shard=True)
    assert caught.value.fix == "--dpo.tuning.shard false"
    trainers.check(CrossEntropy(), TRAINING, shard=True)
