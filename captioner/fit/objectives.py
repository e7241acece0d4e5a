"""What the trainings minimise beside TRL's own losses. Pure functions; each names its equation.

SFT, QA and golden SFT minimise :func:`cross_entropy` over the answers of a batch, by TRL's SFTTrainer. A
preference training minimises TRL's losses of the margin (c - c_ref) - (r - r_ref), such as `sigmoid`, mean
-log sigmoid(beta margin) (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), or `kto` (Ethayarajh et al. 2024,
arXiv 2402.01306), and what is here: :func:`cross_entropy` on the chosen captions (Pang et al. 2024, arXiv
2404.19733), :func:`anchor` and :func:`image_conditional`. c and r are the log-probabilities of the chosen and
the rejected caption, end token included: the sum over their tokens.

Shapes: N pairs, B images, L tokens of a branch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from captioner.statements import normalise, statement_spans


def anchor(chosen: Tensor, ref_chosen: Tensor, beta: float) -> Tensor:
    """mean -log sigmoid(beta (c - c_ref)): the chosen caption's own reward is to be positive.

    A margin also grows when both captions become less likely; this term sees that. The anchored preference
    of Wang et al. 2024 (mDPO, arXiv 2406.11839) with delta = 0. chosen, ref_chosen [N].
    """
    return -F.logsigmoid(beta * (chosen - ref_chosen)).mean()


def image_conditional(
    chosen: Tensor, ref_chosen: Tensor, masked: Tensor, ref_masked: Tensor, beta: float
) -> Tensor:
    """mean -log sigmoid(beta ((c - c_ref) - (m - m_ref))): chosen with the image over chosen without it.

    m is the log-probability of the same caption behind gray views. The conditional preference of Wang et al.
    2024 (mDPO, arXiv 2406.11839), which masks part of the image. All [B].
    """
    return -F.logsigmoid(beta * ((chosen - ref_chosen) - (masked - ref_masked))).mean()


def length_offset(chosen_tokens: Tensor, rejected_tokens: Tensor, alpha: float, beta: float) -> Tensor:
    """What to add to the rejected caption's reference log-probability for a margin in length, [N].

    beta ((c - c_ref) - (r - r_ref - offset)) = beta ((c - c_ref) - (r - r_ref)) + alpha (|c| - |r|): with
    alpha > 0 a longer chosen caption is preferred already and pulls less. Park et al. 2024 (R-DPO,
    arXiv 2403.19159): what the reward r(x, y) - alpha |y| gives in place of r.
    """
    return alpha * (chosen_tokens - rejected_tokens).float() / beta


def cross_entropy(log_probs: Tensor, mask: Tensor) -> Tensor:
    """mean -log p over the tokens of ``mask``; both [B, L]. TRL's SFTTrainer and loss `sft` do it too."""
    return -log_probs[mask.bool()].mean()


def token_weights(
    caption: str,
    offsets: Sequence[tuple[int, int]],
    verdicts: Mapping[str, str],
    confirmed: float,
    refuted: float,
) -> list[float]:
    """A weight for each token of a caption: ``refuted`` or ``confirmed`` inside such a statement, else 1.

    log p(y) becomes sum_t w_t log p(y_t | y_<t, x), as in Yu et al. 2024 (DDPO of RLHF-V, arXiv 2312.00849),
    there for the segments that people corrected. ``offsets`` are the tokens' characters in the caption,
    ``verdicts`` maps normalised statements to "keep", "drop" or "abstain".
    """
    of_verdict = {"keep": confirmed, "drop": refuted}
    weights = [1.0] * len(offsets)
    for begin, stop, _ in statement_spans(caption):
        weight = of_verdict.get(verdicts.get(normalise(caption[begin:stop]), ""), 1.0)
        for t, (start, end) in enumerate(offsets):
            if start < stop and end > begin:
                weights[t] = weight
    return weights


def divergence(origin: Tensor, now: Tensor) -> Tensor:
    """KL(origin || now) at each position, nats, from log-probabilities [..., K] of the same K tokens.

    Everything else counts as one further outcome, so this bounds the divergence over the whole vocabulary
    from below (data processing inequality) and is never negative.
    """
    tail_origin, tail_now = (torch.log1p(-x.exp().sum(-1).clamp(max=1 - 1e-6)) for x in (origin, now))
    inner = (origin.exp() * (origin - now)).sum(-1)
    return (inner + tail_origin.exp() * (tail_origin - tail_now)).clamp(min=0)
