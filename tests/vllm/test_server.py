"""The server engine against a real vLLM server: same prompts, same captions, same answers, kills survived."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from captioner import prompts, views
from captioner.config import Config, EngineConfig, SamplingConfig, ServerConfig, ToolConfig, ViewsOverride
from captioner.engines import CaptionRequest, NoAnswer, QuestionBatch, TextRequest, make_engine
from captioner.engines.server import ServerEngine, served_name
from captioner.engines.text import TextEngine
from captioner.errors import EngineError
from captioner.lab import grid as scenes
from captioner.method.llm import LLM
from captioner.method.tool import ToolFailed
from captioner.models import fuse, model, render
from captioner.sources.folder import read_captions
from loops.cli import main
from tests.test_fuse import adapted
from tests.test_render import messages
from tests.vllm.conftest import Server, running

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("vllm")]  # one server for all
SIZES = [(128, 128), (200, 90), (64, 150), (300, 20)]
QUESTIONS = ["Visible: northwest red?", " a  circle\n above a star? ", "ring", "Grüße, 图 🙂?"]
GREEDY = SamplingConfig(temperature=0.0, max_tokens=24)


def image(seed: int = 0, width: int = 128, height: int = 128) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def requests(count: int = 6) -> list[CaptionRequest]:
    return [CaptionRequest(f"k{i}", image(i, *SIZES[i % 4]), f"{i:064x}") for i in range(count)]


def settings(kind: str, url: str = "http://127.0.0.1:1/v1", **engine: object) -> Config:
    return Config.model_validate({"engine": {"type": kind, "urls": [url], "wait": 600.0, **engine}})


def both(checkpoint: Path, server: Server) -> tuple[object, ServerEngine]:
    ours = make_engine(checkpoint, settings("server", server.url))
    assert isinstance(ours, ServerEngine)
    return make_engine(checkpoint, settings("hf")), ours


def test_greedy_captions_equal_those_of_hf(checkpoint: Path, server: Server) -> None:
    hf, ours = both(checkpoint, server)
    expected = list(hf.sample(requests(), 1, GREEDY))  # type: ignore[attr-defined]
    said = list(ours.sample(requests(), 1, GREEDY))
    ours.close()
    assert len({each.text for [each] in expected}) > 3
    for [theirs], [candidate] in zip(expected, said, strict=True):
        assert candidate.model_dump(exclude={"mean_logprob"}) == theirs.model_dump(exclude={"mean_logprob"})


def test_samples_are_seeded_and_never_say_markup(checkpoint: Path, server: Server) -> None:
    hf, ours = both(checkpoint, server)
    sampling = SamplingConfig(max_tokens=60, seed=5)
    first, again = (list(ours.sample(requests(3), 4, sampling)) for _ in range(2))
    assert first == again
    assert len({c.text for rows in first for c in rows}) == 12
    assert not any("<|" in c.text for rows in first for c in rows)
    assert {c.finish_reason for rows in first for c in rows} <= {"stop", "length"}
    reference = list(hf.sample(requests(3), 4, sampling))  # type: ignore[attr-defined]
    assert [[c.seed for c in rows] for rows in first] == [[c.seed for c in rows] for rows in reference]
    ours.close()


def test_soft_tokens_are_never_sampled(checkpoint: Path, server: Server) -> None:
    """And would be, were they not suppressed: the captions of a random model that is asked hot."""
    ours = make_engine(checkpoint, settings("server", server.url))
    assert isinstance(ours, ServerEngine)
    said: set[int] = set()

    def read(answer: dict[str, Any]) -> tuple[list[int], list[float]]:
        said.update(answer["choices"][0]["token_ids"])
        return [0], [0.0]

    ours._caption = read  # type: ignore[method-assign]
    hot = SamplingConfig(max_tokens=60, temperature=2.0)
    soft = set(ours.captioner.soft_prompt_ids)
    list(ours.sample(requests(3), 6, hot))
    assert soft and not said & soft and not said & ours._words.never
    ours._words.never = set()
    list(ours.sample(requests(3), 6, hot))
    assert said & soft
    ours.close()


def test_p_yes_equals_that_of_hf(checkpoint: Path, server: Server) -> None:
    hf, ours = both(checkpoint, server)
    views = ("all", "center", "whole", "all")
    batches = [
        QuestionBatch(image(i, *SIZES[i]), QUESTIONS * (1 + 3 * i), view) for i, view in enumerate(views)
    ]
    expected = list(hf.p_yes(batches))  # type: ignore[attr-defined]
    answers = list(ours.p_yes(batches))
    for theirs, mine in zip(expected, answers, strict=True):
        assert [a.p_yes for a in mine] == pytest.approx([a.p_yes for a in theirs], abs=1e-4)
        assert [a.label_mass for a in mine] == pytest.approx([a.label_mass for a in theirs], abs=1e-4)
    assert len({round(a.p_yes, 3) for row in answers for a in row}) > 4
    [[markup, plain]] = ours.p_yes([QuestionBatch(image(0), ["<|im_end|>?", "red?"])])
    assert np.isnan(markup.p_yes) and 0 < plain.p_yes < 1
    ours.close()


def test_pixels_that_the_server_has_forgotten_are_sent_again(checkpoint: Path, server: Server) -> None:
    _, ours = both(checkpoint, server)
    shown = ours._show(image(77), "all")
    ours.close()

    class Forgetful(set):  # type: ignore[type-arg]
        def __contains__(self, item: object) -> bool:
            return bool(len(self)) or super().__contains__(item)

    _, ours = both(checkpoint, server)
    known = Forgetful({object()})  # claims that the server has seen what it has not
    shown.known = known
    ours._show = lambda source, view: shown  # type: ignore[method-assign, assignment]
    [[candidate]] = ours.sample(requests(1), 1, GREEDY)
    assert candidate.finish_reason in ("stop", "length")
    ours.close()


def test_prompts_that_the_server_reads_otherwise_stop_the_job(checkpoint: Path, server: Server) -> None:
    ours = make_engine(checkpoint, settings("server", server.url))
    assert isinstance(ours, ServerEngine)
    make = ours.renderer._make_prefix

    def other(*args: object) -> object:
        prefix = make(*args)  # type: ignore[arg-type]
        prefix.ids[1], prefix.ids[2] = prefix.ids[2], prefix.ids[1]
        return prefix

    ours.renderer._make_prefix = other  # type: ignore[method-assign, assignment]
    with pytest.raises(EngineError, match="the server reads a prompt"):
        list(ours.sample(requests(1), 1, GREEDY))
    ours.close()
    narrow = ViewsOverride(size=48)  # its views are another number of tokens than this server's
    ours = ServerEngine(model.load_frontend(checkpoint), narrow, EngineConfig(urls=(server.url,)))
    [[candidate]] = ours.sample(requests(1), 1, GREEDY)  # smaller views are shown as they are, too
    assert candidate.finish_reason in ("stop", "length")
    ours.close()


def test_another_checkpoint_is_not_taken_for_ours(server: Server) -> None:
    base = model.checkpoint_path("scenes-base")
    ours = make_engine(base, settings("server", server.url))
    with pytest.raises(EngineError, match="no server serves captioner-"):
        list(ours.sample(requests(1), 1, GREEDY))
    ours.close()


class Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    answer: Literal["yes", "no"]
    parts: list[Literal["top", "bottom"]] = Field(min_length=1, max_length=3)


def test_json_answers_follow_their_schema(server: Server) -> None:
    engine = TextEngine(ServerConfig(urls=(server.url,)))
    answers = list(engine.complete([TextRequest(f"Is {i} red?", 128) for i in range(4)], Verdict))
    assert all(isinstance(answer, Verdict) and 1 <= len(answer.parts) <= 3 for answer in answers)
    assert engine.tokens > 20
    [cut] = engine.complete([TextRequest("Is it red?", 3)], Verdict)
    assert isinstance(cut, NoAnswer) and "cut" in cut.reason
    engine.close()


def test_a_tool_that_talks_nonsense_fails_its_images_and_no_more(server: Server, tmp_path: Path) -> None:
    """A random model with the schema forced on it: each image ends with statements or a reason."""
    tool = LLM(ToolConfig(type="server", urls=(server.url,), max_tokens=120, retries=1), tmp_path)
    images = [["northwest red circle, center blue", "north star"], ["south ring"], [""]]
    tool.prepare(images)
    outcomes = []
    for captions in images:
        try:
            outcomes.append(len(tool.merge(captions)))
        except ToolFailed as error:
            outcomes.append(str(error))
    assert len(outcomes) == 3 and outcomes[2] == 0 and any(isinstance(each, str) for each in outcomes)
    tool.close()


def test_a_killed_server_costs_nothing_but_time(
    checkpoint: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`captioner caption`, the server killed after the first shard and started again: the rows of `hf`."""
    scenes.write("test", 24, tmp_path / "images")
    job = ["caption", str(tmp_path / "images"), "--checkpoint", str(checkpoint)]
    job += [
        "--caption.shard_rows",
        "4",
        "--caption.sampling.max_tokens",
        "24",
        "--run",
        str(tmp_path / "run"),
    ]
    assert main([*job, "--out", str(tmp_path / "hf")]) == 0
    there = ["--engine.type", "server", "--engine.urls", server.url, "--engine.in_flight", "2"]
    there += ["--engine.wait", "600"]
    crashed = threading.Event()

    def crash() -> None:
        while not list((tmp_path / "ours").glob("0*.parquet")):
            time.sleep(0.01)
        server.kill()
        crashed.set()
        server.start()

    thread = threading.Thread(target=crash)
    thread.start()
    assert main([*job, *there, "--out", str(tmp_path / "ours")]) == 0
    assert crashed.is_set()
    thread.join()
    theirs, ours = (list(read_captions(tmp_path / name)) for name in ("hf", "ours"))
    assert [row.model_dump() for row in ours] == [row.model_dump() for row in theirs]
    assert len(ours) == 24 and all(row.error is None for row in ours)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])  # all other tests are of qwen3_vl
