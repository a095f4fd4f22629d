"""The command line, as processes: on a fleet with the scripted engine, at a terminal and in pipes. Without one:
test_cli_fleets.py."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.fleets import Fleet, wait_until
from tests.integration.terminal import CTRL_C, CTRL_D, terminal
from tests.servers import RedisServer
from tests.shells import TOKENFLEET, Shell
from tokenfleet.cli import main
from tokenfleet.wire.keys import Keys

# ---- jobs ------------------------------------------------------------------------------------------------------------


def test_a_submitted_prompt_is_watched_to_its_end_by_id_alone(shell: Shell) -> None:
    job_id = shell("submit", '[[say: "Good morning."]]').strip()
    assert shell("watch", job_id) == "Good morning.\n"


def test_a_prompt_may_come_through_a_pipe_and_messages_from_a_file(shell: Shell, tmp_path: Path) -> None:
    piped = shell("submit", "-", stdin='[[say: "from a pipe"]]\n').strip()
    file = tmp_path / "messages.json"
    file.write_text(json.dumps([{"role": "user", "content": '[[say: "from a file"]]'}]))
    filed = json.loads(shell("submit", "--messages", str(file), "--json"))["id"]
    assert shell("watch", piped) == "from a pipe\n"
    assert shell("watch", filed) == "from a file\n"


def test_watching_goes_on_after_any_event_without_gap_or_repeat(shell: Shell) -> None:
    job_id = shell("submit", "--max_new_tokens", "40", "--temperature", "0", "a long story").strip()
    events = [json.loads(line) for line in shell("watch", "--json", job_id).splitlines()]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[0]["type"] == "queued"
    assert events[-1]["type"] == "finished"
    again = [json.loads(line) for line in shell("watch", "--json", "--from", "3", job_id).splitlines()]
    assert again == events[3:]
    text = "".join(event["text"] for event in events if event["type"] == "delta")
    assert shell("watch", job_id).removesuffix("\n") == text.removesuffix("\n")


def test_status_tells_of_a_job_and_its_timeline(shell: Shell) -> None:
    job_id = shell("submit", "--max-tokens", "5", "--tag", "team=blue", "--priority", "batch", "hello").strip()
    shell("watch", job_id)
    told = json.loads(shell("status", "--json", job_id))
    assert (told["state"], told["completion_tokens"], told["attempts"]) == ("finished", 5, 1)
    assert (told["tags"], told["priority"]) == ({"team": "blue"}, "batch")
    assert 0 <= told["queue_wait_s"] <= told["ttft_s"] <= told["total_s"]
    plain = shell("status", job_id)
    assert re.search(r"^state +finished$", plain, re.MULTILINE)
    assert re.search(r"^tags +team=blue$", plain, re.MULTILINE)


def test_a_running_job_is_cancelled_and_its_watcher_told_why(shell: Shell) -> None:
    job_id = shell("submit", "--max_new_tokens", "30000", "a very long story").strip()
    wait_until(lambda: json.loads(shell("status", "--json", job_id))["completion_tokens"] > 0, 30, "tokens")
    assert shell("cancel", "--reason", "enough of it", job_id) == "cancelled\n"
    assert shell("cancel", job_id) == "cancelled\n"
    done = shell.run("watch", job_id, status=1)
    assert done.stdout
    assert done.stderr.splitlines()[-1] == "error [cancelled]: The job was cancelled: enough of it."


def test_cancelling_an_ended_job_tells_how_it_ended(shell: Shell) -> None:
    job_id = shell("submit", '[[say: "x"]]').strip()
    shell("watch", job_id)
    assert shell("cancel", job_id) == "finished\n"


def test_a_job_that_fails_keeps_its_text_and_gives_status_1(shell: Shell) -> None:
    job_id = shell("submit", "--max_new_tokens", "20", "[[fault: raise at 5]]").strip()
    done = shell.run("watch", job_id, status=1)
    assert done.stdout.strip()
    assert done.stderr.startswith("error [engine_error]: ")
    assert '"type": "failed"' in shell("watch", "--json", job_id, status=1).splitlines()[-1]


def test_the_same_id_is_the_same_job_and_another_body_is_refused(shell: Shell) -> None:
    job_id = "0b5f2c1e-9f1d-4b7a-8a51-0c2b3d4e5f60"
    assert shell("submit", "--job-id", job_id, "--max_tokens", "3", "same").strip() == job_id
    assert shell("submit", "--job-id", job_id, "--max_tokens", "3", "same").strip() == job_id
    assert shell.error("submit", "--job-id", job_id, "--max_tokens", "3", "other").startswith("error [job_conflict]")


def test_a_reader_that_leaves_the_pipe_ends_the_watching_quietly(shell: Shell) -> None:
    job_id = shell("submit", "--max_new_tokens", "20000", "a story").strip()
    watching = subprocess.Popen(
        [*TOKENFLEET, "watch", "--json", job_id], env=shell.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        assert watching.stdout.readline()
        watching.stdout.close()
        assert watching.stderr.read() == b""
    assert watching.returncode == 141
    shell("cancel", job_id)


def test_interrupting_a_watcher_leaves_the_job_alone(shell: Shell) -> None:
    job_id = shell("submit", "--max_new_tokens", "30000", "a story").strip()
    with terminal(*TOKENFLEET, "watch", "--json", job_id, env=shell.env) as screen:
        screen.expect('"delta"')
        screen.type(CTRL_C)
        assert screen.wait() == 130
        assert "Traceback" not in screen.shown
    at_its_end = json.loads(shell("status", "--json", job_id))
    assert at_its_end["state"] == "running"
    made = at_its_end["completion_tokens"]
    wait_until(lambda: json.loads(shell("status", "--json", job_id))["completion_tokens"] > made, 20, "it goes on")
    assert shell("cancel", job_id) == "cancelled\n"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("watch", "0b5f2c1e-0000-4b7a-8a51-0c2b3d4e5f60"), "unknown_job"),
        (("status", "../../etc/passwd"), "unknown_job"),
        (("cancel", "x"), "unknown_job"),
        (("submit", "--model", "gpt-9", "hi"), "model_not_found"),
        (("submit", "--temperature", "nan", "hi"), "invalid_request"),
        (("submit", "--temperature", "hot", "hi"), "invalid_request"),
        (("submit", "--tags", "x", "hi"), "usage"),
        (("submit", "--tag", "x", "hi"), "usage"),
        (("submit",), "usage"),
        (("submit", "--messages", "/nowhere.json"), "invalid_request"),
        (("submit", ""), "invalid_request"),
        (("chat", "--template", "qwen"), "configuration_error"),
        (("watch", "--from", "-1", "x"), "usage"),
    ],
)
def test_what_is_asked_for_wrongly_is_refused_in_one_line(
    served: Fleet,
    words: tuple[str, ...],
    code: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TOKENFLEET_REDIS_URL", served.redis.url)
    monkeypatch.setenv("TOKENFLEET_FLEET", served.redis.fleet)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error [{code}]: ")
    assert len(err.splitlines()) == 1


# ---- fleets ----------------------------------------------------------------------------------------------------------


def test_status_and_models_tell_of_the_fleet_and_never_its_password(shell: Shell, served: Fleet) -> None:
    told = json.loads(shell("status", "--json"))
    assert told["ready"] is True
    assert [(m["model"]["name"], m["workers"], m["waiting"]) for m in told["models"]] == [("scripted", 1, 0)]
    assert [worker["pid"] for worker in told["workers"]] == [served.workers[0].pid]
    plain = shell("status") + shell("models")
    assert re.search(r"^scripted +scripted ", plain, re.MULTILINE)
    password = re.search(r":([^:@]+)@", served.redis.url)
    assert password is not None
    assert password[1] not in plain + json.dumps(told)
    assert shell("status", "--url").strip() == served.redis.url
    assert shell("status", "--ready", "--here", "--model", "scripted") == "ready\n"
    assert shell.error("status", "--ready", "--model", "other", status=3).startswith("error [no_worker]")
    assert [model["name"] for model in json.loads(shell("models", "--json"))] == ["scripted"]


ASSISTANT = r"Assistant: (?:\([^)]*\)\s*)?"
"""Before an answer; perhaps it says why nothing comes, if a worker stands still."""


# ---- chat ------------------------------------------------------------------------------------------------------------


def test_piped_lines_are_turns_of_one_conversation_until_it_is_cleared(shell: Shell) -> None:
    # The scripted engine obeys the last [[say]] in the prompt: what it says without one shows what it was sent.
    lines = '[[say: "one"]]\nagain\nclear\n\nagain\nexit\nnever asked\n'
    done = shell.run("chat", "--max_new_tokens", "4", "--temperature", "0", stdin=lines)
    first, second, third = done.stdout.splitlines()[:3]
    assert (first, second) == ("one", "one")
    assert third != "one"
    assert "never asked" not in done.stdout
    assert "User:" not in done.stdout + done.stderr


def test_a_failed_turn_ends_a_piped_chat_with_its_error(shell: Shell) -> None:
    done = shell.run("chat", "--max_new_tokens", "9", stdin="[[fault: raise at 2]]\nhello\n", status=1)
    assert done.stderr.splitlines()[-1].startswith("error [engine_error]: ")
    assert done.stdout.endswith("\n")
    assert 1 <= len(done.stdout.split()) <= 2  # two tokens of the first answer, none of a second


def test_ctrl_c_stops_the_answer_and_not_the_program(shell: Shell, served: Fleet) -> None:
    client = served.client()
    with terminal(*TOKENFLEET, "chat", "--max_new_tokens", "30000", env=shell.env) as screen:
        screen.expect("User:")
        screen.type("tell me everything\r")
        screen.expect(r"Assistant: [\s\S]{20}")
        wait_until(lambda: client.overview().models[0].running == 1, 10, "the worker to say that it runs one")
        screen.type(CTRL_C)
        screen.expect(r"\(stopped\)")
        wait_until(lambda: client.overview().models[0].running == 0, 10, "the engine's slot to be free")
        screen.expect("User:")
        screen.type('[[say: "still here"]]\r')
        screen.expect(ASSISTANT + "still here")
        screen.expect("User:")
        screen.type("half a lin" + CTRL_C)
        screen.expect("Ctrl-D quits")
        screen.type("clear\r")
        screen.expect("history is cleared")
        screen.type("exit\r")
        assert screen.wait() == 0
        assert "Traceback" not in screen.shown


SLOW_TO_LEAVE = """
import asyncio, sys, time
run = asyncio.Runner.run
def slow(*args, **named):
    answer = run(*args, **named)
    print("(over)", file=sys.stderr, flush=True)
    time.sleep(0.3)
    return answer
