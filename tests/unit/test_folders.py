"""What is read of a model's folder before any engine reads it."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel, ValidationError, field_validator

from tokenfleet.engines.folders import eos_ids, first_line, is_classifier


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
        ({}, set()),
    ],
)
def test_a_text_ends_by_the_generation_config_and_without_one_by_the_models(tmp_path, files, ids):
    assert eos_ids(folder(tmp_path, **files)) == ids


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
