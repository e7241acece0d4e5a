"""Preference training against hand-written losses on plain forwards, and loops/dpo.py."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer
from trl import DPOTrainer, KTOTrainer

from captioner.config import (
    AdapterTuning,
    AlarmsConfig,
    Config,
    DPOConfig,
    LoraTuning,
    Loss,
    TrainingConfig,
    Tuning,
    ViewsConfig,
)
from captioner.errors import Refused, RunError
from captioner.files import hash_path
from captioner.fit import alarms, fit, objectives, reference, trainers
from captioner.fit.examples import PairedImages, by_image
from captioner.fit.trainers import Preference
from captioner.lab import grid as scenes
from captioner.models import model, render
from captioner.models.model import Captioner
from captioner.records import Golden, Pair
from captioner.runs import Run, Shards
from captioner.sources.folder import read_folder
from captioner.views import load_image
from loops import dpo as loop
from tests.test_train import logged, prepared, state
from tests.tiny import tiny_checkpoint

BETA, CE_WEIGHT = 0.3, 0.7
VERDICTS = {
    "northwest ring": "drop",
    "northwest star": "keep",
    "northwest circle": "keep",
    "west red": "keep",
}
VERDICTS |= {"northwest square": "keep", "northeast circle": "keep"}
ADAPTERS = AdapterTuning(vision_width=4, language_width=4)
LORA = LoraTuning(r=4, targets=("language", "vision", "merger"))
TRAINING = TrainingConfig(
    max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, save_steps=2, logging_steps=1, seed=3
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "round"
    scenes.write("round", 4, folder)
    return folder


@pytest.fixture(scope="module")
def pairs(folder: Path) -> list[Pair]:
    found = []
    for row in read_folder(folder):
        said = (row.caption or "").split(", ")
        _, sample = load_image(row.path)
        for k, rejected in enumerate((said[:2], [*said, "northwest ring"])):
            text = ", ".join(rejected)
            found.append(
                Pair(
                    sample=sample,
                    key=row.key,
                    chosen=", ".join(said[:6]),
                    rejected=text,
                    k=k,
                    refuted_in_rejected=1,
                )
            )
    return found


def paths_of(folder: Path) -> dict[str, Path]:
    return {row.key: row.path for row in read_folder(folder)}


def plain_logps(captioner: Captioner, path: Path, caption: str, gray: bool = False) -> torch.Tensor:
    """Log-probabilities [T] of the caption and its end token, by an ordinary forward of one sequence."""
    renderer = render.Renderer(captioner, ViewsConfig())
    pixel_values, grid = renderer.images(load_image(path)[0])
    pixel_values = torch.zeros_like(pixel_values) if gray else pixel_values
    row = render.TrainRow(pixel_values, grid, False, [renderer.branch_ids(None, caption)])
    batch = render.collate(renderer, [row])
    labels = batch.pop("labels")[0, 1:]
    assert labels[labels != -100][-1] == renderer.end_id
    logits = captioner.model(**batch).logits[0, :-1]
    kept = labels != -100
    return F.log_softmax(logits[kept], dim=-1).gather(1, labels[kept, None])[:, 0]


class Stock(DPOTrainer):
    """TRL's own trainer; only that it prepares no data set is ours."""

    def _prepare_dataset(self, dataset: Any, *_args: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_args: Any) -> Any:
        return dataset


class StockKTO(KTOTrainer):
    _prepare_dataset = Stock._prepare_dataset
    _precompute_ref_logps = Stock._precompute_ref_logps


def trainer_of(
    captioner: Captioner,
    pairs: Sequence[Pair],
    folder: Path,
    out: Path,
    dpo: DPOConfig,
) -> Any:
    verdicts = {pair.key: VERDICTS for pair in pairs}
    examples = PairedImages(pairs, paths_of(folder), verdicts)
    collator = Preference(dpo).collator(render.Renderer(captioner, ViewsConfig()), examples, TRAINING)
    told = trainers.arguments(captioner, TRAINING, out)
    return trainers.make(Preference(dpo), captioner, collator, told)


