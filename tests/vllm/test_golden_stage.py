"""The golden stage on a real vLLM server: samples, JSON answers and P(yes), and a server that dies twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from captioner.config import Config
from captioner.errors import Refused
from captioner.lab import grid as scenes
from captioner.method import rounds
from captioner.models import model
from captioner.runs import Run
from loops import golden as loop
from tests.test_golden import config_of, failures_of, give_verifier, rows_of
from tests.tiny import VIEW_SIZE, architecture, tokenizer
from tests.vllm.conftest import Server, running

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("vllm")]
IMAGES = 16
# What follows these tokens, whatever the image: captions of a few words, and JSON whose one statement is one
# of them. So the answers of a random model hold up for some images and fail for the others.
WORDS = ["Ġwest", "Ġsouth", "Ġred", "Ġstar"]
HABITS = {
    **{word: [",", "<|im_end|>"] for word in WORDS},
    **{",": WORDS, '"': ["west", "south"], "west": '"', "south": '"'},
    **{"[": "0", ":": ["0", "t"], "0": "]", "}": "]"},
}
FLOATS = {"mean_logprob", "p_yes", "label_mass"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model that plays all three: captioner, verifier and tool LLM."""
    folder, words = tmp_path_factory.mktemp("stage") / "tiny", tokenizer()
    tiny = architecture("qwen3_vl", len(words))
    tiny.tie_word_embeddings = tiny.text_config.tie_word_embeddings = False
    captioner = model.build_random(folder, tiny, words, view_size=VIEW_SIZE, seed=5)  # its captions differ
    ids: Callable[[Any], Any] = words.convert_tokens_to_ids
    with torch.no_grad():
        heard = captioner.model.get_input_embeddings().weight
        said = captioner.model.get_output_embeddings().weight
        said[ids([*WORDS, ","])] *= 3
        for token, following in HABITS.items():
            direction = torch.randn(heard.shape[1], generator=torch.Generator().manual_seed(ids(token)))
            heard[ids(token)] = 30 * direction / direction.norm()  # drowns what the layers add
            said[ids(following)] += 1.2 * direction / direction.norm()
    captioner.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(vllm_python: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(vllm_python, checkpoint, tmp_path_factory.mktemp("log")) as started:
        yield started


def a_run(home: Path, checkpoint: Path, server: Server) -> Config:
    """A home with images and a run whose captioner and verifier are on the server, as its tool LLM is."""
    scenes.write("round", IMAGES, home / "images")
    there = {"type": "server", "urls": [server.url], "in_flight": 4, "wait": 600.0}
    config = config_of(
        home,
        views={},
        engine=there,
        tool={**there, "max_tokens": 400, "statements": 1},
        golden={"shard_rows": 2, "samples": 4, "sampling": {"max_tokens": 40}},
        max_failed=1.0,  # of most images a random verifier confirms nothing
        pairs={"min_refuted": 0, "max_dropped": 1.0},
    )
    Run.open(home / "run", config)
    for place in ("sft/captioner", "round-1/qa/captioner"):
        (home / "run" / place).parent.mkdir(parents=True)
        (home / "run" / place).symlink_to(checkpoint)
    give_verifier(home, {"all": 0.9})
    return config


def told(home: Path, name: str) -> tuple[list[dict[str, Any]], list[float]]:
    """The rows of a stage: what must be the same, and what may differ by the rounding of another batch."""
    rows = [row.model_dump() for row in rows_of(home, name)]
    numbers = [row.pop(field) for row in rows for field in FLOATS & row.keys()]
    return [{key: value for key, value in row.items() if key != "why"} for row in rows], numbers


def test_a_server_that_dies_twice_costs_no_row(checkpoint: Path, server: Server, tmp_path: Path) -> None:
    """Samples at temperature 1 with a seed a row, tool answers and verdicts: those of an undisturbed run.

    The server dies when a file of the stage is there. The thread looks again and again: nothing tells it.
    """
    calm, storm = tmp_path / "calm", tmp_path / "storm"
    config = a_run(calm, checkpoint, server)
    with pytest.raises(Refused, match=rf"\d+ of {IMAGES} images failed \(.*tool: "):
        loop.golden(calm / "run", config.model_copy(update={"max_failed": 0.05}), 1)
    loop.golden(calm / "run", config, 1)

    config, deaths = a_run(storm, checkpoint, server), []

    def crash() -> None:
        # in the middle of the samples; and when the tool's answers begin, which are few
        for name, file in (("candidates", "00000.parquet"), ("claims", "begun.json")):
            stage = storm / "run" / "round-1" / name
            while not (stage / file).is_file():
                time.sleep(0.01)
            server.kill()
            deaths.append((name, (stage / "stage.json").exists()))
            server.start()

    thread = threading.Thread(target=crash)
    thread.start()
    loop.golden(storm / "run", config, 1)
    thread.join()
    assert deaths == [("candidates", False), ("claims", False)]
    for name in rounds.STAGES:
        (rows, numbers), (expected, near) = told(storm, name), told(calm, name)
        assert rows == expected and rows
        assert numbers == pytest.approx(near, abs=1e-4)
    assert len({row.text for row in rows_of(calm, "candidates")}) == 4 * IMAGES
    for name in rounds.STAGES[:-1]:
        assert failures_of(storm, name) == failures_of(calm, name)
    answered = {row.key for row in rows_of(calm, "claims")}
    failed = {row.key for row in failures_of(calm, "claims") if row.reason.startswith("tool: ")}
    assert answered and failed and len(answered | failed) == IMAGES
    assert len({round(row.p_yes, 3) for row in rows_of(calm, "claims")}) > 1
