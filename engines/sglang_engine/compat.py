"""Where SGLang's releases differ, and what it does to a process that it does not own. Run with 0.5.23 (CPU); the ways
of 0.5.17 (GPU) were read."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from typing import Any

_ENVIRONMENT = {
    "SGLANG_DISABLE_REQUEST_LOGGING": "true",  # requests hold prompts
}


def import_sglang() -> None:
    """Import SGLang without what it does to the process: it makes uvloop everybody's event loop, and its start puts a
    handler and a level of its own in the place of all that log."""
    import torch

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    policy = asyncio.get_event_loop_policy()
    import sglang.srt.entrypoints.engine as entrypoint

    asyncio.set_event_loop_policy(policy)
    assert hasattr(entrypoint, "configure_logger")
    entrypoint.configure_logger = _set_level
    logging.getLogger("sglang").setLevel(logging.WARNING)  # until `_set_level`; it logs all of its arguments before


def _set_level(server_args: Any, prefix: str = "") -> None:
    """In the place of `configure_logger` in the worker; schedulers have SGLang's own."""
    logging.getLogger("sglang").setLevel(server_args.log_level.upper())


def give_up(request: Any, message: str) -> None:
    """In the scheduler's process: end a `Req` with an error when its next token is there."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    if request.to_finish is None:
        request.to_finish = FINISH_ABORT(message)


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


def has_grid_positions(config: Any) -> bool:
    """Whether positions in a prompt with media are three numbers each, as Qwen-VL's."""
    text = config.get_text_config()
    return "mrope_section" in (getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {})


def grid_positions(config: Any, ids: Sequence[int], items: Sequence[Any]) -> tuple[Any, Any]:
    """Positions ``[3, tokens]`` of a prompt with media, and ``[1, 1]`` by how much what comes after it is further."""
    import torch
    from sglang.srt.layers.rotary_embedding import MRotaryEmbedding

    def joined(name: str) -> Any:
        found = [item.model_specific_data[name] for item in items if name in item.model_specific_data]
        return torch.cat([torch.as_tensor(each) for each in found]) if found else None

    vision = config.vision_config
    positions, delta = MRotaryEmbedding.get_rope_index(
        spatial_merge_size=vision.spatial_merge_size,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        vision_start_token_id=config.vision_start_token_id,
        model_type=config.model_type,
        tokens_per_second=getattr(vision, "tokens_per_second", None),
        input_ids=torch.tensor([list(ids)]),
        image_grid_thw=joined("image_grid_thw"),
        video_grid_thw=joined("video_grid_thw"),
        second_per_grid_ts=joined("second_per_grid_ts"),
    )
    return positions[:, 0], delta


def carry_rows() -> None:
    """In a scheduler process: let a batch's sampling info hold its requests' ``custom_params``, and the requests
    themselves, as ``fleet_rows``: a new list whenever rows join or leave. SGLang holds them only beside a custom logit
    processor, whose masks make it wait for the GPU at each change (0.5.17)."""
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    copy = SamplingBatchInfo.copy_for_forward

    def start(info: Any, batch: Any, vocab_size: int) -> None:
        info.fleet_rows = [{**(each.sampling_params.custom_params or {}), "request": each} for each in batch.reqs]

    def keep(info: Any, keep_indices: list[int], keep_indices_device: Any) -> None:
        info.fleet_rows = [info.fleet_rows[place] for place in keep_indices]

    def join(info: Any, other: Any) -> None:
        info.fleet_rows = info.fleet_rows + other.fleet_rows

    def copied(info: Any) -> Any:
        made = copy(info)
        made.fleet_rows = info.fleet_rows
        return made

    SamplingBatchInfo.adjusted_from_schedule_batch = start
    SamplingBatchInfo.adjusted_filter_batch = keep
    SamplingBatchInfo.adjusted_merge_batch = join
    SamplingBatchInfo.copy_for_forward = copied


def end_at_stop_ids_alone() -> None:
    """In a scheduler process: a request's stop ids end it, nothing else. SGLang ends it at the model's EOS, too, unless
    it is to ignore EOS, and then ignores its stop ids with it."""
    from sglang.srt.managers.schedule_batch import Req

    make = Req.__init__

    def made(request: Any, *args: Any, **kwargs: Any) -> None:
        make(request, *args, **kwargs)
        request.eos_token_ids = None

    Req.__init__ = made
