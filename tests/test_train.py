"""captioner/fit/fit.py and loops/sft.py on a tiny random model."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback
from trl.trainer.utils import add_fused_lm_head

from captioner.config import (
    AdapterTuning,
    Config,
    FullTuning,
    LoraTuning,
    ModelConfig,
    SFTConfig,
    SoftPromptConfig,
    TrainingConfig,
    ViewsConfig,
)
from captioner.errors import ConfigError, DataError, Refused, RunError
from captioner.fit import fit, log, trainers
from captioner.fit.batches import Collator, Order
from captioner.fit.examples import Target, TrainingImages
from captioner.fit.trainers import CrossEntropy
from captioner.lab import grid as scenes
from captioner.models import model, render
from captioner.models.model import Captioner
from captioner.records import Failed
from captioner.runs import Shards
from captioner.sources.folder import ImageRow, read_folder
from loops import sft as loop
from tests.tiny import tiny_captioner, tiny_checkpoint

TRAINING = TrainingConfig(
    max_steps=6,
    per_device_train_batch_size=2,
    learning_rate=3e-3,
    warmup_ratio=0.2,
    save_steps=2,
    logging_steps=1,
    seed=5,
)
SETTINGS = SFTConfig(columns=("shorthand", "questions"), questions_per_image=3, multi_view_share=0.5)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[ImageRow]:
    folder = tmp_path_factory.mktemp("scenes") / "sft"
    scenes.write("sft", 7, folder)
    return read_folder(folder)


def prepared(
    tuning: Any = None,
    soft: int = 4,
    seed: int = 1,
    family: str = "qwen3_vl",
    dtype: torch.dtype = torch.float32,
) -> Captioner:
    captioner = tiny_captioner(family, dtype=dtype)
    tuning = tuning or AdapterTuning(vision_width=4, language_width=4)
    fit.tune(captioner, tuning, SoftPromptConfig(length=soft) if soft else None, seed)
    return captioner


def sft(
    captioner: Captioner,
    rows: Sequence[ImageRow],
    out: Path,
    training: TrainingConfig = TRAINING,
    validation: TrainingImages | None = None,
    **more: Any,
) -> dict[str, float]:
    renderer = render.Renderer(captioner, ViewsConfig())
    images = loop.training_images(rows, SETTINGS)
    return fit.train(renderer, images, CrossEntropy(validation), training, out, **more)


def state(captioner: Captioner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in captioner.model.named_parameters()}


def logged(out: Path, name: str = "loss") -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def test_loss_is_cross_entropy_of_the_answers(rows: list[ImageRow], tmp_path: Path) -> None:
    captioner = prepared()
    renderer = render.Renderer(captioner, ViewsConfig())
    images = loop.training_images(rows, SETTINGS)
    collator = Collator(renderer, images, 0, 2)
    told = trainers.arguments(captioner, TRAINING, tmp_path)
    trainer = trainers.make(CrossEntropy(), captioner, collator, told)
    batch = collator([{"position": 2}, {"position": 3}])
    batch.pop("positions")
    loss = trainer.compute_loss(captioner.model, batch)

    total, tokens = torch.zeros(()), 0
    order = Order(len(rows), 0)
    for position in (2, 3):  # batch 1: all views
        patches, grid = renderer.patches_batch([collator._image(order(position))])[0]
        for target in collator._targets(order(position), position):
            row = render.TrainRow(patches, grid, False, [renderer.branch_ids(target.text, target.answer)])
            single = render.collate(renderer, [row])
            labels = single.pop("labels")[0, 1:]
            logits = captioner.model(**single).logits[0, :-1]
            total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            tokens += int((labels != -100).sum())
    torch.testing.assert_close(loss, total / tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_training_leaves_the_models_forward_and_special_tokens(
    rows: list[ImageRow], tmp_path: Path
) -> None:
    captioner = prepared()

    configs = (captioner.model.generation_config, captioner.model.config.get_text_config())
    for config in configs:
        config.pad_token_id = 7  # transformers would put the tokenizer's there
    sft(captioner, rows, tmp_path)
    assert "forward" not in captioner.model.__dict__  # TRL's patch is gone
    assert [config.pad_token_id for config in configs] == [7, 7]


@pytest.mark.slow
@pytest.mark.parametrize("tuning", [AdapterTuning(vision_width=4, language_width=4), FullTuning()])
def test_what_trains_moves_and_the_rest_stays(rows: list[ImageRow], tmp_path: Path, tuning: Any) -> None:
    captioner = prepared(tuning)
    before = state(captioner)
    sft(captioner, rows, tmp_path)
    after = state(captioner)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name, p in captioner.model.named_parameters() if p.requires_grad}
    unused = (
        {name for name in trained if not name.endswith("soft")} if isinstance(tuning, FullTuning) else set()
    )
    assert trained - moved <= unused - {name for name in unused if "mlp" in name}
    assert moved <= trained
    if isinstance(tuning, AdapterTuning):
        assert moved == trained
        assert all("bottleneck" in name or name.endswith(".soft") for name in trained)
        assert any("visual" in name for name in trained) and any("language" in name for name in trained)


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one(
    rows: list[ImageRow], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, resumed = prepared(), prepared()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    wanted = sft(straight, rows, tmp_path / "a")

    class Killed(Exception):
        pass

    images = loop.training_images(rows, SETTINGS)
    seen = 0

    def draw(index: int, rng: random.Random) -> Sequence[Target]:
        nonlocal seen
        seen += 1
        # lengths are checked once; in the fifth step (batches are fetched one ahead), after a checkpoint
        if seen > len(rows) + 2 * 5 + 1:
            raise Killed
        return images.draw(index, rng)

    dying = TrainingImages(images.keys, images.paths, draw, images.multi_view_share)
    with pytest.raises(Killed):
        renderer = render.Renderer(resumed, ViewsConfig())
        fit.train(renderer, dying, CrossEntropy(), TRAINING, tmp_path / "b")
    # the process died while it wrote another checkpoint, too
    torn = tmp_path / "b" / "checkpoints" / "checkpoint-5"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 5, "ep')

    resumed = prepared()
    got = sft(resumed, rows, tmp_path / "b")
    assert "resuming from step 4\n" in capsys.readouterr().out
    assert logged(tmp_path / "b") == pytest.approx(logged(tmp_path / "a"), abs=1e-6)
    assert got["loss"] == pytest.approx(wanted["loss"], abs=1e-6)
    for (name, a), b in zip(state(straight).items(), state(resumed).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
def test_checkpoints_hold_no_pickle_and_no_base(rows: list[ImageRow], tmp_path: Path) -> None:
    captioner = prepared()
    sft(captioner, rows, tmp_path)
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    trained = sum(p.numel() for p in captioner.model.parameters() if p.requires_grad)
    stored = next(path for path in files if path.name == "trainable.safetensors")
    assert stored.stat().st_size < 4 * trained + 20_000


def test_a_loss_that_is_not_finite_names_its_batch(rows: list[ImageRow], tmp_path: Path) -> None:
    captioner = prepared()
    bad = rows[3]
    poison = ImageRow(bad.key, bad.path, "gray background, ring", questions=bad.questions)

    class Poisoned(render.Renderer):
        def branch_ids(
            self, text: str | None, answer: str | None = None, *silent: Any
        ) -> tuple[list[int], list[bool]]:
            ids, mask = super().branch_ids(text, answer, *silent)
            return ([nan_id, *ids], [False, *mask]) if answer == poison.caption else (ids, mask)

    nan_id = len(captioner.tokenizer) - 5
    with torch.no_grad():
        captioner.model.get_input_embeddings().soft[-1] = torch.nan
    nan_id = captioner.soft_prompt_ids.pop()  # no other prompt shows it
    renderer = Poisoned(captioner, ViewsConfig())
    images = loop.training_images([*rows[:3], poison, *rows[4:]], SETTINGS)
    order = Order(len(rows), TRAINING.seed)
    position = next(p for p in range(len(rows)) if order(p) == 3)
    first = position - position % TRAINING.per_device_train_batch_size
    with pytest.raises(RunError) as caught:
        fit.train(renderer, images, CrossEntropy(), TRAINING, tmp_path)
    batch = [images.keys[order(first + i)] for i in range(TRAINING.per_device_train_batch_size)]
    assert caught.value.where == "images " + ", ".join(batch)
    assert f"step {position // TRAINING.per_device_train_batch_size + 1}" in caught.value.what


def test_order_visits_every_image_once_an_epoch() -> None:
    order = Order(5, 0)
    epochs = [[order(5 * epoch + i) for i in range(5)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = Order(5, 0)
    assert again(7) == epochs[1][2] and again(1) == epochs[0][1]  # in any order of asking


@pytest.mark.parametrize(("share", "wanted"), [(0.0, 0), (0.25, 5), (0.1, 2), (1.0, 20)])
def test_share_of_multi_view_batches(rows: list[ImageRow], share: float, wanted: int) -> None:
    captioner = prepared()
    images = loop.training_images(rows, SETTINGS.model_copy(update={"multi_view_share": share}))
    collator = Collator(render.Renderer(captioner, ViewsConfig()), images, 0, 2)
    views = [len(collator([{"position": 2 * i}])["image_grid_thw"]) for i in range(20)]
    assert views.count(6) == wanted and views.count(1) == 20 - wanted


def test_draws_differ_between_epochs_and_repeat_for_a_position(rows: list[ImageRow]) -> None:
    captioner = prepared()
    collator = Collator(render.Renderer(captioner, ViewsConfig()), loop.training_images(rows, SETTINGS), 0, 2)
    first, again, other = (collator._targets(0, position) for position in (3, 3, 10))
    assert first == again and first != other


def test_an_unreadable_image_is_named(rows: list[ImageRow], tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no image")
    broken = ImageRow("x", tmp_path / "x.png", "gray background", questions=rows[0].questions)
    with pytest.raises(DataError, match=r"x\.png"):
        sft(prepared(), [broken], tmp_path)


def test_a_row_beyond_the_models_reach_is_named(rows: list[ImageRow], tmp_path: Path) -> None:
    captioner = prepared()
    captioner.model.config.get_text_config().max_position_embeddings = 150
    long = ImageRow("long", rows[0].path, "gray background, " * 30, questions=rows[0].questions)
    with pytest.raises(DataError, match="long"):
        sft(captioner, [rows[1], long], tmp_path)


def test_validation_loss_is_token_weighted(rows: list[ImageRow]) -> None:
    captioner = prepared()
    renderer = render.Renderer(captioner, ViewsConfig())
    images = loop.training_images(rows, SETTINGS.model_copy(update={"multi_view_share": 1.0}))
    add_fused_lm_head(captioner.model)  # as TRL's trainer does
    losses = [log.validation_loss(renderer, images, size) for size in (1, 3, 7)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.slow
def test_what_cannot_be_learned_from_is_found_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_checkpoint(tmp_path / "base")
    folder = tmp_path / "set"
    scenes.write("sft", 6, folder)
    images = sorted(folder.rglob("*.png"))
    whole = images[0].read_bytes()
    images[0].write_bytes(whole[: len(whole) // 2])
    (folder / "metadata.parquet").unlink()
    for image in images[:1] + images[2:]:
        image.with_suffix(".txt").write_text("red circle at center")
    config = Config(
        model=ModelConfig(path=str(tmp_path / "base")),
        sft=SFTConfig(data=(str(folder),), validation=None, training=TRAINING),
    )
    with pytest.raises(
        Refused, match=r"(?s)2 of 6 images cannot be learned from.*cannot be decoded.*no shorthand"
    ):
        loop.sft(tmp_path / "run", config)
    assert not (tmp_path / "run" / "sft").exists()  # fixed, the same command works
    loop.sft(tmp_path / "run", config.model_copy(update={"max_failed": 0.4}))
    assert "2 of 6 images are left out" in capsys.readouterr().out
    out = tmp_path / "run" / "sft"
    assert json.loads((out / "stage.json").read_text())["counts"]["images"] == 4
    assert {row.key for row in Shards(out / "failed", Failed).read(0)} == {
        path.relative_to(folder).with_suffix("").as_posix() for path in images[:2]
    }


@pytest.mark.parametrize(
    ("epochs", "images", "processes", "steps"),
    [(None, 100, 1, 200), (3.0, 100, 1, 75), (0.5, 100, 1, 13), (2.0, 100, 4, 13), (0.001, 4, 1, 1)],
)
def test_epochs_become_steps(epochs: float | None, images: int, processes: int, steps: int) -> None:
    training = TrainingConfig(
        num_train_epochs=epochs, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    assert fit.by_steps(training, images, processes).max_steps == steps


@pytest.mark.slow
def test_sft_command(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base")
    config = Config(
        model=ModelConfig(path=str(tmp_path / "base")),
        sft=SFTConfig(data=("scenes:sft:4",), validation="scenes:validation:2", training=TRAINING),
    )
    out = loop.sft(tmp_path / "run", config)
    assert out == tmp_path / "run" / "sft"
    names = {path.name for path in out.iterdir()}
    assert {"adapter", "captioner", "metrics.jsonl", "stage.json"} <= names and "checkpoints" not in names
    assert {path.name for path in (out / "adapter").iterdir()} == {
        "adapter.safetensors",
        "adapter_config.json",
        "soft_prompt.safetensors",
    }
    assert len(logged(out, "validation_loss")) == 3
    manifest = json.loads((out / "stage.json").read_text())
    assert manifest["metrics"]["loss"] == logged(out)[-1]
    trained = model.load(out / "captioner")
    assert len(trained.soft_prompt_ids) == 8
    before = (out / "stage.json").read_bytes()
    assert loop.sft(tmp_path / "run", config) == out  # done before: nothing happens
    assert (out / "stage.json").read_bytes() == before


# ── training engineering ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_losses(rows: list[ImageRow], tmp_path: Path) -> None:
    for name, on in (("a", False), ("b", True)):
        captioner = prepared()
        runs: list[int] = []
        layer = captioner.layers["language"][0].get_submodule("mlp")
        layer.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        (tmp_path / name).mkdir()
        sft(captioner, rows, tmp_path / name, TRAINING.model_copy(update={"gradient_checkpointing": on}))
        assert len(runs) == TRAINING.max_steps * (2 if on else 1)
        assert not captioner.model.is_gradient_checkpointing
    assert logged(tmp_path / "b") == pytest.approx(logged(tmp_path / "a"), abs=1e-4)


@pytest.mark.slow
def test_microbatches_take_the_same_steps(rows: list[ImageRow], tmp_path: Path) -> None:
    for name, micro in (("a", None), ("b", 1)):
        (tmp_path / name).mkdir()
        training = TRAINING.model_copy(update={"microbatch_size": micro})
        sft(prepared(), rows, tmp_path / name, training, validation=loop.training_images(rows, SETTINGS))
    for loss in ("loss", "validation_loss"):
        assert logged(tmp_path / "b", loss) == pytest.approx(logged(tmp_path / "a", loss), abs=2e-4)
    with pytest.raises(ConfigError, match="Microbatches of 3 images"):
        sft(prepared(), rows, tmp_path, TRAINING.model_copy(update={"microbatch_size": 3}))


def test_large_models_are_trained_image_by_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner, training = (
        prepared(),
        TrainingConfig(per_device_train_batch_size=16, gradient_accumulation_steps=2),
    )
    small = trainers.arguments(captioner, training, tmp_path)
    monkeypatch.setattr(trainers, "LARGE", captioner.model.num_parameters() - 1)
    large = trainers.arguments(captioner, training, tmp_path)
    told = training.model_copy(update={"gradient_checkpointing": False, "microbatch_size": 4})
    found = [
        (a["per_device_train_batch_size"], a["gradient_accumulation_steps"], a["gradient_checkpointing"])
        for a in (small, large, trainers.arguments(captioner, told, tmp_path))
    ]
    assert found == [(16, 2, False), (1, 32, True), (4, 8, False)]


def test_validation_makes_no_logits_of_every_token(rows: list[ImageRow]) -> None:
    captioner = prepared()
    renderer = render.Renderer(captioner, ViewsConfig())
    images = loop.training_images(rows, SETTINGS)
    seen: list[torch.Size] = []
    captioner.model.get_output_embeddings().register_forward_hook(
        lambda _module, _args, output: seen.append(output.shape)
    )
    add_fused_lm_head(captioner.model)  # as TRL's trainer does
    log.validation_loss(renderer, images, 2)
    assert seen == []


@pytest.mark.slow
def test_early_stop_keeps_the_best(
    rows: list[ImageRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5, 10: 0.5}
    seen: dict[int, dict[str, torch.Tensor]] = {}
    captioner = prepared()

    def validation_loss(*_: Any) -> float:
        step = 2 * len(seen) + 2
        seen[step] = state(captioner)
        return losses[step]

    monkeypatch.setattr(log, "validation_loss", validation_loss)
    training = TRAINING.model_copy(update={"max_steps": 12, "early_stopping_patience": 2})
    images = loop.training_images(rows, SETTINGS)
    metrics = sft(captioner, rows, tmp_path, training, validation=images)
    assert list(seen) == [2, 4, 6, 8]  # 6 and 8 are no better than 4
    assert logged(tmp_path, "validation_loss") == [3.0, 1.0, 2.0, 1.5]
    assert (metrics["validation_loss"], metrics["best_step"]) == (1.0, 4)
    assert all(torch.equal(value, seen[4][name]) for name, value in state(captioner).items())
    assert any(not torch.equal(value, seen[8][name]) for name, value in state(captioner).items())
    with pytest.raises(ConfigError, match="needs a validation loss"):
        sft(prepared(), rows, tmp_path / "none", training)


@pytest.mark.slow
def test_a_validation_missed_by_a_killed_process_is_made_up_for(rows: list[ImageRow], tmp_path: Path) -> None:
    images = loop.training_images(rows, SETTINGS)
    sft(prepared(), rows, tmp_path, validation=images)
    file = tmp_path / "metrics.jsonl"
    whole = file.read_text()
    # killed between the checkpoint of step 4 and its validation
    kept = [line for line in whole.splitlines() if json.loads(line)["step"] <= 4][:-1]
    file.write_text("".join(line + "\n" for line in kept))
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-6")
    sft(prepared(), rows, tmp_path, validation=images)
    again, first = map(logged, (tmp_path, tmp_path), ("validation_loss", "loss"))
    lines = [json.loads(line) for line in whole.splitlines()]
    assert again == pytest.approx([line["validation_loss"] for line in lines if "validation_loss" in line])
    assert first == pytest.approx([line["loss"] for line in lines if "loss" in line], abs=1e-4)


@pytest.mark.slow
def test_a_tracker_gets_what_metrics_jsonl_gets(
    rows: list[ImageRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import integration_utils

    told: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            told.append(dict(logs))

    training = TRAINING.model_copy(update={"report_to": ("tensorboard",)})
    with pytest.raises(ConfigError, match="tensorboard is not installed"):
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
        sft(prepared(), rows, tmp_path, training)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: True)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    sft(prepared(), rows, tmp_path, training, validation=loop.training_images(rows, SETTINGS))
    for name in ("loss", "validation_loss"):
        assert [logs[name] for logs in told if name in logs] == logged(tmp_path, name)


@pytest.mark.slow
def test_bfloat16_weights_train_in_float32_and_nothing_else_does(
    rows: list[ImageRow], tmp_path: Path
) -> None:
    tuning = LoraTuning(r=2, parts=("merger",))
    captioner = prepared(tuning, dtype=torch.bfloat16)
    during: set[tuple[bool, torch.dtype]] = set()
    layer = captioner.layers["language"][0].get_submodule("mlp")
    layer.register_forward_pre_hook(
        lambda *_: during.update(
            (p.requires_grad, p.dtype) for n, p in captioner.model.named_parameters() if n[-5:] != ".soft"
        )
    )
    moving = {name: p for name, p in state(captioner).items() if "merger" in name and "visual" in name}
    sft(captioner, rows, tmp_path)
    assert during == {(True, torch.float32), (False, torch.bfloat16)}
    after = state(captioner)
    assert all(after[name].dtype == torch.bfloat16 for name in moving)
    assert any(not torch.equal(after[name], value) for name, value in moving.items())

    captioner = prepared(dtype=torch.bfloat16)
    captioner.visual.get_submodule("merger").float()
    with pytest.raises(RunError, match=r"frozen parameters are torch\.float32") as caught:
        sft(captioner, rows, tmp_path / "odd")
    assert "merger" in caught.value.where


def test_captions_beyond_the_models_reach_are_counted_and_named_at_once(rows: list[ImageRow]) -> None:
    captioner = prepared()
    renderer = render.Renderer(captioner, ViewsConfig())
    long = [ImageRow(f"long-{i}", rows[i].path, "gray, " * 60, questions=rows[i].questions) for i in range(2)]
    images = loop.training_images([*rows, *long], SETTINGS)
    collator = Collator(renderer, images, 0, 2)
    collator.check_lengths()
    _, grid = renderer.patches_batch([collator._image(0)])[0]
    reach = renderer.prefix(grid, renderer.tags()).next_position
    fits = reach + len(renderer.branch_ids(None, "gray, " * 60)[0])
    collator.longest = fits
    collator.check_lengths()  # exactly to the end
    collator.longest = fits - 1
    with pytest.raises(DataError, match="2 of 9 images have captions that do not fit") as caught:
        collator.check_lengths()
    assert caught.value.where == "long-0, long-1"
