"""How each engine goes on with a request after a takeover, by parameter.

Data that the code reads and the contract suite holds the engines to. What is refused altogether: `wire/support.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenfleet.engines.base import Continuation
from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.support import is_used

CONTINUATION: Mapping[str, Mapping[str, Continuation]] = {
    # Tokens follow from (prompt, seed, index) and, with penalties, from all ids before.
    "scripted": {},
    # The draw follows from (seed, index); penalties and bars are functions of the ids so far (sampling.py), and a
    # grammar reads the delivered ids first (grammar.py). A beam search delivers all or nothing (beams.py).
    "transformers": {},
    # vLLM seeds a generator per request (vllm/v1/worker/gpu_model_runner.py). Its penalties would count the request's
    # own new ids only (vllm/v1/sample/ops/penalties.py) and its grammars start anew (vllm/v1/structured_output): a
    # continuation's are our own (engines/vllm_engine/extras.py).
    "vllm": {"seed": "valid"},
    # SGLang's penalties would count new ids only and its grammars start anew; ours don't, and a draw is a hash of
    # (seed, index) (engines/sglang_engine/sampler.py, history.py, grammars.py).
    "sglang": {},
}
"""How a request that uses the parameter goes on after a takeover; ``exact`` where nothing is said. ``valid``: a fair
sample, not the undisturbed text, as sampling without a seed is everywhere."""

_ORDER: tuple[Continuation, ...] = ("exact", "valid", "no")


def continuation(engine_name: str, params: GenerationParams, uncontinued: frozenset[str] = frozenset()) -> Continuation:
    """How a request with these parameters goes on after a takeover: as its weakest parameter does.

    ``uncontinued``: parameters that the engine says it can't continue (`EngineInfo`)."""
    cells = {**CONTINUATION[engine_name], **dict.fromkeys(uncontinued, "no")}
    worst = max((_ORDER.index(cell) for param, cell in cells.items() if is_used(params, param)), default=0)
    if not params.is_greedy and params.seed is None:
        worst = max(worst, _ORDER.index("valid"))
    return _ORDER[worst]
