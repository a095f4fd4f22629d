"""A command that is told to end by something other than Ctrl-C: SIGTERM, or SIGHUP when its terminal is closed."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.fleets import Fleet, wait_until
from tests.gateways import start_gateway
from tests.integration.terminal import terminal
from tests.jobs import Jobs
from tests.shells import TOKENFLEET, Shell


@pytest.mark.parametrize(("command", "how"), [("demo", "terminated"), ("demo", "closed"), ("chat", "closed")])
def test_the_jobs_of_a_command_at_a_terminal_end_with_it(command: str, how: str, shell: Shell, served: Fleet) -> None:
    jobs = Jobs(served)
    words = ("demo", "--tokens", "30000") if command == "demo" else ("chat", "--max_new_tokens", "30000")
    with terminal(*TOKENFLEET, *words, env=shell.env) as screen:
        if command == "chat":
            screen.expect("User:")
            screen.type("a story\n")
        count = 4 if command == "demo" else 1
        wait_until(lambda: jobs.states() == {"running": count}, what="its jobs to run")
        if how == "closed":
            os.close(screen._fd)
            screen._fd = os.open(os.devnull, os.O_RDWR)
        else:
            screen.process.terminate()
        number = signal.SIGHUP if how == "closed" else signal.SIGTERM
        wait_until(lambda: screen.process.poll() is not None, what="its end")
        assert screen.process.returncode == -number
        assert jobs.states() == {"cancelled": count}, "it ended after its jobs"


def test_the_job_of_a_chat_in_the_background_ends_with_it(shell: Shell, served: Fleet) -> None:
    """There a shell has it ignore SIGINT."""
    jobs = Jobs(served)
    command = [*TOKENFLEET, "chat", "--max_new_tokens", "30000"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(command, env=shell.env, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdin is not None
        process.stdin.write(b"a story\n")
        process.stdin.flush()
        wait_until(lambda: jobs.states() == {"running": 1}, what="its job to run")
        process.terminate()
        assert process.wait(60) == -signal.SIGTERM
        assert jobs.states() == {"cancelled": 1}
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


def test_the_jobs_of_a_demo_end_whose_notes_nobody_reads(shell: Shell, served: Fleet) -> None:
    jobs, (reader, writer) = Jobs(served), os.pipe()
    os.close(reader)  # as `2>&1 | head` does
    command = [*TOKENFLEET, "demo", "--tokens", "30000"]
    with subprocess.Popen(command, env=shell.env, stdout=subprocess.DEVNULL, stderr=writer) as process:
        os.close(writer)
        assert process.wait(60) == 1
    assert jobs.states() == {"cancelled": 4}


def test_a_gateway_whose_terminal_is_closed_ends_as_if_it_were_asked_to(served: Fleet) -> None:
    """With its streams, whose jobs nobody else would end."""
    gateway = start_gateway(served)
    try:
        gateway.process.send_signal(signal.SIGHUP)
        assert gateway.process.wait(60) == -signal.SIGTERM
    finally:
        gateway.close()
