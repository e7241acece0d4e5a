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
from captioner.models.render import Renderer

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