asyncio.Runner.run = slow
"""


def test_ctrl_c_just_behind_an_answer_does_not_end_the_chat(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_TO_LEAVE)
    env = {**shell.env, "PYTHONPATH": f"{tmp_path}:{shell.env['PYTHONPATH']}"}
    with terminal(*TOKENFLEET, "chat", env=env) as screen:
        screen.expect("User:")
        screen.type('[[say: "one"]]\r')
        screen.expect(ASSISTANT + r"one[\s\S]*\(over\)")
        screen.type(CTRL_C)
        screen.expect("User:")
        screen.type('[[say: "two"]]\r')
        screen.expect(ASSISTANT + "two")
        screen.expect("User:")
        screen.type("exit\r")
        assert screen.wait() == 0


def test_a_chat_at_the_terminal_survives_errors_and_shows_no_control_characters(shell: Shell) -> None:
    with terminal(*TOKENFLEET, "chat", "--max_new_tokens", "40", env=shell.env) as screen:
        screen.expect("User:")
        screen.type("[[fault: raise at 2]]\r")
        screen.expect(r"error \[engine_error\]: ")
        screen.expect("User:")
        screen.type('[[say: "a\\u001b]0;title\\u0007b"]]\r')
        screen.expect(ASSISTANT + "a\ufffd\\]0;title\ufffdb")
        screen.expect("User:")
        screen.type(CTRL_D)
        assert screen.wait() == 0
    piped = shell("chat", stdin='[[say: "a\\u001b[1mb"]]\n')
    assert piped == "a\x1b[1mb\n"


def test_a_chat_without_a_worker_says_that_it_waits(redis_server: RedisServer, fleet: Fleet) -> None:
    worker = fleet.start_worker()
    worker.kill_group()
    worker.wait()
    shell = Shell(TOKENFLEET_REDIS_URL=redis_server.url, TOKENFLEET_FLEET=redis_server.fleet)
    with terminal(*TOKENFLEET, "chat", env=shell.env) as screen:
        screen.expect("User:")
        screen.type('[[say: "at last"]]\r')
        screen.expect("no worker serves scripted now")
        fleet.start_worker()
        screen.expect("at last")
        screen.type("exit\r")
        assert screen.wait() == 0


# ---- the demo --------------------------------------------------------------------------------------------------------


def test_the_demo_shows_tokens_answers_and_times(shell: Shell) -> None:
    """On the scripted engine; with the real model: the next test."""
    done = shell.run("demo", "--tokens", "20")
    for number in range(1, 5):
        assert re.search(rf"^\[{number}\] \S", done.stdout, re.MULTILINE)
        assert re.search(rf"^{number} +\d+ ms +\S+ m?s +\d+ +20 +[\d.]+ +length ", done.stdout, re.MULTILINE)
    assert re.search(r"^80 tokens in .* tokens/s over all jobs\.$", done.stdout, re.MULTILINE)


def test_the_demo_at_a_terminal(shell: Shell) -> None:
    with terminal(*TOKENFLEET, "demo", "--tokens", "60", env=shell.env) as screen:
        screen.expect("jobs queued in")
        screen.expect("240 tokens in ")
        assert screen.wait() == 0
        assert "Traceback" not in screen.shown


def test_interrupting_the_demo_cancels_its_jobs(shell: Shell, served: Fleet) -> None:
    client = served.client()
    with terminal(*TOKENFLEET, "demo", "--tokens", "30000", env=shell.env) as screen:
        screen.expect("jobs queued in")
        wait_until(lambda: client.overview().models[0].running == 4, 10, "all four to run")
        screen.type(CTRL_C)
        assert screen.wait() == 130
        assert "Traceback" not in screen.shown
    wait_until(lambda: client.overview().models[0].running == 0, 10, "the jobs to be cancelled")


def test_a_job_of_the_demo_that_fails_ends_it_with_its_error(shell: Shell, served: Fleet) -> None:
    client = served.client()
    with terminal(*TOKENFLEET, "demo", "--tokens", "30000", env=shell.env) as screen:
        screen.expect("jobs queued in")
        wait_until(lambda: client.overview().models[0].running == 4, 10, "all four to run")
        with served.redis.client() as redis:
            jobs = redis.scan_iter(match=Keys(served.redis.fleet).job("*"), count=1000)
            [one, *_] = [job.decode() for job in jobs if redis.hget(job, "state") == b"running"]
        client.job(one.rpartition(":")[2]).cancel("for no reason")
        screen.expect(r"error \[cancelled\]: .*for no reason")
        assert screen.wait() == 1
    wait_until(lambda: client.overview().models[0].running == 0, 10, "the others to be cancelled")


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_demo_with_the_real_model(local_shell: Shell) -> None:
    done = local_shell.run("demo", "--tokens", "24", timeout_s=480)
    assert "Paris" in done.stdout
    assert re.search(r"^4 .* (stop|length) ", done.stdout, re.MULTILINE)
    assert "tokenfleet chat" in done.stderr
    assert "Paris" in local_shell("chat", "--temperature", "0", stdin="What is the capital of France?\n")
