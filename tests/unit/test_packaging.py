"""What is installed, and what it may import: wheel, sdist and editable install, and the tools that follow symlinks."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FOLDERS = ("wire", "engines", "workers", "producer")
SOURCES = ("tokenfleet", *FOLDERS, "celeryconfig.py", "pyproject.toml", "LICENSE", "README.md")
LOCK = SimpleNamespace(**runpy.run_path(str(ROOT / "deploy" / "constraints" / "lock.py")))
HEAVY = {
    "torch",
    "triton",
    "transformers",
    "vllm",
    "sglang",
    "peft",
    "accelerate",
    "gguf",
    "tokenizers",
    "safetensors",
    "numpy",
}


def run(*command: str | Path, cwd: Path, expect: int = 0, **env: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "PYTHON", "TOKENFLEET"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**clean, **env}, capture_output=True, text=True, timeout=120
    )
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == (expect == 0), f"{command} ended with {done.returncode}:\n{output[-4000:]}"
    return output


def copy_sources(target: Path) -> Path:
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, target / name)
    return target


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``direct/``, the wheel made of the tree, and ``of_sdist/``: an sdist and the wheel made of that."""
    tree = copy_sources(tmp_path_factory.mktemp("tree"))
    dist = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--wheel", "--outdir", dist / "direct", tree, cwd=dist)
    shutil.rmtree(tree / "build")
    run(*build, "--outdir", dist / "of_sdist", tree, cwd=dist)  # without --wheel: an sdist, then the wheel from it
    return dist


def wheel_files(built: Path, kind: str) -> dict[str, bytes]:
    (wheel,) = (built / kind).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("kind", ["direct", "of_sdist"])
def test_a_wheel_has_one_top_level_name_and_every_source_file(built: Path, kind: str) -> None:
    files = wheel_files(built, kind)
    assert {name.split("/")[0] for name in files} == {"tokenfleet", "tokenfleet-0.1.0.dist-info"}
    for folder in FOLDERS:
        for source in (ROOT / folder).rglob("*"):
            if source.is_file() and "__pycache__" not in source.parts:
                installed = f"tokenfleet/{source.relative_to(ROOT).as_posix()}"
                assert installed in files, f"{installed} is missing in the wheel"
    assert "tokenfleet/py.typed" in files
    assert any(name.endswith(".lua") for name in files)
    assert any(name.endswith("licenses/LICENSE") for name in files)


def test_the_sdist_holds_files_not_links_and_gives_the_same_wheel(built: Path) -> None:
    with tarfile.open(next((built / "of_sdist").glob("*.tar.gz"))) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
    direct, of_sdist = (wheel_files(built, kind) for kind in ("direct", "of_sdist"))
    assert direct == of_sdist


@pytest.fixture(scope="module")
def core_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ``sys.path`` with core's dependencies and nothing else of this environment."""
    folder = tmp_path_factory.mktemp("core")
    for dist in LOCK.closure().values():
        for name in {file.parts[0] for file in dist.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / name).exists():
                (folder / name).symlink_to(Path(str(dist.locate_file(name))))
    return folder


def new_environment(folder: Path, core_only: Path) -> tuple[Path, Path]:
    """An environment's Python and site-packages, seeing core's dependencies alone."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "core_only.pth").write_text(f"{core_only}\n")
    return folder / "bin" / "python", site


PROBE = """
import importlib, json, pkgutil, sys
import tokenfleet, tokenfleet.wire, tokenfleet.producer
for package in (tokenfleet.wire, tokenfleet.producer):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__") and not module.name.startswith("tokenfleet.producer.gateway"):
            importlib.import_module(module.name)
for name in getattr(tokenfleet, "__all__", ()):
    getattr(tokenfleet, name)
from tokenfleet.wire import scripts
scripts._source("submit")
for generic in ("wire", "engines", "workers", "producer", "celeryconfig"):
    try:
        importlib.import_module(generic)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{generic} can be imported")
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize("way", ["wheel", "editable"])
def test_installed_alone_it_is_one_name_and_a_producer_needs_no_torch(
    built: Path, core_only: Path, tmp_path: Path, way: str
) -> None:
    python, site = new_environment(tmp_path / "env", core_only)
    before = {path.name for path in site.iterdir()}
    install = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index")
    if way == "wheel":
        run(*install, next((built / "of_sdist").glob("*.whl")), cwd=tmp_path)
        added = {path.name for path in site.iterdir()} - before
        assert added == {"tokenfleet", "tokenfleet-0.1.0.dist-info"}
    else:
        # The build back end is asked through this environment's setuptools: no network, no isolation.
        tree = copy_sources(tmp_path / "tree")
        hook = "import setuptools.build_meta as b; print('WHEEL', b.build_editable('.'))"
        output = run(sys.executable, "-W", "ignore", "-c", hook, cwd=tree)
        run(*install, tree / output.split("WHEEL ")[1].split()[0], cwd=tmp_path)
    loaded = set(ast.literal_eval(run(python, "-I", "-c", PROBE, cwd=tmp_path).splitlines()[-1]))
    assert "tokenfleet" in loaded
    assert not loaded & (HEAVY | {"fastapi", "flower", "pytest"})


