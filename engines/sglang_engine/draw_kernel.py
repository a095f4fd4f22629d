"""The kernels of `triton_draw`. Triton reads annotations as its own, so there are none of ours.

Scores are those of one row, ``vocab`` of them, read ``tile`` at a time. Weights are relative to that of the greatest
score, `top`: 2 ** ((score - top) * scale)."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenfleet.engines.sglang_engine import uniform

_STEP, _FIRST, _SECOND = tl.constexpr(uniform.STEP), tl.constexpr(uniform.FIRST), tl.constexpr(uniform.SECOND)
_NO_WEIGHT = tl.constexpr(104.0)
"""exp(-104) is zero in float32."""
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["stride", "vocab"])
def draw(scores, positions, floats, whole, ids, stride, vocab, tile: tl.constexpr):
    """``floats``: temperature, top_p, min_p of each row; ``whole``: top_k, its key, the tokens before its first."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride
    temperature, top_p, min_p = tl.load(floats + row * 3), tl.load(floats + row * 3 + 1), tl.load(floats + row * 3 + 2)
    top_k = tl.load(whole + row * 3)
    top, best = _greatest(scores, vocab, tile)
    if (temperature > 0) & (top_k != 1) & (top > -float("inf")):
        scale = _LOG2_E / temperature
        # Kept: scores above `least`, and of those equal to it the first `ties`.
        least = top - _NO_WEIGHT * temperature
        ties = vocab.to(tl.float64)
        if (top_k > 0) & (top_k < vocab):
            least, above = _search(scores, vocab, top, least, 0.0, top_k.to(tl.float64), tile)
            ties = top_k.to(tl.float64) - above
        if top_p < 1:
            above, equal = _measure(scores, vocab, top, least, scale, tile)
            whole_mass = above + tl.minimum(ties, equal) * tl.exp2((least - top) * scale).to(tl.float64)
            target = whole_mass * top_p.to(tl.float64)
            found, above = _search(scores, vocab, top, least, scale, target, tile)
            if found > least:
                ties = vocab.to(tl.float64)
            least = found
            needed = tl.ceil((target - above) / tl.exp2((least - top) * scale).to(tl.float64))
            ties = tl.minimum(ties, tl.maximum(needed, 1.0))
        if min_p > 0:
            bound = top + temperature * tl.log(min_p)
            if bound > least:
                least = tl.minimum(bound, top)
                ties = vocab.to(tl.float64)
        number = _uniform(tl.load(whole + row * 3 + 1), tl.load(positions + row) + 1 - tl.load(whole + row * 3 + 2))
        best = _pick(scores, vocab, top, least, _last(scores, vocab, least, ties, tile), scale, number, tile)
    tl.store(ids + row, best.to(tl.int64))


@triton.jit
def _tile(scores, start, vocab, tile: tl.constexpr):
    places = start + tl.arange(0, tile)
    return places, tl.load(scores + places, mask=places < vocab, other=-float("inf")).to(tl.float32)


@triton.jit
def _greatest(scores, vocab, tile: tl.constexpr):
    """The greatest score, and its first place."""
    best, at = tl.full((tile,), -float("inf"), tl.float32), tl.full((tile,), 0, tl.int32)
    for start in range(0, vocab, tile):
        places, values = _tile(scores, start, vocab, tile)
        at = tl.where(values > best, places, at)
        best = tl.maximum(best, values)
    top = tl.max(best)
    return top, tl.min(tl.where(best == top, at, vocab))


@triton.jit
def _search(scores, vocab, top, low, scale, target, tile: tl.constexpr):
    """The greatest score such that those not below it have ``target`` of weight or more, or all of them, down to
    ``low``; and the weight of those above it. With ``scale`` 0 each weighs 1."""
    high, high_above = top, tl.full((), 0.0, tl.float64)
    nothing, none = tl.full((tile,), float("inf"), tl.float32), tl.full((tile,), -float("inf"), tl.float32)
    while low < high:
        quarter = (high - low) * 0.25
        first, second, third = low + quarter, low + quarter * 2, low + quarter * 3
        first = tl.where(first < high, first, low)  # neighbours
        second, third = tl.where(second < high, second, low), tl.where(third < high, third, low)
        weight_1, weight_2, weight_3 = tl.zeros_like(none), tl.zeros_like(none), tl.zeros_like(none)
        upper_1, upper_2, upper_3 = nothing, nothing, nothing
        lower_1, lower_2, lower_3 = none, none, none
        for start in range(0, vocab, tile):
            _, values = _tile(scores, start, vocab, tile)
            weights = tl.exp2((values - top) * scale)
            weight_1, upper_1, lower_1 = _split(values, weights, first, weight_1, upper_1, lower_1)
            weight_2, upper_2, lower_2 = _split(values, weights, second, weight_2, upper_2, lower_2)
            weight_3, upper_3, lower_3 = _split(values, weights, third, weight_3, upper_3, lower_3)
        above_1, above_2 = tl.sum(weight_1).to(tl.float64), tl.sum(weight_2).to(tl.float64)
        above_3 = tl.sum(weight_3).to(tl.float64)
        if above_3 >= target:
            low = tl.min(upper_3)
        elif above_2 >= target:
            low, high, high_above = tl.min(upper_2), tl.max(lower_3), above_3
        elif above_1 >= target:
            low, high, high_above = tl.min(upper_1), tl.max(lower_2), above_2
        else:
            high, high_above = tl.max(lower_1), above_1
    return low, high_above


