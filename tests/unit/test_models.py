"""Where a model's files come from. The real download and conversion of the built-in model: every test that uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokenfleet.engines.models import BUILTIN_MODEL, resolve
from tokenfleet.wire.errors import ConfigurationError, UnknownModel

ROOT = Path(__file__).parents[2]


def run(code: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=50)


def test_a_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert resolve(str(tmp_path / "mine")) == resolve("~/mine") == tmp_path / "mine"


@pytest.mark.parametrize("name", ["./no/such/folder", "/nowhere", "model.gguf", "", "a b", "https://hub/x", "../x/y"])
def test_what_is_neither_here_nor_a_hub_id_is_unknown(name, tmp_path):
    with pytest.raises(UnknownModel):
        resolve(name, cache=tmp_path)


def test_importing_it_imports_no_torch():
    done = run("import sys, tokenfleet.engines.models; print({'torch', 'transformers'} & set(sys.modules))")
    assert done.stdout.strip() == "set()"


ASK = """
import sys, pathlib
from tokenfleet.engines.models import resolve
from tokenfleet.wire.errors import TokenfleetError
try:
    print(resolve(sys.argv[1], cache=pathlib.Path(sys.argv[2])))
except TokenfleetError as error:
    print(error.code, error)
"""


def test_without_a_hub_the_error_names_the_model_that_needs_none(tmp_path):
    done = run(ASK, "someone/some-model", tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.stdout.startswith("configuration_error"), done.stderr
    assert BUILTIN_MODEL in done.stdout


def test_without_a_hub_the_built_in_models_hub_id_is_the_built_in_model(tmp_path):
    ready = tmp_path / "models" / BUILTIN_MODEL
    ready.mkdir(parents=True)
    done = run(ASK, "HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.stdout.strip() == str(ready), done.stderr


def test_a_download_that_fails_says_what_pip_said_and_leaves_nothing(tmp_path):
    done = run(ASK, BUILTIN_MODEL, tmp_path, PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
    assert done.stdout.startswith("configuration_error"), done.stderr
    assert "No matching distribution" in done.stdout
    assert [path for path in (tmp_path / "models").iterdir() if not path.name.endswith(".lock")] == []


MAKE_ONCE = """
import os, pathlib, sys, time
from rich.console import Console
from tokenfleet.engines.models import _made_once
cache, workers = pathlib.Path(sys.argv[1]), int(sys.argv[2])
(cache / f"here-{os.getpid()}").touch()
deadline = time.monotonic() + 40

class Telling(Console):
    def print(self, *said, **how):
        super().print(*said, **how)
        (cache / f"told-{os.getpid()}").touch()

def make(folder):
    with (cache / "made").open("a") as log:
        log.write("x")
    (folder / "half").touch()
    while len(list(cache.glob("told-*"))) < workers - 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    (folder / "other half").touch()

folder = _made_once(cache / "models" / "m", make, Telling(stderr=True))
assert sorted(path.name for path in folder.iterdir()) == ["half", "other half"]
"""


def test_of_four_processes_at_once_one_makes_the_model_and_all_get_it(tmp_path):
    command = [sys.executable, "-c", MAKE_ONCE, str(tmp_path), "4"]
    workers = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    ends = [(worker.communicate(timeout=50)[1], worker.returncode) for worker in workers]
    assert [code for _, code in ends] == [0] * 4, ends
    assert (tmp_path / "made").read_text() == "x"
    assert sum("Waiting for another process" in text for text, _ in ends) == 3


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_gguf_file_becomes_a_folder_once(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("gguf")
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    folder = resolve(str(file), cache=tmp_path)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 1
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(file), cache=tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF, or so it says")
    with pytest.raises(ConfigurationError, match=r"broken\.gguf"):
        resolve(str(broken), cache=tmp_path)


def write_gguf(file: Path) -> None:
    """A Llama of one layer, with a byte-level tokenizer."""
    import gguf
    import numpy as np

    from tests.small_tokenizers import byte_level

    tokenizer = json.loads(byte_level().to_str())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]]
    hidden, feed, vocab = 32, 64, len(tokens)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(feed)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(hidden // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([gguf.TokenType.NORMAL] * vocab)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,), "output.weight": (vocab, hidden),
        "blk.0.attn_norm.weight": (hidden,), "blk.0.ffn_norm.weight": (hidden,),
        "blk.0.attn_q.weight": (hidden, hidden), "blk.0.attn_k.weight": (hidden, hidden),
        "blk.0.attn_v.weight": (hidden, hidden),
        "blk.0.attn_output.weight": (hidden, hidden), "blk.0.ffn_gate.weight": (feed, hidden),
        "blk.0.ffn_up.weight": (feed, hidden), "blk.0.ffn_down.weight": (hidden, feed),
    }  # fmt: skip
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_hub_model_is_looked_for_in_the_cache_that_was_named(tmp_path):
    """LLaMA-Factory's ``cache_dir``: laid out as huggingface_hub does."""
    repo = tmp_path / "mine" / "models--someone--some-model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    snapshot = repo / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    script = ASK.replace("import resolve", "import listen, resolve").replace(
        "try:\n",
        "listen(lambda step, share: print(step, file=sys.stderr))\n"
        "try:\n    resolve(sys.argv[1], cache=pathlib.Path(sys.argv[2]))\n",
    )
    done = run(script, "someone/some-model", tmp_path / "mine", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.stdout.strip() == str(snapshot), done.stderr
    assert done.stderr.count("fetching") == 1  # before a model is loaded and when it is
