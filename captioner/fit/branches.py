"""One sequence for all captions of an image, in a preference training.

TRL scores a batch of captions; here the model sees rows in which the images are encoded once and the chosen
caption and every rejected one are branches behind them. :func:`shared_prefix` stands between the two, so
every loss of TRL works unchanged, and ours come from the same forward.

Shapes: B images of a batch, N their pairs, U branches (see batches.py), L tokens of the longest branch, T
tokens of a row, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

PER_TOKEN = ("log_probs", "entropy", "mean_logits", "is_top1")  # what TRL's fused head gives, each [U, L - 1]


@contextmanager
def shared_prefix(model: Any) -> Iterator[list[Tensor]]:
    """The backbone runs on ``packed`` rows, the head on branches, TRL sees captions.

    Of the backbone's states [B, T, D] those at ``gather`` [U, L] go to the head; what it gives each branch is
    weighted, and handed on for each caption of ``expand`` [2N]. Calls without ``gather`` are left alone.
    Yields what the forwards gave the branches: log-probabilities [U, L - 1], token weights applied.
    """
    seen, asked = list[Tensor](), dict[str, Any]()

    def ask(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        asked.clear()
        if "gather" in kwargs:
            asked.update({name: kwargs.get(name) for name in ("gather", "expand", "weights")})
            kwargs = {**kwargs, "labels": kwargs.get("branch_labels", kwargs["labels"])}
        return args, kwargs

    def unpack(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return ((), {**kwargs["packed"], "use_cache": False}) if "gather" in kwargs else (args, kwargs)

    def pick(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if asked:
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[asked["gather"]]
        return output

    def answer(_module: Any, _args: Any, output: Any) -> Any:
        if not asked:
            return output
        if asked["weights"] is not None:
            output.log_probs = output.log_probs * asked["weights"][:, 1:]
        seen.append(output.log_probs)
        if asked["expand"] is not None:
            for name in PER_TOKEN:
                if (value := getattr(output, name)) is not None:
                    setattr(output, name, value[asked["expand"]])
        asked.clear()
        return output

    handles = [
        model.register_forward_pre_hook(ask, with_kwargs=True),
        model.model.register_forward_pre_hook(unpack, with_kwargs=True),
        model.model.register_forward_hook(pick, with_kwargs=True),
        model.register_forward_hook(answer),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