@triton.jit
def _split(values, weights, border, weight, upper, lower):
    """Of what is above ``border`` the weight and the least, of the others the greatest, beside what came before."""
    is_above = values > border
    weight += tl.where(is_above, weights, 0.0)
    upper = tl.minimum(upper, tl.where(is_above, values, float("inf")))
    return weight, upper, tl.maximum(lower, tl.where(is_above, -float("inf"), values))


@triton.jit
def _measure(scores, vocab, top, least, scale, tile: tl.constexpr):
    """The weight of scores above ``least``, and how many are equal to it."""
    above, equal = tl.full((tile,), 0.0, tl.float32), tl.full((tile,), 0.0, tl.float32)
    for start in range(0, vocab, tile):
        _, values = _tile(scores, start, vocab, tile)
        above += tl.where(values > least, tl.exp2((values - top) * scale), 0.0)
        equal += (values == least).to(tl.float32)
    return tl.sum(above).to(tl.float64), tl.sum(equal).to(tl.float64)


@triton.jit
def _last(scores, vocab, least, ties, tile: tl.constexpr):
    """The place of the last of ``ties`` scores that are equal to ``least``."""
    last, seen = vocab.to(tl.int32), tl.full((), 0.0, tl.float64)
    if ties < vocab:
        _, equal = _measure(scores, vocab, least, least, 0.0, tile)
        if ties < equal:
            for start in range(0, vocab, tile):
                places, values = _tile(scores, start, vocab, tile)
                is_equal = (values == least).to(tl.int32)
                count = tl.sum(is_equal).to(tl.float64)
                if (seen < ties) & (seen + count >= ties):
                    is_last = tl.cumsum(is_equal, 0).to(tl.float64) + seen >= ties
                    last = tl.min(tl.where(is_last & (is_equal > 0), places, vocab))
                seen += count
    return last


@triton.jit
def _pick(scores, vocab, top, least, last, scale, number, tile: tl.constexpr):
    """Where ``number`` in [0, 1) falls among the weights of what is kept."""
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, vocab, tile):
        total += tl.sum(_weights(scores, start, vocab, top, least, last, scale, tile)).to(tl.float64)
    target, sums = number * total, tl.full((), 0.0, tl.float64)
    first, before, is_found = tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float64), tl.full((), 0, tl.int1)
    for start in range(0, vocab, tile):
        weight = tl.sum(_weights(scores, start, vocab, top, least, last, scale, tile)).to(tl.float64)
        if (weight > 0) & (not is_found):
            first, before = start, sums
            is_found = sums + weight > target
        sums += weight
    weights = _weights(scores, first, vocab, top, least, last, scale, tile)
    places = first + tl.arange(0, tile)
    is_past = (tl.cumsum(weights.to(tl.float64), 0) > target - before) & (weights > 0)
    place = tl.min(tl.where(is_past, places, vocab))
    if place == vocab:  # sums rounded otherwise
        place = tl.max(tl.where(weights > 0, places, 0))
    return place


@triton.jit
def _weights(scores, start, vocab, top, least, last, scale, tile: tl.constexpr):
    places, values = _tile(scores, start, vocab, tile)
    is_kept = (values > least) | ((values == least) & (places <= last))
    return tl.where(is_kept, tl.exp2((values - top) * scale), 0.0)


@triton.jit
def _uniform(key, index):
    """`uniform.uniform` of the key's stream."""
    mixed = _mixed(_mixed(key) + _STEP + index * _STEP)
    return ((mixed >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _mixed(x):
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
