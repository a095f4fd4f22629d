"""How each model family writes a tool call, and how to read one out of a text that is still growing.

A `Reader` looks at a text from where one of its marks stands (or, without marks, at the very start of an answer) and
says: these are calls, this is none, or not known yet. What it says depends on the text alone, never on how it arrived.
A call is given out when it is complete and valid: nobody ever gets half a call that turns out to be none. What a
grammar has forced can't, and comes out while it is written (`ForcedCalls`).
"""

from tokenfleet.wire.toolformats.base import Awaited, Calls, FunctionCall, NoCall, Outcome, Reader, calls_of
from tokenfleet.wire.toolformats.blocks import (
    block,
    deepseek,
    dropped,
    functions,
    invokes,
    json_lines,
    read_glm4_moe,
    read_harmony,
)
from tokenfleet.wire.toolformats.forced import Begun, ForcedCalls
from tokenfleet.wire.toolformats.notations import python_calls, read_gemma4
from tokenfleet.wire.toolformats.whole import read_default, read_glm4, whole

__all__ = ["READERS", "Awaited", "Begun", "Calls", "ForcedCalls", "FunctionCall", "NoCall", "Outcome", "Reader"]

_default = Reader(("Action:",), read_default)
# No mark may begin with another: what is seen first depends on how the text is cut.
_harmony = Reader(
    ("<|channel|>commentary to=functions.",), read_harmony, ("<|message|>", "<|constrain|>", "<|call|>", "<|end|>")
)
_harmony_headers = dropped(
    "<|start|>assistant", "<|channel|>final<|message|>", "<|channel|>commentary<|message|>", "<|end|>", "<|return|>"
)
_qwen = block("<tool_call>", "</tool_call>", calls_of)
READERS: dict[str, tuple[Reader, ...]] = {
    "default": (_default,),
    "deepseek": (block("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", deepseek, "<"),),
    "gemma4": (Reader(("<|tool_call>",), read_gemma4, ("<tool_call|>", '<|"|>')),),
    "glm4": (Reader((), read_glm4),),
    "glm4_moe": (Reader(("<tool_call>",), read_glm4_moe, ("</tool_call>", "<arg_key>", "</arg_key>")),),
    "gpt_oss": (_harmony, _harmony_headers),
    "lfm2": (block("<|tool_call_start|>", "<|tool_call_end|>", python_calls, r"\[|[A-Za-z_]"),),
    "ling": (_qwen,),
    "llama3": (whole("parameters", "<|python_tag|>"),),
    "minimax1": (block("<tool_calls>", "</tool_calls>", json_lines),),
    "minimax2": (block("<minimax:tool_call>", "</minimax:tool_call>", invokes, "<"),),
    "mistral": (whole("arguments", "[TOOL_CALLS]"),),
    "phi4_mini": (block("<|tool_call|>", "<|/tool_call|>", calls_of, may_stay_open=True), _default),
    "qwen": (_qwen,),
    "qwen3_5": (functions("<tool_call>", "</tool_call>", is_stripped=True),),
    "seed_oss": (functions("<seed:tool_call>", "</seed:tool_call>", is_stripped=False),),
}
"""By the names of `engines/templates/data/tools.toml`, and formats that only models' own templates use."""
