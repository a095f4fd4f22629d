"""docker-compose.yml and Dockerfile, unchanged: built, started, used. `make compose-test` runs this, in minutes."""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import AuthenticationError, OpenAI

from tests.compose.docker_engine import DockerEngine, docker_engine
from tokenfleet import Client

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"

# The test's own engine: builds use the host's network, and as no container reaches outside, the worker is given the
# model folder that it would else fetch.
STAND_IN = """\
services:
  worker:
    build: {{ network: host }}
    volumes: ["{model}:/var/cache/tokenfleet/models/{name}:ro"]
  flower: {{ build: {{ network: host }} }}
  gateway: {{ build: {{ network: host }} }}
  client: {{ build: {{ network: host }} }}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Project:
    engine: DockerEngine
    files: tuple[str, ...]
    name: str
    redis_port: int
    flower_port: int
    gateway_port: int
    password: str

    def compose(self, *arguments: str, limit_s: float = 300, check: bool = True) -> str:
        command = ("compose", "--project-name", self.name, *self.files, *arguments)
        return self.engine.docker(*command, cwd=ROOT, limit_s=limit_s, check=check)

    def container(self, service: str) -> str:
        return self.compose("ps", "--all", "--quiet", service).strip()

    def inspect(self, service: str, template: str) -> str:
        return self.engine.docker("inspect", "--format", template, self.container(service)).strip()

    @property
    def redis_url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.redis_port}/0"

    def flower(self, path: str, login: str | None) -> str:
        request = urllib.request.Request(f"http://127.0.0.1:{self.flower_port}{path}")
        if login:
            request.add_header("Authorization", f"Basic {b64encode(login.encode()).decode()}")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()


PROFILES = ("--profile", "tools", "--profile", "gateway")
LOGIN = "operator:a-flower-password"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("compose")
    with docker_engine() as engine:
        files = ["--file", str(ROOT / "docker-compose.yml"), "--env-file", str(folder / "env")]
        if engine.is_stand_in:
            from tokenfleet.engines.models import resolve

            model = shutil.copytree(resolve(MODEL), folder / "model")
            for path in (model, *model.iterdir()):  # the worker is another user there
                path.chmod(path.stat().st_mode | 0o055 if path.is_dir() else 0o644)
            (folder / "stand-in.yml").write_text(STAND_IN.format(model=model, name=MODEL))
            files += ["--file", str(folder / "stand-in.yml")]
        project = Project(
            engine,
            tuple(files),
            f"tokenfleet-test-{secrets.token_hex(3)}",
            free_port(),
            free_port(),
            free_port(),
            secrets.token_hex(),
        )
        lines = [line for line in (ROOT / ".env.example").read_text().splitlines() if not line.startswith("REDIS_PASS")]
        lines += [f"REDIS_PASSWORD={project.password}", f"REDIS_PORT={project.redis_port}"]
        lines += [f"GATEWAY_PORT={project.gateway_port}", f"FLOWER_PORT={project.flower_port}"]
        lines += [f"FLOWER_BASIC_AUTH={LOGIN}", "TOKENFLEET_GRACE_S=5"]
        (folder / "env").write_text("\n".join(lines) + "\n")
        try:
            project.compose(*PROFILES, "build", limit_s=1500)
            try:
                project.compose("up", "--detach", "--no-build", "--wait", limit_s=900)
            except Exception:
                print(project.compose("ps", "--all", check=False), project.compose("logs", "--tail", "60", check=False))
                raise
            yield project
        finally:
            project.compose(*PROFILES, "down", "--volumes", "--remove-orphans", "--timeout", "5", check=False)
            if not engine.is_stand_in:
                project.compose(*PROFILES, "down", "--rmi", "local", check=False)


@pytest.fixture
def client(project: Project) -> Iterator[Client]:
    with Client(project.redis_url) as client:
        yield client


def ask(client: Client) -> str:
    job = client.submit("What is the capital of France?", max_new_tokens=16, do_sample=False)
    return "".join(job.text())


def test_a_producer_outside_gets_an_answer_and_the_state_stays_honest(project: Project, client: Client) -> None:
    assert "Paris" in ask(client)
    assert {project.inspect(s, "{{.State.Health.Status}}") for s in ("redis", "worker", "flower")} == {"healthy"}


def test_the_client_service_chats_and_has_no_torch(project: Project) -> None:
    assert project.compose("run", "--rm", "-T", "client", "status", "--ready").strip() == "ready"
    chat = ("run", "--rm", "-T", "--entrypoint", "sh", "client", "-c")
    question = "echo 'What is the capital of France?' | tokenfleet chat --temperature 0"
    assert "Paris" in project.compose(*chat, question)
    probe = "import importlib.util as u; print([n for n in ('torch', 'transformers', 'flower') if u.find_spec(n)])"
    assert project.compose("run", "--rm", "-T", "--entrypoint", "python", "client", "-c", probe).strip() == "[]"


def test_the_gateway_comes_up_once_there_is_a_key_and_answers_for_it(project: Project) -> None:
    key = project.compose("run", "--rm", "-T", "client", "keys", "create", "someone").split()[-1]
    project.compose("--profile", "gateway", "up", "--detach", "--no-build", "--wait", limit_s=120)
    with OpenAI(base_url=f"http://127.0.0.1:{project.gateway_port}/v1", api_key=key) as openai:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answer = openai.chat.completions.create(model=MODEL, messages=question, temperature=0, max_tokens=16)
        assert "Paris" in answer.choices[0].message.content
    stranger = OpenAI(base_url=f"http://127.0.0.1:{project.gateway_port}/v1", api_key="another")
    with stranger, pytest.raises(AuthenticationError):
        stranger.models.list()


def test_large_media_lie_where_the_gateway_the_workers_and_producers_find_them(project: Project) -> None:
    sees = "test -f $TOKENFLEET_MEDIA_FOLDER/probe && echo seen"
    project.compose("exec", "-T", "gateway", "sh", "-c", "touch $TOKENFLEET_GATEWAY_MEDIA_FOLDER/probe")
    assert project.compose("exec", "-T", "worker", "sh", "-c", sees).strip() == "seen"
    assert project.compose("run", "--rm", "-T", "--entrypoint", "sh", "client", "-c", sees).strip() == "seen"
    project.compose("exec", "-T", "worker", "sh", "-c", "rm $TOKENFLEET_MEDIA_FOLDER/probe")


@pytest.mark.parametrize("service", ["redis", "worker", "flower", "gateway"])
def test_no_container_is_root_or_can_write_its_image(project: Project, service: str) -> None:
    attempt = "id -u; touch /etc/probe /home/probe 2>/dev/null && echo wrote; grep NoNewPrivs /proc/self/status"
    answer = project.compose("exec", "-T", service, "sh", "-c", attempt).split()
    assert answer[0] != "0"
    assert "wrote" not in answer
    assert answer[-1] == "1"


def test_redis_asks_for_its_password_and_never_evicts(project: Project, client: Client) -> None:
    refused = project.compose("exec", "-T", "redis", "redis-cli", "ping")
    assert refused.startswith("NOAUTH")
    settings = 'for s in maxmemory-policy appendonly; do REDISCLI_AUTH="$REDIS_PASSWORD" redis-cli config get $s; done'
    answer = project.compose("exec", "-T", "redis", "sh", "-c", settings).split()
    assert dict(zip(answer[::2], answer[1::2], strict=True)) == {"maxmemory-policy": "noeviction", "appendonly": "yes"}


def test_flower_wants_a_login_and_shows_the_job_but_never_its_text(project: Project, client: Client) -> None:
    job = client.submit("What is the capital of Italy?", max_new_tokens=8, do_sample=False)
    answer = job.result(60).text
    assert len(answer) > 3
    with pytest.raises(urllib.error.HTTPError, match="401"):
        project.flower("/api/tasks", None)
    task = json.loads(project.flower(f"/api/task/info/{job.id}", LOGIN))
    assert task["uuid"] == job.id
    assert "Italy" not in json.dumps(task)
    assert answer not in json.dumps(task)


def test_what_was_answered_outlives_redis(project: Project, client: Client) -> None:
    job = client.submit("What is the capital of France?", max_new_tokens=16, do_sample=False)
    text = job.result(60).text
    project.engine.docker("kill", "--signal", "KILL", project.container("redis"))
    project.compose("up", "--detach", "--no-build", "--wait", limit_s=120)
    with Client(project.redis_url) as other:
        assert other.job(job.id).result(30).text == text
        assert "Paris" in ask(other)


def test_a_stopped_worker_leaves_by_itself_and_the_fleet_says_that_none_is_left(project: Project) -> None:
    project.compose("stop", "worker", limit_s=90)
    # 137 would say that it had to be killed after stop_grace_period.
    assert project.inspect("worker", "{{.State.ExitCode}}") == "0"
    probe = ("run", "--rm", "-T", "--entrypoint", "sh", "client", "-c")
    said = project.compose(*probe, "tokenfleet status --json >/dev/null; echo status=$?")
    assert "status=0" not in said
    project.compose("up", "--detach", "--no-build", "--wait", limit_s=300)
    with Client(project.redis_url) as client:
        assert "Paris" in ask(client)