def stock_of(captioner: Captioner, out: Path, dpo: DPOConfig) -> Any:
    kind = StockKTO if "kto" in dpo.loss_type else Stock
    return kind(
        model=captioner.model,
        args=Preference(dpo).arguments(trainers.arguments(captioner, TRAINING, out))[1],
        train_dataset=Dataset.from_dict({"position": [0]}),
        data_collator=lambda rows: rows,
        processing_class=captioner.processor,
    )


def unshared(captioner: Captioner, said: Sequence[tuple[Path, str]]) -> dict[str, torch.Tensor]:
    """One sequence for each caption, its images before it, as TRL's own collator lays them out."""
    renderer = render.Renderer(captioner, ViewsConfig())
    rows, pixels, grids = [], [], []
    for path, text in said:
        pixel_values, grid = renderer.images(load_image(path)[0])
        prefix, (ids, mask) = renderer.prefix_ids(grid), renderer.branch_ids(None, text)
        rows.append((prefix + ids, [False] * len(prefix) + mask))
        pixels.append(pixel_values)
        grids.append(grid)
    tokens = pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True)
    return {
        "input_ids": tokens,
        "attention_mask": pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids, _ in rows], True),
        "completion_mask": pad_sequence([torch.tensor(mask).long() for _, mask in rows], True),
        "mm_token_type_ids": (tokens == renderer.image_pad_id).int(),
        "pixel_values": torch.cat(pixels),
        "image_grid_thw": torch.cat(grids),
    }


def drawn(trainer: Any, positions: Sequence[int]) -> tuple[dict[str, Any], list[Pair]]:
    """A batch, and its pairs in the order of TRL's rows."""
    collator = trainer.data_collator
    batch = collator([{"position": position} for position in positions])
    batch.pop("positions")
    return batch, [pair for at in positions for pair in collator.groups[collator.order(at)]]


def gradients(loss: torch.Tensor, captioner: Captioner) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in captioner.model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_same(ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor]) -> None:
    scale = max(gradient.abs().max().item() for gradient in stock.values())
    assert scale > 1e-3
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], rtol=1e-4, atol=1e-5 * max(scale, 1.0), msg=name)


def departed(captioner: Captioner) -> None:
    """A policy that has left its reference."""
    torch.manual_seed(0)
    for parameter in captioner.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tuning", "checkpointing"),
    [
        ("qwen2_vl", ADAPTERS, False),
        ("qwen2_5_vl", ADAPTERS, True),
        ("qwen3_vl", ADAPTERS, False),
        ("qwen2_vl", LORA, True),
        ("qwen2_5_vl", LORA, False),
        ("qwen3_vl", LORA, True),
    ],
)
def test_sharing_equals_stock_trl(
    family: str, tuning: Tuning, checkpointing: bool, pairs: list[Pair], folder: Path, tmp_path: Path
) -> None:
    """Gradients and losses, of every kind in one case; two and three rejected."""
    captioner = prepared(tuning, family=family)
    pairs = [*pairs, pairs[0].model_copy(update={"rejected": "center square, center blue", "k": 2})]
    dpo = DPOConfig(beta=BETA, ce_weight=CE_WEIGHT, label_smoothing=0.1)
    scored = reference.score(trainer_of(captioner, pairs, folder, tmp_path, dpo), 3)
    captioner.model.__dict__.pop("forward")
    departed(captioner)
    if checkpointing:
        captioner.model.gradient_checkpointing_enable({"use_reentrant": False})
    captioner.model.train()
    trainer = trainer_of(captioner, pairs, folder, tmp_path, dpo)
    trainer.data_collator.reference = by_image(scored)
    batch, picked = drawn(trainer, (2, 3, 4))
    assert sorted(picked.count(pair) for pair in picked) == [1] * len(picked)
    assert {len(group) for group in trainer.data_collator.groups} == {2, 3}
    ours = {}
    every = (family, tuning) == ("qwen3_vl", ADAPTERS)
    for name in set(get_args(Loss)) - {"kto"} if every else ["sigmoid"]:
        trainer.loss_types = [name, "sft"]
        loss = trainer.compute_loss(captioner.model, batch)
        ours[name] = loss, gradients(loss, captioner) if name == "sigmoid" else {}
    captioner.model.__dict__.pop("forward")

    paths = paths_of(folder)
    stock = stock_of(captioner, tmp_path, dpo)
    plain = unshared(
        captioner, [(paths[p.key], p.chosen) for p in picked] + [(paths[p.key], p.rejected) for p in picked]
    )
    refs = by_image(scored)
    known = {(p.key, p.k): p for group in refs for p in group}
    plain["ref_chosen_logps"] = torch.tensor([known[p.key, p.k].ref_chosen_logp for p in picked])
    plain["ref_rejected_logps"] = torch.tensor([known[p.key, p.k].ref_rejected_logp for p in picked])
    for name, (loss, gradient) in ours.items():
        stock.loss_types = [name, "sft"]
        wanted = stock.compute_loss(captioner.model, plain)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
        if gradient:
            assert_same(gradient, gradients(wanted, captioner))


