"""What is read of a model's folder before any engine reads it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import BaseModel, ValidationError, field_validator
from safetensors.numpy import save_file

from tokenfleet.engines.folders import check_weights, eos_ids, first_line, is_classifier
from tokenfleet.wire.errors import ConfigurationError


def folder(path, **files):
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({"generation_config": {"eos_token_id": [2, 7]}, "config": {"eos_token_id": 3}}, {2, 7}),
        ({"generation_config": {"eos_token_id": 0}}, {0}),
        ({"generation_config": {}, "config": {"eos_token_id": 3}}, set()),
        ({"config": {"eos_token_id": 3}}, {3}),
        ({"config": {"text_config": {"eos_token_id": [4, 5]}}}, {4, 5}),
        ({"generation_config": {"eos_token_id": -1}}, set()),
        ({}, set()),
    ],
)
def test_a_text_ends_by_the_generation_config_and_without_one_by_the_models(tmp_path, files, ids):
    assert eos_ids(folder(tmp_path, **files)) == ids


@pytest.mark.parametrize("config", [{"eos_token_id": "2"}, {"eos_token_id": [2, None]}, {"eos_token_id": 2.0}, [2]])
def test_an_end_that_is_no_token_id_is_refused_before_an_engine_starts(tmp_path, config):
    save_file({"a": np.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError):
        check_weights(folder(tmp_path, generation_config=config), "m", allow_pickle=False)


def test_a_model_of_which_a_file_is_missing_is_refused_before_an_engine_starts(tmp_path):
    save_file({"a": np.zeros(1)}, tmp_path / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigurationError, match=r"1 of its 2 files: model-2\.safetensors"):
        check_weights(tmp_path, "m", allow_pickle=False)
    save_file({"a": np.zeros(1)}, tmp_path / "model.safetensors")  # which is read instead
    check_weights(tmp_path, "m", allow_pickle=False)


def test_a_model_of_which_layers_are_missing_is_refused_before_an_engine_starts(tmp_path):
    folder(tmp_path, config={"num_hidden_layers": 3})
    save_file({"model.layers.0.x": np.zeros(1), "model.layers.2.x": np.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError, match="1 of its 3 layers, 1 first"):
        check_weights(tmp_path, "m", allow_pickle=False)
    save_file({f"model.layers.{i}.x": np.zeros(1) for i in range(4)}, tmp_path / "model.safetensors")  # one more: MTP's
    check_weights(tmp_path, "m", allow_pickle=False)


def test_a_classifier_is_told_by_its_architecture(tmp_path):
    assert not is_classifier(tmp_path)
    assert is_classifier(folder(tmp_path, config={"architectures": ["LlamaForSequenceClassification"]}))


def test_a_foreign_error_is_told_in_its_first_line_and_pydantics_by_its_reason():
    class Config(BaseModel):
        dtype: str

        @field_validator("dtype")
        @classmethod
        def _refused(cls, value: str) -> str:
            raise ValueError(f"{value} is not supported.\nUse another.")

    assert first_line(ValueError("\n no such file \n at all")) == "no such file"
    assert first_line(KeyError()) == "KeyError"
    with pytest.raises(ValidationError) as caught:
        Config(dtype="float32")
    assert first_line(caught.value) == "float32 is not supported."
