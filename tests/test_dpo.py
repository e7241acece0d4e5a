"""Preference training against hand-written losses on plain forwards, and loops/dpo.py."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from captioner import model, render, scenes, train
from captioner.config import AdapterTuning, Config, DPOConfig, TrainingConfig, ViewsConfig
from captioner.errors import RunError
from captioner.formats.folder import read_folder
from captioner.model import Captioner
from captioner.records import Golden, Pair
from captioner.runs import Run, Shards, hash_path
from captioner.views import load_image
from loops import dpo as loop
from tests.test_train import compare_losses, logged, prepared, state
from tests.tiny import tiny_checkpoint

BETA, CE_WEIGHT = 0.3, 0.7
TRAINING = TrainingConfig(steps=4, batch_size=2, learning_rate=1e-3, save_steps=2, log_steps=1, seed=3)


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


def plain_logps(captioner: Captioner, path: Path, caption: str) -> torch.Tensor:
    """Log-probabilities [T] of the caption and its end token, by an ordinary forward of one sequence."""
    renderer = render.Renderer(captioner, ViewsConfig())
    pixel_values, grid = renderer.images(load_image(path)[0])
    row = render.TrainRow(pixel_values, grid, False, [renderer.branch_ids(None, caption)])
    batch = render.collate(renderer, [row])
    labels = batch.pop("labels")[0, 1:]
    assert labels[labels != -100][-1] == renderer.end_id
    logits = captioner.model(**batch).logits[0, :-1]
    kept = labels != -100
    return F.log_softmax(logits[kept], dim=-1).gather(1, labels[kept, None])[:, 0]


def trainer_of(captioner: Captioner, pairs: Sequence[Pair], folder: Path, out: Path) -> Any:
    renderer = render.Renderer(captioner, ViewsConfig())
    targets = [(train.Target(None, pair.chosen), train.Target(None, pair.rejected)) for pair in pairs]
    paths = paths_of(folder)
    images = train.TrainingImages(
        [p.key for p in pairs], [paths[p.key] for p in pairs], lambda i, _: targets[i]
    )
    collator = train.PairCollator(renderer, images, TRAINING.seed, 2)
    arguments = train.dpo_arguments(captioner, TRAINING, out, BETA, CE_WEIGHT)
    return train.make_trainer(train._DPO, captioner, collator, arguments)


def test_loss_and_reference_equal_plain_forwards(pairs: list[Pair], folder: Path, tmp_path: Path) -> None:
    captioner = prepared()
    with train.shared_prefix(captioner):
        trainer = trainer_of(captioner, pairs, folder, tmp_path)
        stored = train.reference_logps(trainer, pairs, 3)
    paths = paths_of(folder)
    captioner.model.__dict__.pop("forward")
    with torch.no_grad():
        for pair in stored:
            for text, logp in ((pair.chosen, pair.ref_chosen_logp), (pair.rejected, pair.ref_rejected_logp)):
                plain = plain_logps(captioner, paths[pair.key], text).sum().item()
                assert logp == pytest.approx(plain, rel=1e-6, abs=1e-5)

    torch.manual_seed(0)
    for parameter in captioner.model.parameters():  # a policy that has left its reference
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    with train.shared_prefix(captioner):
        trainer = trainer_of(captioner, pairs, folder, tmp_path)
        collator = trainer.data_collator
        collator.reference = [(p.ref_chosen_logp, p.ref_rejected_logp) for p in stored]
        batch = collator([{"position": position} for position in (2, 3, 4)])
        picked = [collator.order(position) for position in batch.pop("positions").tolist()]
        ends = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -1)
        assert all(row[row >= 0][-1] == collator.renderer.end_id for row in ends)  # chosen and rejected end
        loss = trainer.compute_loss(captioner.model, batch)
        gradient = torch.autograd.grad(loss, captioner.model.get_input_embeddings().soft)[0]
    captioner.model.__dict__.pop("forward")

    scores, chosen_logps = [], []
    for pair in (stored[index] for index in picked):
        chosen = plain_logps(captioner, paths[pair.key], pair.chosen)
        rejected = plain_logps(captioner, paths[pair.key], pair.rejected)
        scores.append((chosen.sum() - pair.ref_chosen_logp) - (rejected.sum() - pair.ref_rejected_logp))
        chosen_logps.append(chosen)
    by_hand = -F.logsigmoid(BETA * torch.stack(scores)).mean() - CE_WEIGHT * torch.cat(chosen_logps).mean()
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(by_hand, captioner.model.get_input_embeddings().soft)[0]
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def fit(
    captioner: Captioner,
    pairs: Sequence[Pair],
    folder: Path,
    out: Path,
    training: TrainingConfig = TRAINING,
    **more: Any,
) -> dict[str, float]:
    renderer = render.Renderer(captioner, ViewsConfig())
    return train.train_dpo(
        captioner, renderer, pairs, paths_of(folder), training, out, beta=BETA, ce_weight=CE_WEIGHT, **more
    )


def frozen_soft() -> Captioner:
    captioner = prepared()
    captioner.model.get_input_embeddings().soft.requires_grad_(False)
    return captioner


def test_ten_steps(pairs: list[Pair], folder: Path, tmp_path: Path) -> None:
    captioner = frozen_soft()
    before = state(captioner)
    metrics = fit(captioner, pairs, folder, tmp_path, TRAINING.model_copy(update={"steps": 10}))
    after = state(captioner)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name, p in captioner.model.named_parameters() if p.requires_grad}
    assert all("adapters" in name for name in moved)
    assert metrics["logps/chosen"] < 0 and metrics["logps/rejected"] < 0
    assert logged(tmp_path, "rewards/margins")[0] == pytest.approx(0, abs=1e-4)  # it starts at the reference
    assert not captioner.model.model._forward_hooks and not captioner.model.model._forward_pre_hooks
    compare_losses("dpo", logged(tmp_path))


def test_resumed_run_equals_an_uninterrupted_one(
    pairs: list[Pair], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, dying = frozen_soft(), frozen_soft()
    fit(straight, pairs, folder, tmp_path / "a")
    step = train._DPO.training_step

    def dies(self: Any, *arguments: Any, **named: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            raise InterruptedError
        return step(self, *arguments, **named)

    monkeypatch.setattr(train._DPO, "training_step", dies)
    with pytest.raises(InterruptedError):
        fit(dying, pairs, folder, tmp_path / "b")
    monkeypatch.undo()
    # a resumed training is no longer the reference: it must not compute the log-probabilities again
    monkeypatch.setattr(train, "reference_logps", lambda *_: pytest.fail("computed again"))
    resumed = frozen_soft()
    fit(resumed, pairs, folder, tmp_path / "b")
    for (name, a), b in zip(state(straight).items(), state(resumed).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
    assert logged(tmp_path / "a") == pytest.approx(logged(tmp_path / "b"), abs=1e-6)


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


@pytest.mark.parametrize("golden_sft_steps", [0, 2])
def test_dpo_command(pairs: list[Pair], folder: Path, tmp_path: Path, golden_sft_steps: int) -> None:
    tuning = AdapterTuning(vision_width=4, language_width=4)
    dpo = DPOConfig(golden_sft_steps=golden_sft_steps, tuning=tuning, training=TRAINING)
    config, run_dir = Config(dpo=dpo), tmp_path / "run"
    made_round(run_dir, config, pairs, folder)
    args = argparse.Namespace(run_dir=run_dir, redo=False, round=1)
    assert loop.run(config, args) == 0

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


def test_a_round_without_pairs_names_the_command(tmp_path: Path) -> None:
    config = Config()
    Run.open(tmp_path / "run", config)
    (tmp_path / "run" / "sft" / "captioner").mkdir(parents=True)
    with pytest.raises(RunError, match="captioner golden --round 1"):
        loop.run(config, argparse.Namespace(run_dir=tmp_path / "run", redo=False, round=1))
