"""Words of a caption, as captioning benchmarks see them: Penn Treebank tokens in small letters."""

from __future__ import annotations

from collections.abc import Container
from functools import lru_cache

from nltk.tokenize import NLTKWordTokenizer
from textblob.en.inflect import singularize

_TOKENIZER = NLTKWordTokenizer()


def tokens(text: str) -> list[str]:
    """Tokens in small letters, punctuation included.

    The tokenizer takes its text for one sentence and splits off the last full stop alone, so every token's is
    split off here.
    """
    found: list[str] = []
    for token in _TOKENIZER.tokenize(text.lower()):
        word = token.rstrip(".")
        found += [word, "."] if word and word != token else [token]
    return found


def words(text: str) -> list[str]:
    """Tokens that hold a letter or a digit: COCO's caption evaluation drops punctuation."""
    return [token for token in tokens(text) if any(map(str.isalnum, token))]


def singular(word: str, known: Container[str]) -> str:
    """The singular, by Pattern's rules (De Smedt & Daelemans 2012), which CHAIR uses.

    A word of ``known`` stays as it is: the rules make "bu" of "bus" and "tenni" of "tennis".
    """
    return word if word in known else _singular(word)


@lru_cache(1 << 16)  # the rules are some hundred comparisons, and captions say the same words again
def _singular(word: str) -> str:
    return str(singularize(word))
