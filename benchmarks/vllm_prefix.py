"""Questions about an image on vLLM: with prefix caching against without, on the same weights, in one run.

    PYTHONPATH=. PYTHON_WITH_VLLM benchmarks/vllm_prefix.py [CHECKPOINT] [--images 4] [--questions 60]

Prints seconds per image and the ratio of the two; answers of both must agree. The first image warms up.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from captioner.config import Config
from captioner.engines import QuestionBatch, make_engine, vllm
from captioner.lab import grid as scenes
from captioner.models import model


def measure(checkpoint: Path, batches: list[QuestionBatch], cached: bool) -> tuple[float, list[float]]:
    """Seconds per image without the first, and P(yes) of all questions."""
    plain = vllm.settings

    def settings(*args: Any) -> dict[str, Any]:
        return {**plain(*args), "enable_prefix_caching": cached, "mm_processor_cache_gb": 4 if cached else 0}

    vllm.settings = settings
    engine = make_engine(checkpoint, Config.model_validate({"engine": {"type": "vllm"}}))
    vllm.settings = plain
    list(engine.p_yes(batches[:1]))
    started = time.perf_counter()
    answers = [answer.p_yes for row in engine.p_yes(batches[1:]) for answer in row]
    seconds = (time.perf_counter() - started) / (len(batches) - 1)
    engine.close()
    return seconds, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="scenes-base")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--questions", type=int, default=60)
    args = parser.parse_args()
    pictures = [image for image, _ in scenes.rows("test", args.images + 1, 0, 0)]
    questions = [f"Visible: {i % 7 + 1} red circles, {i}?" for i in range(args.questions)]
    batches = [QuestionBatch(picture, questions) for picture in pictures]
    checkpoint = model.checkpoint_path(args.checkpoint)
    cached, ours = measure(checkpoint, batches, cached=True)
    plain, theirs = measure(checkpoint, batches, cached=False)
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"{args.questions} questions per image: {cached:.2f} s with prefix caching, {plain:.2f} s without")
    print(f"ratio {plain / cached:.1f}, largest difference of P(yes) {worst:.1e}")


if __name__ == "__main__":  # vLLM starts processes of its own, which read this file again
    main()
