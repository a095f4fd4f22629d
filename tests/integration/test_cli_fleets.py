"""The command line without a fleet, with a worker in the foreground, with local fleets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.fleets import ROOT, wait_until
from tests.servers import RedisServer
from tests.shells import SCRIPTED, TOKENFLEET, Shell


def test_without_a_fleet_every_command_says_how_to_get_one(local_shell: Shell) -> None:
    for words in (("status",), ("models",), ("submit", "x"), ("watch", "x"), ("cancel", "x"), ("worker",)):
        line = local_shell.error(*words, status=3)
        assert line.startswith("error [no_fleet]: ")
        assert "tokenfleet up" in line
    assert "was running" in local_shell.run("down").stderr


def test_an_unreachable_redis_is_one_line_and_status_3() -> None:
    away = Shell(TOKENFLEET_REDIS_URL="redis://:secret@127.0.0.1:1/0")
    for words in (("status",), ("submit", "x"), ("chat",)):
        line = away.error(*words, stdin="hi\n", status=3)
        assert line.startswith("error [redis_unavailable]: ")
        assert "secret" not in line
    assert away.error("status", "--redis-url", "http://x").startswith("error [configuration_error]: ")


def test_a_worker_in_the_foreground_serves_until_it_is_told_to_end(redis_server: RedisServer) -> None:
    shell = Shell(TOKENFLEET_REDIS_URL=redis_server.url, TOKENFLEET_FLEET=redis_server.fleet)
    assert shell.error("status", "--ready", status=3).startswith("error [no_worker]")
    assert json.loads(shell("status", "--json", status=3))["ready"] is False
    reader, lifeline = os.pipe()
    words = (
        "worker",
        *SCRIPTED,
        "--model",
        "mine",
        "--slots",
        "7",
        "--",
        "--hostname",
        "cli@%h",
        "--loglevel",
        "ERROR",
    )
    worker = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "die_with_parent.py"), str(reader), *TOKENFLEET, *words],
        env=shell.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[reader],
        start_new_session=True,
    )
    os.close(reader)
    try:
        wait_until(lambda: json.loads(run_any(shell, "status", "--json"))["ready"], 60, "a ready worker")
        (told,) = json.loads(shell("status", "--json"))["workers"]
        assert (told["model"], told["slots"], told["pid"]) == ("mine", 7, worker.pid)
        job_id = shell("submit", '[[say: "served"]]').strip()
        assert shell("watch", job_id) == "served\n"
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
    finally:
        os.close(lifeline)
        worker.wait(30)


def run_any(shell: Shell, *words: str) -> str:
    return subprocess.run([*TOKENFLEET, *words], env=shell.env, capture_output=True, text=True, timeout=60).stdout


def test_a_local_fleet_goes_up_serves_and_goes_down(local_shell: Shell) -> None:
    up = local_shell.run("up", *SCRIPTED, "--idle-stop", "120")
    assert up.stdout == ""
    assert "is ready and serves scripted" in up.stderr
    again = local_shell.run("up", *SCRIPTED)
    assert "was running and serves scripted" in again.stderr
    assert "2 minutes" in again.stderr
    told = json.loads(local_shell("status", "--json"))
    assert told["local"]["state"] == "ready"
    other = local_shell.error("up", *SCRIPTED, "--slots", "3")
    assert other.startswith("error [configuration_error]: ")
    assert "tokenfleet down" in other
    url = local_shell("status", "--url").strip()
    assert url.startswith("unix://")
    job_id = local_shell("submit", '[[say: "local"]]').strip()
    elsewhere = Shell(TOKENFLEET_REDIS_URL=url)
    assert elsewhere("watch", job_id) == "local\n"
    assert local_shell("chat", stdin='[[say: "hello there"]]\n') == "hello there\n"
    assert "stopped" in local_shell.run("down").stderr
    assert local_shell.error("status", status=3).startswith("error [no_fleet]")


def test_interrupting_up_tells_of_the_fleet_that_goes_on(local_shell: Shell) -> None:
    with subprocess.Popen([*TOKENFLEET, "up", *SCRIPTED], env=local_shell.env, stderr=subprocess.PIPE) as up:
        assert up.stderr is not None
        assert b"..." in up.stderr.readline()  # it starts
        up.send_signal(signal.SIGINT)
        assert up.wait(60) == 130
        assert b"runs until `tokenfleet down`" in up.stderr.read()
    assert "stopped" in local_shell.run("down").stderr


def test_chat_starts_the_local_fleet_that_its_file_describes(local_shell: Shell, tmp_path: Path) -> None:
    config = tmp_path / "chat.yaml"
    config.write_text("infer_backend: scripted\nengine_args: {token_ms: 1}\nmax_new_tokens: 3\ntemperature: 0\n")
    text = local_shell("chat", str(config), "engine_args.context_tokens=4096", "--max-new-tokens", "4", stdin="hi\n")
    assert text.strip()
    (worker,) = json.loads(local_shell("status", "--json"))["workers"]
    assert worker["engine"] == "scripted"
    local_shell("chat", str(config), "engine_args.context_tokens=4096", stdin="")
    line = local_shell.error("chat", str(config), "engine_args.context_tokens=2048")
    assert line.startswith("error [configuration_error]: ")
    assert local_shell.error("chat", "--model", "other", stdin="hi\n").startswith("error [model_not_found]")


def test_a_model_that_cannot_be_loaded_is_told_and_its_fleet_makes_room(local_shell: Shell) -> None:
    line = local_shell.error("up", "--infer_backend", "scripted", "--engine_args", "{tokn_ms: 1}")
    assert line.startswith("error [configuration_error]: ")
    assert "tokn_ms" in line
    for words in (("status",), ("submit", "x")):
        assert local_shell.error(*words, status=3).startswith("error [fleet_failed]: ")
    assert "is ready and serves scripted" in local_shell.run("up", *SCRIPTED).stderr


def test_a_model_that_is_not_there_was_asked_for_wrongly(local_shell: Shell) -> None:
    line = local_shell.error("chat", "--model_name_or_path", "/nowhere/model", stdin="hi\n")
    assert line.startswith("error [model_not_found]: There is no folder '/nowhere/model'")