def test_kto_equals_stock_trl(pairs: list[Pair], folder: Path, tmp_path: Path) -> None:
    captioner = prepared()
    dpo = DPOConfig(loss_type=("kto",), beta=BETA, ce_weight=0)
    scored = reference.score(trainer_of(captioner, pairs, folder, tmp_path, dpo), 3)
    captioner.model.__dict__.pop("forward")
    departed(captioner)
    captioner.model.train()
    trainer = trainer_of(captioner, pairs, folder, tmp_path, dpo)
    trainer.data_collator.reference = by_image(scored)
    batch, _ = drawn(trainer, (0, 1))
    loss = trainer.compute_loss(captioner.model, batch)
    ours = gradients(loss, captioner)
    kl = trainer._metrics["train"]["kl"][-1]
    captioner.model.__dict__.pop("forward")

    paths, groups = paths_of(folder), trainer.data_collator.groups
    picked = [trainer.data_collator.order(position) for position in (0, 1)]
    said = [(paths[groups[i][0].key], groups[i][0].chosen) for i in picked]
    said += [(paths[p.key], p.rejected) for i in picked for p in groups[i]]
    other = [(paths[groups[i][0].key], groups[(i + 1) % len(groups)][0].chosen) for i in picked]
    plain = unshared(captioner, said)
    mixed = unshared(captioner, other)
    stock = stock_of(captioner, tmp_path, dpo)
    with torch.no_grad():
        labels = mixed["input_ids"].masked_fill(mixed.pop("completion_mask") == 0, -100)
        kl_logps = captioner.model(**mixed, labels=labels, fused_lm_head=True).log_probs.sum(1)
    stock._compute_kl_logps = lambda *_: kl_logps  # its own call gives both forwards the same pixels
    plain |= {name: batch[name] for name in ("label", "ref_logps", "ref_KL_logps")}
    wanted = stock.compute_loss(captioner.model, plain)
    assert abs(stock._metrics["train"]["kl"][-1] - kl) < 1e-4
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    assert_same(ours, gradients(wanted, captioner))


def test_our_terms_equal_plain_forwards(pairs: list[Pair], folder: Path, tmp_path: Path) -> None:
    """Anchor, image term, token weights and length margin, each against forwards of single sequences."""
    captioner = prepared()
    dpo = DPOConfig(
        beta=BETA, ce_weight=0, anchor_weight=0.5, image_weight=0.25, length_margin=0.02,
        refuted_weight=3.0, confirmed_weight=0.5,
    )  # fmt: skip
    paths = paths_of(folder)
    scored = reference.score(trainer_of(captioner, pairs, folder, tmp_path, dpo), 3)
    captioner.model.__dict__.pop("forward")
    with torch.no_grad():
        for pair in scored[:3]:
            weighted, masked = weigh(captioner, pair, paths)
            assert pair.ref_rejected_logp == pytest.approx(weighted(pair.rejected).item(), rel=1e-5)
            assert pair.ref_masked_logp == pytest.approx(masked().item(), rel=1e-5)
    departed(captioner)
    trainer = trainer_of(captioner, pairs, folder, tmp_path, dpo)
    trainer.data_collator.reference = by_image(scored)
    batch, _ = drawn(trainer, (0, 1))
    loss = trainer.compute_loss(captioner.model, batch)
    assert {0.5, 1.0, 3.0} == set(batch["weights"].unique().tolist())
    order, groups = trainer.data_collator.order, trainer.data_collator.reference
    captioner.model.__dict__.pop("forward")

    margins, anchors, images = [], [], []
    tokens = lambda text: len(render.Renderer(captioner, ViewsConfig()).text_ids(text))  # noqa: E731
    for group in (groups[order(0)], groups[order(1)]):
        for pair in group:
            weighted, masked = weigh(captioner, pair, paths)
            c, r = (
                weighted(pair.chosen) - pair.ref_chosen_logp,
                weighted(pair.rejected) - pair.ref_rejected_logp,
            )
            margins.append(BETA * (c - r) + 0.02 * (tokens(pair.chosen) - tokens(pair.rejected)))
            anchors.append(BETA * c)
        images.append(BETA * (c - (masked() - pair.ref_masked_logp)))
    by_hand = sum(
        weight * -F.logsigmoid(torch.stack(terms)).mean()
        for weight, terms in ((1, margins), (0.5, anchors), (0.25, images))
    )
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=1e-5)


