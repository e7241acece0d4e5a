"""The shipped base and how it is made: the packed forward is the stock one, labels are what patches show."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from captioner.config import ViewsConfig
from captioner.lab import scenes
from captioner.lab.base import accept, architecture, dense, language, own, packed
from captioner.lab.base.pool import NOT_HERE, draw_pool
from captioner.models import model
from captioner.models.render import IGNORED, Renderer

BASE = Path(__file__).resolve().parents[2] / "data" / "lab" / "base"
STAGE = language.Stage("test", 1, dict.fromkeys(scenes.KINDS, 1.0), questions=12)


@pytest.fixture(scope="module")
def captioner():
    return model.load(BASE)


@pytest.fixture(scope="module")
def renderer(captioner):
    return Renderer(captioner, ViewsConfig())


@pytest.fixture(scope="module")
def pool(renderer):
    return draw_pool(renderer, "pretrain", 6, seed=9, labels=True)


@torch.no_grad()
@pytest.mark.parametrize("views", [range(1), range(6), range(1, 6)])
def test_the_packed_forward_is_the_stock_one(captioner, renderer, pool, views):
    branches = language.Writer(renderer).questions(random.Random(0), pool.scenes[0], STAGE)
    ids, _ = language.pad([branches])
    prefix = language.prefix_of(renderer, views)
    pixels = renderer.normalise(pool.patches[0][list(views)].flatten(0, 1))
    grid = torch.tensor([[1, 6, 6]] * len(views))
    features = captioner.model.get_image_features(pixels, grid)
    features = torch.cat(list(features[0] if isinstance(features, tuple) else features.pooler_output))
    found = packed.hidden(captioner, renderer, prefix, features[None], ids, torch.float32)
    for n, (branch, _) in enumerate(branches):
        row = torch.tensor([prefix.ids + branch])
        positions = torch.cat(
            [prefix.positions, torch.arange(len(branch)).add(prefix.next_position).expand(3, -1)], 1
        )
        stock = captioner.model.model(
            input_ids=row, position_ids=positions[:, None], pixel_values=pixels, image_grid_thw=grid
        )[0]
        here = stock[0, len(prefix.ids) :]
        torch.testing.assert_close(found[0, n, : len(branch)], here, atol=2e-4, rtol=2e-4)


def test_questions_and_captions_are_rendered_as_the_product_does(captioner, renderer, pool):
    writer = language.Writer(renderer)
    ids, targets = writer.yes_no("teapot top left", True, "object")
    whole, mask = renderer.branch_ids("Visible: teapot top left?", "yes")
    assert ids == whole[:-1]
    learned = [captioner.tokenizer.decode([t]) for t in targets if t != IGNORED]
    assert learned == [" top", " left", "yes", "<|im_end|>"]
    assert sum(mask) == 2
    assert [t for t in writer.yes_no("teapot top left", False, "object")[1] if t != IGNORED] == [
        renderer.text_ids("no")[0], renderer.end_id
    ]  # fmt: skip
    ids, targets = writer.captions(random.Random(0), pool, 0)[0]
    text = captioner.tokenizer.decode([t for t in targets if t not in (IGNORED, renderer.end_id)])
    judged = scenes.judge(text, pool.scenes[0])
    assert judged.true > 0 and judged.false == judged.unparsed == 0


def test_labels_name_what_a_patch_shows(pool):
    right = dense.labels(pool)
    for i, scene in enumerate(pool.scenes):
        seen = {scenes.NOUNS[n] for n in right["noun"][i, 0].tolist() if n != NOT_HERE}
        assert seen == {thing.noun for thing in scene.things}
        for view in range(6):
            shown = pool.shown[i, 0, view]
            for patch in range(36):
                number = shown[patch]
                if number == NOT_HERE:
                    assert right["noun"][i, view, patch] == right["size"][i, view, patch] == NOT_HERE
                else:
                    thing = scene.things[number]
                    assert scenes.NOUNS[right["noun"][i, view, patch]] == thing.noun
                    assert scenes.SIZES[right["size"][i, view, patch]] == thing.size
                    assert right["count"][i, view, patch] == scene.counts()[thing.noun] - 1
        stuck = {scenes.STICKERS[s] for s in right["sticker"][i, 1:].flatten().tolist() if s != NOT_HERE}
        assert stuck <= {thing.sticker for thing in scene.things}


def test_stickers_teach_nothing_in_whole_views(captioner, renderer, pool):
    reader, right = dense.Reader(captioner), dense.labels(pool)
    features = torch.randn(6, 36, 160)
    batch = {k: v if k == "background" else v[:, 1] for k, v in right.items()}
    losses = []
    for shift in (0, 1):
        other = batch | {"sticker": torch.where(batch["sticker"] >= 0, (batch["sticker"] + shift) % 6, -1)}
        for whole in (True, False):
            losses.append(dense.loss_of(reader, features, other, torch.full((6,), whole)).item())
    assert losses[0] == losses[2]
    assert losses[1] != losses[3]


def test_own_claims_carry_their_truth_and_are_asked_in_balance(renderer):
    scene = scenes.sample("qa", 3)
    true = scenes.statements(scene)
    found = own.claims(scene, [", ".join(true), f"{true[1]}, grass background, brick background, nonsense"])
    assert sum(len(row) for row in found.values()) == len(
        set(true) | {"grass background", "brick background"}
    )
    assert all(scenes.execute(text, scene) is truth for row in found.values() for text, truth in row)
    branches = language.Writer(renderer).claims(random.Random(0), scene, found, 300)
    yes = renderer.text_ids("yes")[0]
    share = np.mean([yes in targets for _, targets in branches])
    assert 0.4 < share < 0.6


def test_the_checkpoint_is_small_stock_and_portable():
    settings = json.loads((BASE / "config.json").read_text())
    assert settings["architectures"] == ["Qwen3VLForConditionalGeneration"]
    text = settings["text_config"]
    assert text["rope_theta"] == 10_000 and text["rope_scaling"]["mrope_section"] == [6, 5, 5]
    assert text["head_dim"] >= 32
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 12_000_000
    assert {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"} <= {
        path.name for path in BASE.iterdir()
    }
    assert settings["captioner"]["views"]["size"] == architecture.VIEW_PX


def test_the_base_sees_more_than_it_says(captioner):
    """A small part of the acceptance: the verifier is right, the captioner leaves out and ends."""
    lines = {line.what: line for line in accept.measure(captioner, 24)}
    kinds = [line.value for what, line in lines.items() if what.startswith("held-out")]
    assert np.mean(kinds) > 0.9
    assert lines["the same, sticker, whole view alone: a sticker cannot be read there"].value < 0.75
    assert lines["whole view: greedy recall"].value < 0.75
    assert (
        lines["whole view: union of 4 samples, recall"].value
        > lines["whole view: greedy recall"].value + 0.05
    )
    assert lines["whole view: captions end"].value > 0.98
