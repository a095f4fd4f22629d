"""SGLang's half in the worker process, in which it may not install signal handlers, signal the process, end all of its
children, or wake a reader for each token.

`FrontEnd` is `sglang.Engine`, `Manager` its tokenizer manager. Outputs of the scheduler go from its message to the
readers' mailboxes; all else is SGLang's own path.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from sglang.srt.entrypoints.engine import Engine, init_tokenizer_manager
from sglang.srt.managers.io_struct import BatchTokenIDOutput
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from tokenfleet.engines.base import RawLogprob
from tokenfleet.engines.mailbox import Mailbox
from tokenfleet.engines.sglang_engine import compat, scheduler
from tokenfleet.engines.sglang_engine.media import Ready
from tokenfleet.wire.errors import EngineError, InvalidRequest, TokenfleetError

_CLOSING_S = 10.0


@dataclass(frozen=True, slots=True)
class Reader:
    """Who waits for a request's tokens. ``top_logprobs``: None for no logprobs at all."""

    mailbox: Mailbox
    top_logprobs: int | None


class Manager(TokenizerManager):
    """Gives tokens to the reader that `readers` names for the request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.readers: dict[str, Reader] = {}
        self.steps = 0
        self.on_failure: Callable[[], None] = lambda: None

    def init_tokenizer_and_processor(self) -> None:
        """SGLang's own would start processes that decode media. Prompts are made above the engines."""
        self.tokenizer = self.processor = self.async_dynamic_batch_tokenizer = None
        self.mm_processor = Ready()

    def auto_create_handle_loop(self) -> None:
        """SGLang's own also takes SIGTERM and SIGQUIT, and ends the process when its loop fails."""
        if self.event_loop is None:
            self.event_loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
            task = asyncio.create_task(self.handle_loop())
            task.add_done_callback(self._ended)
            self.asyncio_tasks.add(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self.on_failure()

    async def _handle_batch_output(self, recv_obj: Any) -> None:
        self.steps += 1
        if not isinstance(recv_obj, BatchTokenIDOutput):
            await super()._handle_batch_output(recv_obj)
            return
        for place, rid in enumerate(recv_obj.rids):
            reason = recv_obj.finished_reasons[place]
            reader = self.readers.get(rid)
            if reader is not None:
                _deliver(reader, recv_obj, place, reason)
            if reason is not None and (state := compat.remove_state(self, rid)) is not None:
                # Ends the iterator that sent the request off.
                state.out_list.append({"output_ids": [], "meta_info": {"id": rid, "finish_reason": None}})
                state.event.set()

    async def close_channels(self) -> None:
        tasks = list(self.asyncio_tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        context = self.recv_from_detokenizer.context
        for socket in (self.recv_from_detokenizer, self.send_to_scheduler):
            socket.close(linger=0)
        context.term()


def _deliver(reader: Reader, outputs: Any, place: int, reason: Any) -> None:
    ids = list(outputs.output_ids[place])
    logprobs: list[RawLogprob] = []
    if reader.top_logprobs is not None and ids:
        values = outputs.output_token_logprobs_val[place]
        tops, top_ids = outputs.output_top_logprobs_val[place], outputs.output_top_logprobs_idx[place]
        for i, token in enumerate(ids):
            best = zip(top_ids[i], tops[i], strict=True) if reader.top_logprobs else ()
            logprobs.append(RawLogprob(token, values[i], tuple(best)))
    match reason and reason["type"]:
        case None:
            if ids:
                reader.mailbox.put(ids, logprobs)
        case "stop" | "length" as name:
            reader.mailbox.put(ids, logprobs, name)
        case _:
            reader.mailbox.fail(failure(reason))


def failure(reason: Any) -> TokenfleetError:
    """Why the scheduler gave a request up, as our error. ``reason``: a finish reason of type ``abort``."""
    message = f"SGLang gave this request up: {reason.get('message') or 'no reason given'}"
    return InvalidRequest(message) if reason.get("status_code") == 400 else EngineError(message)


class FrontEnd(Engine):
    """Raises what its base raises; has ended its children then. Make it outside of the main thread."""

    run_scheduler_process_func = staticmethod(scheduler.run)

    def __init__(self, **arguments: Any) -> None:
        before = {child.pid for child in psutil.Process().children()}
        try:
            super().__init__(**arguments)
        except BaseException:
            _end([child for child in psutil.Process().children() if child.pid not in before])
            raise
        finally:
            atexit.unregister(self.shutdown)  # it would end all of this process's children
        if (loop := getattr(self, "loop", None)) is not None:  # for its blocking methods, which nobody calls here
            asyncio.set_event_loop(None)
            loop.close()
        self.tokenizer_manager._subprocess_watchdog.stop()  # it would send SIGQUIT to this process
        self.children = [psutil.Process(pid) for pid in self._scheduler_init_result.all_child_pids]
        self.pool_tokens = int(self._scheduler_init_result.scheduler_infos[0]["max_total_num_tokens"])

    @staticmethod
    def init_tokenizer_manager_func(server_args: Any, port_args: Any) -> Any:
        return init_tokenizer_manager(server_args, port_args, Manager)

    @classmethod
    def _launch_detokenizer_subprocesses(cls, *args: Any, **kwargs: Any) -> tuple[list[Any], list[str]]:
        return [], []  # text is made above the engines

    def stop(self) -> None:
        """End the children and remove what is left of them. Blocks for as long as they need, seconds at most."""
        self.send_to_rpc.close(linger=0)
        self.send_to_rpc.context.term()
        _end(self.children)
        for name in dir(self.port_args):
            address = getattr(self.port_args, name)
            if name.endswith("ipc_name") and isinstance(address, str) and address.startswith("ipc://"):
                Path(address.removeprefix("ipc://")).unlink(missing_ok=True)


def _end(processes: list[psutil.Process]) -> None:
    family: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [process, *process.children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=_CLOSING_S)