def weigh(captioner: Captioner, pair: Pair, paths: dict[str, Path]) -> tuple[Any, Any]:
    """Weighted log-probability of a caption of the pair, and that of its chosen one behind gray views."""

    def weighted(text: str, gray: bool = False) -> torch.Tensor:
        logps = plain_logps(captioner, paths[pair.key], text, gray)
        weights, ids = [], render.Renderer(captioner, ViewsConfig()).text_ids
        parts = text.split(", ")
        for i, part in enumerate(parts):
            piece = part if i == 0 else " " + part
            own = {"keep": 0.5, "drop": 3.0}.get(VERDICTS.get(part, ""), 1.0)
            weights += [own] * len(ids(piece)) + ([1.0] if i + 1 < len(parts) else [])
        assert len(weights) + 1 == len(logps)  # and the end token
        return (logps * torch.tensor([*weights, 1.0])).sum()

    return weighted, lambda: weighted(pair.chosen, gray=True)


def prefer(
    captioner: Captioner,
    pairs: Sequence[Pair],
    folder: Path,
    out: Path,
    training: TrainingConfig = TRAINING,
    **more: Any,
) -> dict[str, float]:
    renderer = render.Renderer(captioner, ViewsConfig())
    quiet = AlarmsConfig(every=0, chosen_below=0)
    dpo = DPOConfig(beta=BETA, ce_weight=CE_WEIGHT, alarms=more.pop("watch", quiet))
    examples = PairedImages(pairs, paths_of(folder))
    return fit.train(renderer, examples, Preference(dpo, **more), training, out)


def frozen_soft() -> Captioner:
    captioner = prepared()
    captioner.model.get_input_embeddings().soft.requires_grad_(False)
    return captioner


