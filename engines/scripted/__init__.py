"""The scripted engine: every token known in advance, on an exact clock, with faults on request. No model, no torch.

Queue, stream and fault tests and the benchmarks run on it; it passes the same contract suite as the real engines.
"""

from tokenfleet.engines.scripted.engine import ScriptedEngine
from tokenfleet.engines.scripted.options import ScriptedOptions
from tokenfleet.engines.scripted.record import read_record
from tokenfleet.engines.scripted.salted import SaltedText, salt_of, salts_by_token
from tokenfleet.engines.scripted.tokenizer import ScriptedTokenizer

__all__ = [
    "SaltedText", "ScriptedEngine", "ScriptedOptions", "ScriptedTokenizer", "read_record", "salt_of", "salts_by_token",
]  # fmt: skip
