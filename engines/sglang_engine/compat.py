"""Where SGLang's releases differ, and what it does to a process that it does not own. Run with 0.5.23 (CPU); the ways
of 0.5.17 (GPU) were read."""

from __future__ import annotations

import asyncio
import os
from typing import Any

_ENVIRONMENT = {
    "SGLANG_DISABLE_REQUEST_LOGGING": "true",  # requests hold prompts
}


def import_sglang() -> None:
    """Import SGLang and undo what its import does to the process: it makes uvloop everybody's event loop."""
    import torch

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    policy = asyncio.get_event_loop_policy()
    import sglang.srt.entrypoints.engine  # noqa: F401

    asyncio.set_event_loop_policy(policy)


def remove_state(manager: Any, rid: str) -> Any:
    """Take a finished request off the tokenizer manager's book, as its own handler of outputs does; gives its state, or
    None if there is none any more."""
    state = manager.rid_to_state.get(rid)
    if state is None:
        return None
    state.finished = True
    remove = getattr(manager, "_remove_req_state", None)  # 0.5.17
    if remove is not None:
        remove(rid)
    else:
        manager.rid_to_state.pop(rid, None)
    release = getattr(manager, "_release_lora_once", None)
    if release is not None:
        release(state)
    elif manager.enable_lora and state.obj.lora_path:
        task = asyncio.ensure_future(manager.lora_registry.release(state.obj.lora_id))
        manager.asyncio_tasks.add(task)
        task.add_done_callback(manager.asyncio_tasks.discard)
    return state


def streamer() -> Any:
    """The class whose ``_stream_output_generation(reqs, …)`` sends a step's tokens off, in the scheduler process."""
    from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

    return SchedulerOutputStreamer
