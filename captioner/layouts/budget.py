"""Captions within the token budget of a text encoder: whole statements are dropped, none is ever cut."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from pathlib import Path

from captioner.errors import ConfigError
from captioner.statements import statement_spans

UNLIMITED = 1 << 20  # tokens; transformers writes 1e30 where a tokenizer knows no limit


def fit(caption: str, budget: int, count: Callable[[str], int]) -> str:
    """The caption, or as many of its statements from the start as ``budget`` tokens hold; "" if none fits.

    ``count`` gives the tokens of a text. Captions name what matters first, so the end is what goes; only a
    first statement that is too long by itself is passed over. The text that stays is unchanged.
    """
    if count(caption) <= budget:
        return caption
    spans = statement_spans(caption)
    for first, (start, _, _) in enumerate(spans):

        def tokens(last: int, start: int = start) -> int:
            return count(caption[start : spans[last][2]])

        last = bisect.bisect_right(range(first, len(spans)), budget, key=tokens) + first - 1
        while last >= first and tokens(last) > budget:  # where more text is fewer tokens
            last -= 1
        if last >= first:
            return caption[start : spans[last][2]]
    return ""


def counter(tokenizer: str | Path, budget: int | None = None) -> tuple[Callable[[str], int], int]:
    """(how many tokens a text has, the budget) by a tokenizer of `transformers` in a local folder.

    Tokens that the encoder adds around the text are not counted: a budget of 75 fills CLIP's 77 positions.
    Without ``budget`` it is what the tokenizer says its model takes. Raises :class:`ConfigError` for a folder
    without a tokenizer, and for one that names no limit where no budget is given.
    """
    from transformers import AutoTokenizer

    where = str(tokenizer)
    try:
        words = AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a boundary: broken files make it raise anything
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"not a tokenizer: {reason}", where=where, fix="name a folder that holds tokenizer.json"
        ) from error
    if budget is None:
        budget = words.model_max_length - words.num_special_tokens_to_add()
        if budget > UNLIMITED:
            raise ConfigError("the tokenizer names no limit", where=where, fix="add --max-tokens N")
    if budget < 1:
        raise ConfigError(f"a budget of {budget} tokens", where=where, fix="--max-tokens 75, for instance")
    return lambda text: len(words(text, add_special_tokens=False, verbose=False)["input_ids"]), budget
