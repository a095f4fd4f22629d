"""A Docker engine to build and start the project's own files on: the machine's, or one of the test's own.

Where no engine runs and no image can be pulled (a fresh Debian machine without a container registry), an engine is
started on a socket of its own, and the two images that the project's files name are made from Debian packages under
their real names. So Dockerfile and docker-compose.yml run unchanged. Needs root, a Debian mirror and a PyPI mirror as
apt and pip are set up on the machine. Nothing of it is left behind.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PYTHON_IMAGE = "python:3.11-slim"
REDIS_IMAGE = "redis:7"
_TOOLS = ("docker.io", "containerd", "runc", "iptables", "mmdebstrap")

_PYTHON_DOCKERFILE = """\
FROM debian:bookworm-slim
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends python3 python3-venv >/dev/null \
 && rm -rf /var/lib/apt/lists/* && python3 -m venv /usr/local
COPY pip.conf /etc/pip.conf
COPY ca.crt /etc/ssl/certs/ca-certificates.crt
COPY wheels /opt/wheels
CMD ["python3"]
"""
_REDIS_DOCKERFILE = """\
FROM debian:bookworm-slim
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server >/dev/null \
 && rm -rf /var/lib/apt/lists/* && mkdir -p /data && chown redis:redis /data
VOLUME /data
WORKDIR /data
USER redis
EXPOSE 6379
CMD ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--dir", "/data"]
"""


@dataclass(frozen=True, slots=True)
class DockerEngine:
    """``env`` reaches it; ``is_stand_in`` says that its images are ours and its builds need the host's network."""

    env: Mapping[str, str]
    is_stand_in: bool

    def docker(self, *arguments: str, cwd: Path | None = None, limit_s: float = 600, check: bool = True) -> str:
        return _run(["docker", *arguments], env=self.env, cwd=cwd, limit_s=limit_s, check=check)


@contextmanager
def docker_engine() -> Iterator[DockerEngine]:
    """The machine's engine if one answers, else one of our own with stand-in images."""
    machine = DockerEngine(dict(os.environ), is_stand_in=False)
    try:
        machine.docker("info", limit_s=20)
        machine.docker("compose", "version", limit_s=20)
    except (subprocess.SubprocessError, OSError):
        pass
    else:
        yield machine
        return
    with tempfile.TemporaryDirectory(prefix="tokenfleet-docker-") as name, _own_engine(Path(name)) as engine:
        yield engine


@contextmanager
def _own_engine(work: Path) -> Iterator[DockerEngine]:
    socket = f"unix://{work}/docker.sock"
    engine = DockerEngine(
        {**os.environ, "DOCKER_HOST": socket, "DOCKER_CONFIG": str(work / "config")}, is_stand_in=True
    )
    _install_tools(work)
    # Leaves the machine's own firewall and forwarding alone; so containers reach each other, but nothing outside.
    command = ["dockerd", "--data-root", str(work / "data"), "--exec-root", str(work / "run"), "-H", socket]
    command += ["-p", str(work / "dockerd.pid"), "--storage-driver=overlay2", "--iptables=false", "--ip6tables=false"]
    command += ["--ip-forward=false", "--ip-masq=false"]
    with (work / "dockerd.log").open("w") as log:
        daemon = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_until_it_answers(engine, daemon, work / "dockerd.log")
        _make_images(engine, work)
        yield engine
    finally:
        daemon.terminate()
        with suppress(subprocess.TimeoutExpired):
            daemon.wait(30)
        daemon.kill()
        for namespace in (work / "run" / "netns").glob("*"):
            _run(["umount", str(namespace)], check=False)
        _run(["ip", "link", "del", "docker0"], check=False)


def _install_tools(work: Path) -> None:
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    if not (shutil.which("dockerd") and shutil.which("mmdebstrap")):
        _run(["apt-get", "update", "-qq"], env=quiet)
        _run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *_TOOLS], env=quiet)
    # Debian 12 has no compose v2. Debian 13's needs libc only: unpacked as a plugin, not installed.
    apt = work / "apt"
    (apt / "lists" / "partial").mkdir(parents=True)
    (apt / "cache" / "archives" / "partial").mkdir(parents=True)
    mirror = re.search(r"^URIs: *(\S+)", Path("/etc/apt/sources.list.d/debian.sources").read_text(), re.MULTILINE)
    assert mirror, "no Debian mirror in debian.sources"
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (apt / "sources.list").write_text(f"deb [signed-by={keyring}] {mirror[1]} trixie main\n")
    settings = [f"Dir::Etc::sourcelist={apt}/sources.list", "Dir::Etc::sourceparts=/nonexistent"]
    settings += [f"Dir::State::lists={apt}/lists", f"Dir::Cache={apt}/cache", "APT::Sandbox::User=root"]
    options = ["-qq", *(part for setting in settings for part in ("-o", setting))]
    _run(["apt-get", *options, "update"], cwd=apt)
    _run(["apt-get", *options, "download", "docker-compose"], cwd=apt)
    _run(["dpkg", "-x", str(next(apt.glob("docker-compose_*.deb"))), str(apt / "unpacked")])
    plugins = work / "config" / "cli-plugins"
    plugins.mkdir(parents=True)
    shutil.copy(apt / "unpacked/usr/libexec/docker/cli-plugins/docker-compose", plugins)


def _wait_until_it_answers(engine: DockerEngine, daemon: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            engine.docker("info", limit_s=20)
        except subprocess.SubprocessError as error:
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"dockerd did not start: {log.read_text()[-2000:]}") from error
            time.sleep(0.2)
        else:
            return


def _make_images(engine: DockerEngine, work: Path) -> None:
    _import_debian(engine, work)
    python, redis = work / "python", work / "redis"
    python.mkdir()
    redis.mkdir()
    (python / "Dockerfile").write_text(_PYTHON_DOCKERFILE)
    (redis / "Dockerfile").write_text(_REDIS_DOCKERFILE)
    _write_pip_configuration(python / "pip.conf")
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", python / "ca.crt")
    # PyPI's torch for Linux is a CUDA build of several GB: take the one that pip gives on this machine.
    _run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(python / "wheels"), _locked("torch")])
    builder = {**engine.env, "DOCKER_BUILDKIT": "0"}  # what is built so needs no frontend image and takes --network
    for image, folder in ((PYTHON_IMAGE, python), (REDIS_IMAGE, redis)):
        _run(["docker", "build", "-q", "--network", "host", "-t", image, str(folder)], env=builder, limit_s=600)


def _import_debian(engine: DockerEngine, work: Path) -> None:
    archive, scratch = work / "debian.tar", work / "scratch"
    scratch.mkdir()
    _run(["mount", "-t", "tmpfs", "-o", "size=2g", "none", str(scratch)])
    try:
        command = ["mmdebstrap", "-q", "--variant=minbase", "--include=ca-certificates"]
        command += ["--aptopt=Acquire::Languages none"]
        command += [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("man", "doc", "locale")]
        _run([*command, "bookworm", str(archive)], env={**os.environ, "TMPDIR": str(scratch)})
    finally:
        _run(["umount", str(scratch)], check=False)
    engine.docker("import", str(archive), "debian:bookworm-slim")
    archive.unlink()


def _write_pip_configuration(target: Path) -> None:
    """This machine's indexes, less what names folders of this machine. Deleted with the image, never exported."""
    machine = configparser.RawConfigParser(strict=False)
    machine.read(["/etc/xdg/pip/pip.conf", "/etc/pip.conf", Path("~/.config/pip/pip.conf").expanduser()])
    ours = configparser.RawConfigParser()
    ours.read_dict({"global": {"find-links": "/opt/wheels"}})
    for section in machine.sections():
        if not ours.has_section(section):
            ours.add_section(section)
        for option, value in machine.items(section):
            kept = " ".join(word for word in value.split() if not word.startswith(("file:", "/")))
            if option not in ("constraint", "find-links", "cert") and kept:
                ours.set(section, option, kept)
    with target.open("w") as file:
        ours.write(file)


def _locked(package: str) -> str:
    lock = Path(__file__).parents[2] / "deploy" / "constraints" / "lock.txt"
    return next(line for line in lock.read_text().splitlines() if line.startswith(f"{package}=="))


def _run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    limit_s: float = 600,
    check: bool = True,
) -> str:
    done = subprocess.run(command, env=env, cwd=cwd, timeout=limit_s, capture_output=True, text=True)
    if check and done.returncode != 0:
        note = f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        raise subprocess.CalledProcessError(done.returncode, note, done.stdout, done.stderr)
    return done.stdout