def test_importing_the_producer_here_where_torch_is_installed_loads_none_of_it(tmp_path: Path) -> None:
    loaded = set(ast.literal_eval(run(sys.executable, "-I", "-c", PROBE, cwd=tmp_path).splitlines()[-1]))
    assert not loaded & HEAVY


def test_mypy_follows_the_symlinks(tmp_path: Path) -> None:
    tree = copy_sources(tmp_path)
    (tree / "wire" / "probe_vocabulary.py").write_text("def length(text: str) -> int:\n    return len(text)\n")
    wrong = "from tokenfleet.wire.probe_vocabulary import length\n\nlength(3)\n"
    (tree / "producer" / "probe_use.py").write_text(wrong)
    output = run(sys.executable, "-m", "mypy", "-m", "tokenfleet.producer.probe_use", cwd=tree, expect=1)
    assert re.search(r"tokenfleet/producer/probe_use\.py:3: error: Argument 1 to \"length\"", output), output


@pytest.mark.parametrize(
    ("folder", "statement"),
    [
        ("producer", "import torch"),
        ("producer", "import tokenfleet.workers"),
        ("producer", "import tokenfleet.engines.base"),
        ("wire", "import tokenfleet.engines"),
        ("wire", "import celery"),
        ("engines", "import redis"),
        ("engines", "import tokenfleet.wire.scripts"),  # which imports redis
    ],
)
def test_import_rules_see_through_the_symlinks(tmp_path: Path, folder: str, statement: str) -> None:
    tree = copy_sources(tmp_path)
    (tree / folder / "probe_breach.py").write_text(f"def later() -> None:\n    {statement}  # noqa\n")
    lint = Path(sys.executable).with_name("lint-imports")
    output = run(lint, "--no-cache", cwd=tree, expect=1, PYTHONPATH=str(tree))
    assert f"tokenfleet.{folder}.probe_breach" in output, output


# folder: what it may import, extras or single distributions. A subfolder that is named here answers for itself.
ALLOWED = {
    "wire": {"pydantic", "redis", "msgspec"},
    "producer": {"core"},
    "producer/gateway": {"core", "gateway", "s3"},
    "tokenfleet": {"core"},
    "engines": {"core", "hf", "vllm", "sglang"},
    "workers": {"core", "hf", "local", "flower"},
    "tests": {"core", "dev", "local", "hf", "gateway", "flower", "packaging", "vllm", "sglang"},
    "bench": {"core", "dev", "local", "hf", "gateway", "vllm", "sglang"},
}


OURS = {"tokenfleet", "tests", "bench", *FOLDERS, *(file.stem for file in (ROOT / "tests" / "sglang_cpu").glob("*.py"))}


def imported(folder: Path) -> dict[str, Path]:
    """Third-party top-level modules that the Python files of ``folder`` import anywhere, with one file for each."""
    names: dict[str, Path] = {}
    apart = [ROOT / name for name in ALLOWED if (ROOT / name) != folder and (ROOT / name).is_relative_to(folder)]
    for file in folder.rglob("*.py"):
        if any(file.is_relative_to(other) for other in apart):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0]: file for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names[node.module.split(".")[0]] = file
    return {n: f for n, f in names.items() if n not in sys.stdlib_module_names and n not in OURS}


@pytest.mark.parametrize("folder", ALLOWED)
def test_what_a_folder_imports_is_declared(folder: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {"core": project["dependencies"], **project["optional-dependencies"]}
    allowed = set()
    for group in ALLOWED[folder]:
        allowed |= {canonicalize_name(Requirement(text).name) for text in declared.get(group, [group])}
    of_module = packages_distributions()
    for module, file in imported(ROOT / folder).items():
        names = {canonicalize_name(name) for name in of_module.get(module, [module])}
        assert names & allowed, f"{file} imports {module}, which is not a dependency of {sorted(ALLOWED[folder])}"


def test_the_lock_is_what_is_installed_and_fits_together() -> None:
    lines = (ROOT / "deploy" / "constraints" / "lock.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == LOCK.pins("all", "dev"), "run `make lock`"
    needed = LOCK.closure("all", "dev")
    for name, dist in needed.items():
        for requirement in LOCK.requirements(dist, frozenset()):
            other = needed[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(other.version, prereleases=True), f"{name} wants {requirement}"
