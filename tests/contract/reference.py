"""What a request must do, computed apart from any engine: logits in, expected distribution out (numpy, float64)."""

from __future__ import annotations

from collections import Counter

import numpy as np


def processed(logits, params, prompt_ids, ids, barred=frozenset()):
    """Logits ``[vocab]`` after bias, penalties and bars, as transformers and OpenAI's API define them."""
    scores = np.array(logits, dtype=np.float64)
    for token_id, bias in params.logit_bias.items():
        scores[token_id] += bias
    if params.repetition_penalty != 1:
        seen = sorted({*prompt_ids, *ids})
        values = scores[seen]
        scores[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    for token_id, count in Counter(ids).items():
        scores[token_id] -= params.presence_penalty + count * params.frequency_penalty
    if len(ids) < params.min_tokens:
        scores[sorted(barred)] = -np.inf
    return scores


def probabilities(scores, params):
    """``[vocab]``: temperature, then top-k, top-p and min-p."""
    scores = scores / params.temperature
    probs = np.exp(scores - scores.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    keep = np.zeros(len(probs), dtype=bool)
    kept = order[: params.top_k] if params.top_k > 0 else order
    within = probs[kept] / probs[kept].sum()
    before = np.cumsum(within) - within
    keep[kept[before < params.top_p]] = True
    keep &= probs >= params.min_p * probs.max()
    probs = np.where(keep, probs, 0)
    return probs / probs.sum()


def log_softmax(logits):
    logits = np.asarray(logits, dtype=np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def chi_square(counts, probs, least=5.0):
    """Pearson's statistic and its degrees of freedom; outcomes expected fewer than ``least`` times are one outcome."""
    expected = probs * counts.sum()
    rare = expected < least
    observed = [*counts[~rare], counts[rare].sum()]
    expected = [*expected[~rare], expected[rare].sum()]
    pairs = [(o, e) for o, e in zip(observed, expected, strict=True) if e > 0]
    return sum((o - e) ** 2 / e for o, e in pairs), len(pairs) - 1


def improbable(statistic, degrees):
    """Whether fewer than about 1 in 10,000 fair samples are as far off (Wilson and Hilferty's approximation)."""
    if degrees < 1:
        return False
    spread = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - spread)) / spread**0.5 > 3.72