@pytest.mark.slow
def test_ten_steps(pairs: list[Pair], folder: Path, tmp_path: Path) -> None:
    captioner = frozen_soft()
    before = state(captioner)
    metrics = prefer(captioner, pairs, folder, tmp_path, TRAINING.model_copy(update={"max_steps": 10}))
    after = state(captioner)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name, p in captioner.model.named_parameters() if p.requires_grad}
    assert all("bottleneck" in name for name in moved)
    assert metrics["logps/chosen"] < 0 and metrics["logps/rejected"] < 0
    assert logged(tmp_path, "rewards/margins")[0] == pytest.approx(0, abs=1e-4)  # it starts at the reference
    assert not captioner.model.model._forward_hooks and not captioner.model.model._forward_pre_hooks


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one(
    pairs: list[Pair], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, dying = frozen_soft(), frozen_soft()
    prefer(straight, pairs, folder, tmp_path / "a")
    step = trainers._DPO.training_step

    def dies(self: Any, *arguments: Any, **named: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            raise InterruptedError
        return step(self, *arguments, **named)

    monkeypatch.setattr(trainers._DPO, "training_step", dies)
    with pytest.raises(InterruptedError):
        prefer(dying, pairs, folder, tmp_path / "b")
    monkeypatch.undo()
    # a resumed training is no longer the reference: it must not compute the log-probabilities again
    monkeypatch.setattr(reference, "score", lambda *_: pytest.fail("computed again"))
    resumed = frozen_soft()
    prefer(resumed, pairs, folder, tmp_path / "b")
    for (name, a), b in zip(state(straight).items(), state(resumed).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
    assert logged(tmp_path / "a") == pytest.approx(logged(tmp_path / "b"), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["weights", "pixels", "tokens", "pairs"])
def test_a_reference_of_something_else_is_refused(
    what: str, pairs: list[Pair], folder: Path, tmp_path: Path
) -> None:
    prefer(frozen_soft(), pairs, folder, tmp_path, TRAINING.model_copy(update={"max_steps": 1}))
    shards = Shards(tmp_path / "pairs", Pair)
    stored = shards.read(0)
    assert len({pair.ref_pixels for pair in stored}) == len({pair.key for pair in stored})
    change = {"chosen": "another"} if what == "pairs" else {f"ref_{what}": "0" * 64}
    shards.write(0, [pair.model_copy(update=change) for pair in stored])
    with pytest.raises(RunError, match=rf"of other {what}[\s\S]*--redo"):
        prefer(frozen_soft(), pairs, folder, tmp_path)


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("checkpoint-*"))


def test_alarm_where_chosen_falls_below_its_reference(
    pairs: list[Pair], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = reference.score

    def inflated(*arguments: Any) -> list[Pair]:
        return [p.model_copy(update={"ref_chosen_logp": p.ref_chosen_logp + 9}) for p in score(*arguments)]

    monkeypatch.setattr(reference, "score", inflated)
    training = TRAINING.model_copy(update={"save_steps": 1, "max_steps": 8})
    with pytest.raises(Refused, match=r"for 4 steps the chosen captions[\s\S]*checkpoint-1") as alarm:
        prefer(frozen_soft(), pairs, folder, tmp_path, training, watch=AlarmsConfig(every=0, chosen_below=4))
    assert alarm.value.exit_code == 3
    assert checkpoints(tmp_path) == ["checkpoint-1"]  # later ones would not be good ones
    assert json.loads((tmp_path / "alarm.json").read_text())["kept"] == "checkpoint-1"


@pytest.mark.slow
def test_alarm_of_a_loss_that_is_not_finite_keeps_the_checkpoint_to_go_on_from(
    pairs: list[Pair], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, poisoned = frozen_soft(), frozen_soft()
    prefer(straight, pairs, folder, tmp_path / "a")
    loss = trainers._DPO.compute_loss

    def nan(self: Any, *arguments: Any, **named: Any) -> torch.Tensor:
        return loss(self, *arguments, **named) * (float("nan") if self.state.global_step == 3 else 1)

    monkeypatch.setattr(trainers._DPO, "compute_loss", nan)
    with pytest.raises(Refused, match=r"at step 4[\s\S]*checkpoint-2[\s\S]*images/"):
        prefer(poisoned, pairs, folder, tmp_path / "b")
    monkeypatch.undo()
    back = frozen_soft()
    prefer(back, pairs, folder, tmp_path / "b")
    assert not (tmp_path / "b" / "alarm.json").exists()
    for (name, a), b in zip(state(straight).items(), state(back).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
def test_alarm_of_drift(pairs: list[Pair], folder: Path, tmp_path: Path) -> None:
    captioner = frozen_soft()
    renderer = render.Renderer(captioner, ViewsConfig())
    said = [(paths_of(folder)[pair.key], pair.chosen) for pair in pairs[:2]]
    origin = alarms.origin(renderer, said)
    shown = alarms.pictures(renderer, [path for path, _ in said])
    assert alarms.drift(renderer, origin, shown) == pytest.approx(0, abs=1e-6)
    watch = AlarmsConfig(every=1, images=2, max_tokens=6, chosen_below=0, max_kl=0.2, max_change=1)
    training = TRAINING.model_copy(update={"learning_rate": 0.5, "max_steps": 8})
    with pytest.raises(Refused, match=r"nats a token from the SFT captioner, the budget is 0\.2"):
        prefer(captioner, pairs, folder, tmp_path, training, watch=watch, origin=origin)
    assert captioner.model.model.training is False
    seen = logged(tmp_path, "probe/kl")
    assert seen[-1] > 0.2 and all(0 <= value <= 0.2 for value in seen[:-1])


def test_what_an_alarm_takes_for_wrong() -> None:
    config = AlarmsConfig(max_change=0.1, max_length_ratio=2, max_kl=1)
    start = {"ended": 1.0, "repeated": 0.0, "unique": 1.0, "tokens": 40.0}
    assert alarms.changed(start, start | {"kl": 0.9, "ended": 0.95, "tokens": 79.0}, config) == []
    for change in (
        {"ended": 0.8},
        {"repeated": 0.2},
        {"unique": 0.4},
        {"tokens": 81},
        {"tokens": 19},
        {"kl": 2},
    ):
        assert len(alarms.changed(start, start | change, config)) == 1, change


def test_divergence_bounds_the_whole_one_from_below() -> None:
    torch.manual_seed(0)
    p, q = (3 * torch.randn(5, 50, dtype=torch.float64)).log_softmax(-1), torch.randn(5, 50).log_softmax(-1)
    whole = F.kl_div(q.double(), p, log_target=True, reduction="none").sum(-1)
    ids = p.topk(8).indices
    part = objectives.divergence(p.gather(1, ids), q.double().gather(1, ids))
    assert (part >= 0).all() and (part <= whole + 1e-9).all() and (part > 0.5 * whole).all()
    ids = p.topk(49).indices  # one token is left for the rest: nothing is lost
    exact = objectives.divergence(p.gather(1, ids), q.double().gather(1, ids))
    torch.testing.assert_close(exact, whole, rtol=1e-3, atol=1e-6)


def test_token_weights_follow_the_statements() -> None:
    text = "a red cup,  the dog ; dog"
    offsets = [(0, 1), (1, 5), (5, 9), (9, 10), (11, 15), (15, 19), (20, 21), (21, 25)]
    verdicts = {"red cup": "keep", "dog": "drop"}
    weights = objectives.token_weights(text, offsets, verdicts, 0.5, 2.0)
    assert weights == [0.5, 0.5, 0.5, 1.0, 2.0, 2.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss_type": ["kto", "sigmoid"]},
        {"loss_type": ["kto"], "anchor_weight": 1},
        {"loss_type": ["kto"], "loss_weights": [2]},
        {"loss_type": ["sigmoid"], "loss_weights": [1, 2]},
        {"loss_type": ["exo_pair"]},
        {"loss_type": ["ipo"], "length_margin": 0.1},
        {"loss_type": ["nonsense"]},
    ],
)
def test_losses_that_do_not_fit(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as refused:
        DPOConfig.model_validate(wrong)
    assert "Extra inputs" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["exo_pair", "kto"])
def test_a_loss_by_name_trains(loss: str, pairs: list[Pair], folder: Path, tmp_path: Path) -> None:
    dpo = DPOConfig.model_validate(
        {
            "loss_type": [loss],
            "label_smoothing": 0.1,
            "ce_weight": 0.5,
            "alarms": {"every": 0, "chosen_below": 0},
        }
    )
    captioner = frozen_soft()
    before = state(captioner)
    training = TRAINING.model_copy(update={"max_steps": 1, "warmup_ratio": 0.0})
    renderer = render.Renderer(captioner, ViewsConfig())
    examples = PairedImages(pairs, paths_of(folder))
    metrics = fit.train(renderer, examples, Preference(dpo), training, tmp_path)
    assert metrics["logps/chosen"] < 0 and metrics["logps/rejected"] < 0  # absolute ones, beside the margins
    assert any(not torch.equal(before[name], p) for name, p in state(captioner).items())


def made_round(run_dir: Path, config: Config, pairs: Sequence[Pair], folder: Path) -> None:
    """The stages that `captioner golden` leaves."""
    run = Run.open(run_dir, config)
    tiny_checkpoint(run_dir / "sft" / "captioner")
    golden = {
        pair.key: Golden(
            sample=pair.sample, key=pair.key, text=pair.chosen, kept=6, dropped=1, abstained=0, tokens=30
        )
        for pair in pairs
    }
    inputs = {"images": folder}
    run.stage("round-1/candidates", {}, inputs).finish({})
    stage = run.stage("round-1/golden", {}, inputs)
    Shards(stage.dir, Golden).write(0, golden.values())
    stage.finish({})
    stage = run.stage("round-1/pairs", {}, inputs)
    Shards(stage.dir, Pair).write(0, pairs)
    stage.finish({})


DIES = """
import os, signal, sys
from transformers import Trainer
from loops.cli import main

step = Trainer.training_step

def dies(self, *arguments, **named):
    if (type(self).__name__, self.state.global_step) == ("_" + sys.argv[1], 3):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments, **named)

Trainer.training_step = dies
sys.exit(main(["dpo", "--round", "1", "--run", sys.argv[2]]))
"""


def command(where: str, run_dir: Path) -> subprocess.CompletedProcess[str]:
    """`captioner dpo` in its own process, which kills itself at the fourth step of the trainer ``where``."""
    words = [sys.executable, "-c", DIES, where, str(run_dir)]
    root = Path(__file__).parent.parent
    return subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=root, check=False)


def round_config(**dpo: Any) -> Config:
    watch = {"every": 2, "images": 2, "max_tokens": 8, "chosen_below": 0}
    training = TRAINING.model_dump() | dpo.pop("training", {})
    watch |= dpo.pop("alarms", {})
    own = {"golden_sft_steps": 4, "tuning": ADAPTERS, "training": training, "alarms": watch} | dpo
    held_out = {"gate": {"data": "scenes:validation:2"}, "evaluate": {"data": "scenes:test:2"}}
    return Config.model_validate({"dpo": own, **held_out})


@pytest.mark.slow
def test_command_killed_twice_equals_an_uninterrupted_one(
    pairs: list[Pair], folder: Path, tmp_path: Path
) -> None:
    """kill -9 in the golden SFT and in the preference training; the same command goes on."""
    config, alone, killed = round_config(), tmp_path / "alone", tmp_path / "killed"
    for run_dir in (alone, killed):
        made_round(run_dir, config, pairs, folder)
    loop.dpo(alone, config, 1)
    home = killed / "round-1" / "dpo"
    for where, out in (("SFT", home / "golden-sft"), ("DPO", home)):
        done = command(where, killed)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert checkpoints(out) == ["checkpoint-2"]
        assert not (killed / "round-1" / "captioner").exists()
    loop.dpo(killed, config, 1)
    made = [load_file(each / "round-1" / "captioner" / "model.safetensors") for each in (alone, killed)]
    for name, weights in made[0].items():
        torch.testing.assert_close(made[1][name], weights, rtol=0, atol=1e-6, msg=name)
    assert logged(alone / "round-1" / "dpo") == pytest.approx(logged(home), abs=1e-6)


@pytest.mark.slow
def test_command_stopped_by_an_alarm_keeps_the_old_captioner(
    pairs: list[Pair], folder: Path, tmp_path: Path
) -> None:
    """Exit 3 and what it saw; the same command rings again from the last good checkpoint; --redo fixes."""
    wild = {"learning_rate": 0.5, "warmup_ratio": 0.5, "max_steps": 8, "save_steps": 1}
    watch = {"every": 1, "max_kl": 0.2, "max_change": 1}
    config = round_config(golden_sft_steps=0, training=wild, alarms=watch)
    made_round(tmp_path, config, pairs, folder)
    home = tmp_path / "round-1" / "dpo"
    done = command("nowhere", tmp_path)
    assert done.returncode == 3, done.stderr
    with pytest.raises(Refused, match="nats a token from the SFT captioner") as again:
        loop.dpo(tmp_path, config, 1)
    seen = json.loads((home / "alarm.json").read_text())
    assert seen["what"] == again.value.what and seen["what"] in done.stderr
    assert seen["kept"] == checkpoints(home)[-1] and f"checkpoint: {seen['kept']}" in done.stderr
    assert not (tmp_path / "round-1" / "captioner").exists() and not (home / "stage.json").exists()
    assert Run.open(tmp_path, config).newest_captioner() == tmp_path / "sft" / "captioner"
    gentle = round_config(golden_sft_steps=0)
    assert loop.dpo(tmp_path, gentle, 1, redo=True) == tmp_path / "round-1" / "captioner"
    assert (tmp_path / "round-1" / "captioner").is_dir() and not (home / "alarm.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("golden_sft_steps", [0, 2])
def test_dpo_command(
    pairs: list[Pair], folder: Path, tmp_path: Path, golden_sft_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run_dir = round_config(golden_sft_steps=golden_sft_steps), tmp_path / "run"
    made_round(run_dir, config, pairs, folder)
    step, ours, root = Trainer.training_step, list[str](), Path(__file__).parent.parent
    folders = (root / "captioner", root / "loops")

    def seen(self: Any, *arguments: Any, **named: Any) -> torch.Tensor:
        frames = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()]
        ours[:] = [name for file, name in frames if any(map(file.is_relative_to, folders))]
        return step(self, *arguments, **named)

    monkeypatch.setattr(Trainer, "training_step", seen)
    loop.dpo(run_dir, config, 1)
    assert ours == ["dpo", "_train", "prefer", "fit", "train", "training_step"]

    home = run_dir / "round-1"
    reference = home / "dpo" / "reference" if golden_sft_steps else run_dir / "sft" / "captioner"
    manifest = json.loads((home / "dpo" / "stage.json").read_text())
    where = str(reference.relative_to(run_dir))
    assert manifest["reference"] == {"path": where, "hash": hash_path(reference)}
    stored = Shards(home / "dpo" / "pairs", Pair).read_all()
    assert [p.chosen for p in stored] == [p.chosen for p in pairs]
    referee, paths = model.load(reference), paths_of(folder)
    with torch.no_grad():
        fresh = plain_logps(referee, paths[stored[0].key], stored[0].rejected).sum().item()
    assert stored[0].ref_rejected_logp == pytest.approx(fresh, rel=1e-5)
    width = model.load(home / "captioner").model.config.text_config.intermediate_size
    assert width == referee.model.config.text_config.intermediate_size + 4
    assert not (home / "dpo" / "checkpoints").exists()


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_accumulation(
    pairs: list[Pair], folder: Path, tmp_path: Path
) -> None:
    """Short SFT, reference log-probabilities, preference training and its looks; images differ in pairs."""
    pairs = pairs[1:]
    logged: list[list[dict[str, float]]] = []
    for gpus, accumulation in ((1, 2), (2, 1)):
        training = TRAINING.model_copy(
            update={
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": accumulation,
                "max_steps": 3,
            }
        )
        tuning = AdapterTuning(vision_width=4, language_width=4)
        watch = AlarmsConfig(every=2, images=2, max_tokens=8)
        dpo = DPOConfig(golden_sft_steps=2, tuning=tuning, training=training, alarms=watch)
        held_out = {"gate": {"data": "scenes:validation:2"}, "evaluate": {"data": "scenes:test:2"}}
        config = Config.model_validate({"dpo": dpo, "model": {"device": "cpu"}, **held_out})
        run_dir = tmp_path / str(gpus)
        made_round(run_dir, config, pairs, folder)
        loop.dpo(run_dir, config, 1, gpus=gpus)
        lines = (run_dir / "round-1" / "dpo" / "metrics.jsonl").read_text().splitlines()
        logged.append([json.loads(line) for line in lines])
    one, two = logged
    assert len(one) == len(two) >= 4
    compared = 0
    for alone, together in zip(one, two, strict=True):
        assert alone.keys() == together.keys()
        for name in ("loss", "grad_norm", "probe/kl", "probe/tokens"):  # the others are means over pairs
            if name in alone:  # TRL rounds the losses
                assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=1.01e-4), name
                compared += 1
    assert compared >= 10
    weights = [load_file(tmp_path / n / "round-1/captioner/model.safetensors") for n in ("1", "2")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-5, atol=2e-5)


def test_pairs_of_an_evaluation_image_are_refused(pairs: list[Pair], folder: Path, tmp_path: Path) -> None:
    config = Config.model_validate(
        {"gate": {"data": "scenes:validation:1"}, "evaluate": {"data": str(folder)}}
    )
    made_round(tmp_path / "run", config, pairs, folder)
    with pytest.raises(Refused, match="4 images of the pairs are evaluation images"):
        loop.dpo(tmp_path / "run", config, 1)


def test_a_round_without_pairs_names_the_command(tmp_path: Path) -> None:
    config = Config()
    Run.open(tmp_path / "run", config)
    (tmp_path / "run" / "sft" / "captioner").mkdir(parents=True)
    with pytest.raises(RunError, match="captioner golden --round 1"):
        loop.dpo(tmp_path / "run", config, 1)