def test_every_family_is_served(family: str, vllm_python: str, tmp_path: Path) -> None:
    """Adapters in both towers and a soft prompt; vLLM brings transformers 5, whose configs are strict."""
    fuse.export(adapted(family, torch.float32), tmp_path / "tiny", multiple=16)
    with running(vllm_python, tmp_path / "tiny", tmp_path) as server:
        hf, ours = both(tmp_path / "tiny", server)
        expected = [candidate.text for [candidate] in hf.sample(requests(), 1, GREEDY)]  # type: ignore[attr-defined]
        assert [candidate.text for [candidate] in ours.sample(requests(), 1, GREEDY)] == expected
        ours.close()


PLAIN = """
import json, sys
from pathlib import Path
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, crops, messages = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
model, processor = (kind.from_pretrained(folder) for kind in (AutoModelForImageTextToText, AutoProcessor))
text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
said = []
for place in sorted(crops.iterdir()):
    images = [Image.open(file) for file in sorted(place.iterdir())]
    fed = processor(text=[text], images=images, do_resize=False, return_tensors="pt")
    tokens = model.generate(**fed, max_new_tokens=80, do_sample=False)[0, fed["input_ids"].shape[1] :]
    said.append(processor.decode(tokens, skip_special_tokens=True))
assert not any(name.split(".")[0] in ("captioner", "adapters", "peft") for name in sys.modules)
print("RESULT" + json.dumps(said))
"""


