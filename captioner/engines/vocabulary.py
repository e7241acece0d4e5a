"""What an engine may say: the tokens that end a caption, those never sampled, and those of yes and no."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from captioner.errors import CheckpointError
from captioner.models.model import Captioner
from captioner.models.render import Renderer
from captioner.records import Candidate

YES_NO = (("yes", "Yes"), ("no", "No"))  # the words whose first tokens count as the answer


class Vocabulary:
    """Token ids with a meaning of their own, equal on every engine.

    Raises :class:`CheckpointError` where "yes" and "no" begin with the same token.
    """

    def __init__(self, captioner: Captioner, renderer: Renderer):
        tokenizer, model = captioner.tokenizer, captioner.model
        self._tokenizer = tokenizer
        width = self.size = model.get_output_embeddings().weight.shape[0]
        config: Any = model.generation_config
        named = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        # the end of the turn and every end token that the checkpoint names
        self.stops = {renderer.end_id, *(i for i in [*named, tokenizer.eos_token_id] if i is not None)}
        # markup, image slots, soft prompt tokens and rows of the head that no token belongs to
        never = {*tokenizer.all_special_ids, *captioner.soft_prompt_ids, *range(len(tokenizer), width)}
        self.never = never - self.stops
        self.yes, self.no = (sorted({renderer.text_ids(word)[0] for word in words}) for words in YES_NO)
        if set(self.yes) & set(self.no):
            raise CheckpointError(
                "yes and no begin with the same token",
                where=str(captioner.path),
                fix="use a tokenizer that has the words yes and no",
            )

    def candidate(
        self, sample_id: str, key: str, k: int, seed: int, tokens: Sequence[int], logprobs: Sequence[float]
    ) -> Candidate:
        """Sample ``k`` of an image, read off its tokens, the end token included where it ended."""
        ended = tokens[-1] in self.stops
        text = self._tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
        return Candidate(
            sample=sample_id,
            key=key,
            k=k,
            text=text.strip(),
            finish_reason="stop" if ended else "length",
            mean_logprob=sum(logprobs) / len(logprobs),
            tokens=len(tokens),
            seed=seed,
        )
