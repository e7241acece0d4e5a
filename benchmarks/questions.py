"""P(yes) of 60 questions per image from one shared prefix, against asking each by ``generate``.

Same weights, same processor, same machine, one run:

    python benchmarks/questions.py [--images 4] [--questions 60] [--checkpoint DIR]

``generate`` gets one question after the other as a user of transformers would ask it: all views, one new
token, greedy, with its scores. Then the cost of a golden caption, split by stage. The first answers of both
ways are compared before anything is timed. What is printed is a ratio; seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from captioner.config import EngineConfig, ModelConfig, SamplingConfig, ViewsOverride
from captioner.engines import CaptionRequest, QuestionBatch
from captioner.engines.hf import HFEngine
from captioner.lab import grid as scenes
from captioner.method import claims, golden, verdicts
from captioner.method.qa import question_text
from captioner.method.tool import Rules
from captioner.models import model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--checkpoint", default="scenes-base")
    args = parser.parse_args()
    captioner = model.load(ModelConfig(path=args.checkpoint))
    engine = HFEngine(captioner, ViewsOverride(), EngineConfig())
    images = [image for image, _ in scenes.rows("round", args.images)]
    statements = [f"{p} {v}" for p in scenes.POSITIONS for values in scenes.VALUES.values() for v in values]
    questions = [
        question_text({"question": text, "answer": "yes", "stratum": ""}) for text in statements * 4
    ][: args.questions]
    batches = [QuestionBatch(image, questions) for image in images]

    few = [QuestionBatch(images[0], questions[:3])]
    for one, other in zip(next(engine.p_yes(few)), by_generate(engine, few[0]), strict=True):
        assert abs(one.p_yes - other) < 1e-4, (one, other)
    shared, _ = timed(lambda: list(engine.p_yes(batches)))
    alone, _ = timed(lambda: [by_generate(engine, batch) for batch in batches])
    views = len(engine.renderer.tags())
    print(f"{args.images} images, {views} views, {len(questions)} questions each, {captioner.device}")
    for name, seconds in (("shared prefix", shared), ("generate", alone)):
        print(f"{name:14} {1000 * seconds / len(images) / len(questions):8.2f} ms a question")
    print(f"ratio          {alone / shared:8.1f} x")
    split(engine, images, args.samples)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


@torch.no_grad()
def by_generate(engine: HFEngine, batch: QuestionBatch) -> list[float]:
    """P(yes) of every question of an image, each by a ``generate`` call of its own."""
    captioner, renderer = engine.captioner, engine.renderer
    device, answers = captioner.device, []
    for question in batch.questions:
        pixels, grid = renderer.images(batch.image)
        ids = torch.tensor([renderer.prefix_ids(grid) + renderer.branch_ids(question)[0]], device=device)
        out: Any = captioner.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels.to(device),
            image_grid_thw=grid.to(device),
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        scores = out.logits[0][0].float()
        yes, no = scores[engine._words.yes].logsumexp(0), scores[engine._words.no].logsumexp(0)
        answers.append(float(torch.sigmoid(yes - no)))
    return answers


def split(engine: HFEngine, images: list[Any], samples: int) -> None:
    """Seconds per golden caption of each part of the stage."""
    requests = [CaptionRequest(str(i), image, f"{i:064x}") for i, image in enumerate(images)]
    sampling, sampled = timed(lambda: list(engine.sample(requests, samples, SamplingConfig())))
    tool = Rules(scenes.kind_of)
    merging, asked = timed(lambda: [claims.select(each, tool, 120).asked for each in sampled])
    batches = [
        QuestionBatch(image, [tool.decompose(each.text).text for each in own])
        for image, own in zip(images, asked, strict=True)
    ]
    asking, answers = timed(lambda: list(engine.p_yes(batches)))

    def compose() -> int:
        made = 0
        for own, statements, said in zip(sampled, asked, answers, strict=True):
            asked_of = claims.claims_of(own[0], statements, said, tool, "", 1.0)
            judged = verdicts.judge(asked_of, verdicts.Thresholds(0.6, 0.4))
            made += bool(judged and golden.recompose(judged, lambda text: len(text.split()), 150)[0])
        return made

    composing, _ = timed(compose)
    total = sampling + merging + asking + composing
    count = sum(map(len, asked)) / len(images)
    print(f"\na golden caption of {samples} samples and {count:.0f} questions: {total / len(images):.3f} s")
    parts = {"sampling": sampling, "merging": merging, "asking": asking, "composing": composing}
    for name, seconds in parts.items():
        print(f"{name:14} {1000 * seconds / len(images):8.1f} ms  {seconds / total:6.1%}")


if __name__ == "__main__":
    main()