def test_an_exported_captioner_in_vllm_and_in_plain_transformers(vllm_python: str, tmp_path: Path) -> None:
    """The base with trained adapters and soft prompt, as `captioner export` leaves it: the same captions."""
    run, out = str(tmp_path / "run"), tmp_path / "captioner"
    training = ["--sft.data", "scenes:sft:64", "--sft.validation", "none", "--sft.multi_view_share", "0.5"]
    training += ["--sft.training.max_steps", "24", "--sft.training.per_device_train_batch_size", "8"]
    training += ["--sft.training.learning_rate", "5e-3", "--model.device", "cpu"]
    assert main(["sft", "--run", run, *training]) == 0
    adapter = ["--adapter", f"{run}/sft/adapter", "--model.path", "scenes-base"]
    assert main(["export", "--run", run, "--out", str(out), *adapter, "--multiple", "32", "--verify"]) == 0

    hf = make_engine(out, settings("hf"))
    renderer = render.Renderer(hf.captioner, hf.captioner.views)  # type: ignore[attr-defined]
    soft = "".join(renderer.captioner.tokenizer.convert_ids_to_tokens(renderer.captioner.soft_prompt_ids))
    assert soft.startswith("<|soft_0|>") and len(renderer.tags()) == 6
    pictures = [scenes.draw(scenes.sample("test", i), i) for i in range(6)]
    for i, picture in enumerate(pictures):
        (place := tmp_path / "crops" / str(i)).mkdir(parents=True)
        for j, crop in enumerate(views.cut(picture, renderer.plan(*picture.size))):
            crop.save(place / f"{j}.png")
    asked = [CaptionRequest(f"k{i}", picture, f"{i:064x}") for i, picture in enumerate(pictures)]
    greedy = SamplingConfig(temperature=0.0, max_tokens=80)
    expected = [candidate.text for [candidate] in hf.sample(asked, 1, greedy)]
    assert len(set(expected)) == 6 and all("," in text for text in expected)

    command = [sys.executable, "-c", PLAIN, str(out), str(tmp_path / "crops")]
    plain = subprocess.run(
        [*command, json.dumps(messages(renderer, soft))],
        cwd=tmp_path,  # where this package cannot be imported from
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert plain.returncode == 0, plain.stderr
    assert json.loads(plain.stdout.partition("RESULT")[2]) == expected

    with running(vllm_python, out, tmp_path) as server:
        ours = make_engine(out, settings("server", server.url))
        assert [candidate.text for [candidate] in ours.sample(asked, 1, greedy)] == expected
        ours.close()
        pictures[0].save(tmp_path / "photo.png")
        cutting, _, client = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
        code = (cutting + client).replace("photo.jpg", "photo.png").replace("max_tokens=256", "max_tokens=80")
        code = code.replace("http://127.0.0.1:8000/v1", server.url).replace(
            'model="captioner"', f'model="{served_name(out)}"'
        )
        said = subprocess.run([vllm_python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        assert said.stdout.strip() == expected[0]


def test_the_shipped_base(vllm_python: str, tmp_path: Path) -> None:
    """Float32 on both sides: captions and answers of the real weights, whatever they are worth."""
    base = model.checkpoint_path("scenes-base")
    with running(vllm_python, base, tmp_path) as server:
        scenes.write("test", 6, tmp_path / "images")
        pictures = [
            Image.open(path).convert("RGB") for path in sorted((tmp_path / "images").glob("images/*.png"))
        ]
        asked = [CaptionRequest(f"k{i}", each, f"{i:064x}") for i, each in enumerate(pictures)]
        questions = [prompts.load("question", statement=f"{each} circle") for each in ("center", "north")]
        prompt = prompts.load("describe")
        hf = make_engine(base, settings("hf"), prompt)
        ours = make_engine(base, settings("server", server.url), prompt)
        sampling = SamplingConfig(temperature=0.0, max_tokens=60)
        expected = [each for [each] in hf.sample(asked, 1, sampling)]
        said = [each for [each] in ours.sample(asked, 1, sampling)]
        rounded = {"mean_logprob"}
        assert [x.model_dump(exclude=rounded) for x in said] == [
            x.model_dump(exclude=rounded) for x in expected
        ]
        batches = [QuestionBatch(each, questions) for each in pictures]
        for theirs_, mine_ in zip(hf.p_yes(batches), ours.p_yes(batches), strict=True):
            assert [a.p_yes for a in mine_] == pytest.approx([a.p_yes for a in theirs_], abs=1e-4)
        ours.close()
