"""How a base is made: the packed forward is the stock one, labels are what patches show."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from captioner.config import ModelConfig, ViewsConfig
from captioner.lab import scenes
from captioner.lab.base import architecture, dense, language, own, packed
from captioner.lab.base.pool import NOT_HERE, draw_pool
from captioner.models import model
from captioner.models.render import IGNORED, Renderer

STAGE = language.Stage("test", 1, dict.fromkeys(scenes.KINDS, 1.0), questions=12)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that the stages begin with, written as a finished one is."""
    home = tmp_path_factory.mktemp("lab")
    architecture.export(architecture.write(home / "random"), home / "base")
    return home / "base"


@pytest.fixture(scope="module")
def captioner(untrained):
    return model.load(ModelConfig(path=str(untrained), dtype="float32"))


@pytest.fixture(scope="module")
def renderer(captioner):
    return Renderer(captioner, ViewsConfig())


@pytest.fixture(scope="module")
def pool(renderer):
    return draw_pool(renderer, "pretrain", 6, seed=9, labels=True)


@pytest.mark.slow
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


def _words(captioner, targets):
    several = [right if isinstance(right, tuple) else (right,) for right in targets if right != IGNORED]
    return [{captioner.tokenizer.decode([token]).strip() for token in right} for right in several]


def test_questions_are_rendered_as_the_product_does_and_hint_at_the_answer(captioner, renderer):
    """The place of a true statement and, right behind the question mark, the answer are learned as well."""
    writer = language.Writer(renderer)
    ids, targets = writer.yes_no("teapot top left", True, "object")
    whole, mask = renderer.branch_ids("Visible: teapot top left?", "yes")
    assert ids == whole[:-1]
    assert _words(captioner, targets) == [{"top"}, {"left"}, {"yes"}, {"yes"}, {"<|im_end|>"}]
    assert targets[-2:] == [token for token, on in zip(whole, mask, strict=True) if on]
    assert _words(captioner, writer.yes_no("teapot top left", False, "object")[1]) == [
        {"no"}, {"no"}, {"<|im_end|>"}
    ]  # fmt: skip
    plain = language.Writer(renderer, hints=False).yes_no("teapot top left", True, "object")
    assert _words(captioner, plain[1]) == [{"yes"}, {"<|im_end|>"}]


def test_captions_are_rendered_as_the_product_does_and_any_thing_may_come_next(captioner, renderer):
    things = [scenes.Thing("teapot", "top left", "large", "star"), scenes.Thing("cup", "top", "large", None)]
    scene = scenes.Scene("brick", (*things, scenes.Thing("lemon", "right", "small", "star")))
    text = "large cup, cup top, star sticker on lemon, teapot left of lemon"
    ids, targets = language.Writer(renderer).caption(scene, text)
    assert ids == renderer.branch_ids(None, text)[0][:-1]
    assert _words(captioner, targets) == [
        {"large"}, {"teapot", "cup"}, {","}, {"cup"}, {"top"}, {","},
        {"star"}, {"sticker"}, {"on"}, {"teapot", "lemon"}, {","},
        {"teapot"}, {"left"}, {"of"}, {"cup", "lemon"}, {"<|im_end|>"},
    ]  # fmt: skip


def test_the_loss_takes_the_mean_over_what_is_equally_right(captioner, renderer, pool):
    features = torch.randn(1, 6, 36, architecture.HIDDEN, generator=torch.Generator().manual_seed(0))
    ids, targets = language.Writer(renderer)._branch(None, "cup top")
    first, end = (next(k for k, t in enumerate(targets) if t != IGNORED), len(targets) - 1)
    cup, pear = (renderer.text_ids(word)[0] for word in ("cup", "pear"))

    def loss(right):
        only = [right if k == first else IGNORED for k in range(end + 1)]
        return language.loss_of(captioner, renderer, features, range(1), [[(ids, only)]])

    torch.testing.assert_close(loss((cup, pear)), (loss(cup) + loss(pear)) / 2)


def test_stickers_teach_nothing_in_whole_views(captioner, pool):
    reader, right = dense.Reader(captioner), dense.labels(pool)
    features = torch.randn(6, 36, architecture.HIDDEN, generator=torch.Generator().manual_seed(0))
    batch = {kind: each if kind == "background" else each[:, 1] for kind, each in right.items()}
    moved = batch | {"sticker": torch.where(batch["sticker"] >= 0, (batch["sticker"] + 1) % 6, NOT_HERE)}
    whole, crop = (
        [dense.loss_of(reader, features, each, torch.full((6,), flag)).item() for each in (batch, moved)]
        for flag in (True, False)
    )
    assert whole[0] == whole[1]
    assert crop[0] != crop[1]


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


def test_the_checkpoint_is_small_stock_and_portable(untrained):
    settings = json.loads((untrained / "config.json").read_text())
    assert settings["architectures"] == ["Qwen3VLForConditionalGeneration"]
    text = settings["text_config"]
    assert text["rope_theta"] == 10_000 and text["rope_scaling"]["mrope_section"] == [6, 5, 5]
    assert text["head_dim"] >= 32
    assert sum(path.stat().st_size for path in untrained.iterdir()) < 12_000_000
    assert {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"} <= {
        path.name for path in untrained.iterdir()
    }
    assert settings["captioner"]["views"]["size"] == architecture.VIEW_PX
