"""The command line's words, before anything runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tokenfleet.cli import COMMANDS, main, root
from tokenfleet.cli.argument_help import HELP, SECTIONS
from tokenfleet.cli.arguments import merged, read_value
from tokenfleet.engines.media.settings import MediaSettings
from tokenfleet.producer.arguments import FleetArguments, split_arguments
from tokenfleet.wire.chat import GenerationParams
from tokenfleet.wire.errors import ConfigurationError, InvalidRequest
from tokenfleet.wire.jobs import JobOptions

HEAVY = ("celery", "jinja2", "kombu", "pydantic", "redis", "rich", "torch", "transformers", "yaml")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def test_help_and_version_import_nothing_heavy() -> None:
    for word in ("--help", "--version"):
        code = f"import sys, tokenfleet.cli as c; c.main([{word!r}]); print(*({set(HEAVY)!r} & {{*sys.modules}}))"
        assert run_python(code).splitlines()[-1] == ""


def test_the_chat_module_is_light_until_it_is_used() -> None:
    code = (
        "import sys, tokenfleet.chat as c; print('redis' in sys.modules, c.ChatModel.__name__, 'torch' in sys.modules)"
    )
    assert run_python(code).strip() == "False ChatModel False"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_loaded_and_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    told = capsys.readouterr().out
    assert f"tokenfleet {name}" in told
    assert "--help" in told


def test_every_argument_is_a_flag_with_a_word_about_it() -> None:
    listed = [name for names in SECTIONS.values() for name in names]
    known = {*FleetArguments.model_fields, *GenerationParams.model_fields, *JobOptions.model_fields}
    # --tag; a command's own business; the gateway's; `tokenfleet dead requeue`'s
    elsewhere = {"tags", "cancel_on_disconnect", "tenant", "webhook", "webhook_kind", "retry_of"}
    assert set(listed) == known - elsewhere
    assert len(listed) == len(set(listed))
    assert set(HELP) == set(listed)


def test_completion_offers_the_commands_without_importing_them() -> None:
    code = (
        "import os, sys\n"
        "os.environ |= {'_TOKENFLEET_COMPLETE': 'bash_complete', 'COMP_WORDS': 'tokenfleet st', 'COMP_CWORD': '1'}\n"
        "from tokenfleet.cli import main\n"
        "try: main([])\n"
        "except SystemExit: pass\n"
        "print('redis' in sys.modules)"
    )
    assert run_python(code).splitlines() == ["plain,status", "False"]


def test_files_words_flags_and_environment_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: a\ntop_k: 5\nmax_tokens: 9\nredis_url: unix:///file\n")
    found = merged(
        [str(file), "top_k=6", "temperature=0.5", "engine_args.a.b=[1, 2]"],
        {"top_k": 7},
        {"redis_url": "unix:///environment", "fleet": "mine"},
    )
    assert found == {
        "model_name_or_path": "a",
        "top_k": 7,
        "max_new_tokens": 9,
        "temperature": 0.5,
        "engine_args": {"a": {"b": [1, 2]}},
        "redis_url": "unix:///file",
        "fleet": "mine",
    }


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.5", 0.5),
        ("do_sample", "false", False),
        ("model", "123", "123"),
        ("infer_backend", "vllm", "vllm"),
        ("stop", "- a", "- a"),
        ("stop_token_ids", "2,5", [2, 5]),
        ("stop_token_ids", "[2, 5]", [2, 5]),
        ("logit_bias", "{5: -100}", {5: -100}),
        ("vllm_config", '{"max_num_seqs": 8}', {"max_num_seqs": 8}),
        ("vllm_config", "file.json", "file.json"),
        ("adapter_name_or_path", "a,b", "a,b"),
        ("response_format", "json_object", {"type": "json_object"}),
        ("unknown", "1", "1"),
    ],
)
def test_words_are_read_as_what_their_argument_is(name: str, text: str, value: object) -> None:
    assert read_value(name, text) == value


def test_all_that_is_read_is_what_the_models_take() -> None:
    words = ["temperature=0", "stop_token_ids=2", "response_format=json_object", "logit_bias={5: 1}", "n=2", "seed=3"]
    _, generation = split_arguments(merged(words, {"stop": ["a", "b"]}, {}))
    params = GenerationParams.model_validate(generation)
    assert (params.stop, params.stop_token_ids, params.n, params.seed) == (("a", "b"), (2,), 2, 3)
    assert params.response_format.type == "json_object"


def test_every_media_setting_of_llama_factorys_files_reaches_the_engine(tmp_path: Path) -> None:
    values = {
        "image_max_pixels": 262144, "image_min_pixels": 2048, "image_do_pan_and_scan": False, "crop_to_patches": False,
        "video_max_pixels": 16384, "video_min_pixels": 512, "video_fps": 1.5, "video_maxlen": 64,
        "use_audio_in_video": False, "audio_sampling_rate": 24000,
    }  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: a\n" + "".join(f"{name}: {value}\n" for name, value in values.items()).lower())
    for engine in ("hf", "vllm", "sglang"):
        arguments, _ = split_arguments(merged([str(file)], {"infer_backend": engine}, {}))
        args = arguments.local_fleet().worker["engine_args"]
        assert {name: args[name] for name in values} == values
        assert MediaSettings.model_validate({name: args[name] for name in values}).video_fps == 1.5


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just words", "1: 2"])
def test_a_file_that_holds_no_arguments_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yml"
    file.write_text(text)
    with pytest.raises(ConfigurationError):
        merged([str(file)], {}, {})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chat", "--modle_name_or_path", "x"], "'--model_name_or_path'"),
        (["chat", "--top-q", "1"], "'--top_p'"),
        (["chat", "modle_name_or_path=x"], "model_name_or_path"),
        (["chat", "nothing"], "'nothing' is neither key=value nor a file"),
        (["chat", "/nowhere/run.yaml"], "/nowhere/run.yaml can't be read"),
        (["chat", "temperature=warm"], "temperature: "),
        (["chat", "--infer-backend", "tensorrt"], "'tensorrt' is not one of"),
        (["up", "--temperature", "1"], "No such option '--temperature'"),
        (["chat", "--infer_backend", "vllm", "--num_beams", "4"], "does not offer num_beams=4"),
        (["statsu"], "Did you mean status"),
        (["watch"], "Missing argument 'JOB_ID'"),
    ],
)
def test_mistakes_are_named_in_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error [")
    assert said in err


def test_a_bug_of_ours_is_one_line_unless_debugging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr(root.get_command(None, "down"), "callback", broken)  # type: ignore[arg-type]
    assert main(["down"]) == 1
    assert capsys.readouterr().err.startswith("error [internal_error]: ZeroDivisionError: a b. ")
    with pytest.raises(ZeroDivisionError):
        main(["--debug", "down"])


@pytest.mark.parametrize("backend", ["hf", "vllm", "sglang"])
def test_llama_factorys_stage_of_reward_models_is_understood(backend: str) -> None:
    def engine_args(**given: object) -> dict[str, object]:
        arguments, _ = split_arguments({"model_name_or_path": "m", "infer_backend": backend, **given})
        return dict(arguments.local_fleet().worker["engine_args"])

    assert engine_args(stage="rm") == engine_args(rewards=True) == {"model_name_or_path": "m", "rewards": True}
    assert engine_args(stage="sft") == {"model_name_or_path": "m"}
    with pytest.raises(ConfigurationError, match="stage"):
        engine_args(stage="ppo")
    with pytest.raises(ConfigurationError, match="rewards"):
        engine_args(stage="rm", rewards=False)


def test_a_default_that_the_engine_would_refuse_in_every_chat_is_refused_before_it_loads() -> None:
    for backend in ("vllm", "sglang"):
        with pytest.raises(InvalidRequest) as caught:
            split_arguments({"model_name_or_path": "m", "infer_backend": backend, "num_beams": 4})
        assert (caught.value.code, caught.value.details["param"]) == ("unsupported_parameter", "num_beams")
    split_arguments({"model_name_or_path": "m", "num_beams": 4})
    split_arguments({"redis_url": "redis://somewhere", "num_beams": 4})  # that fleet's registry tells
