"""The JSON schema of configuration files agrees with the parser: its keys, its types, and the files of the repository."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from megatron_patch.cli import schema as program
from megatron_patch.config.megatron.translator import MEGATRON_FLAGS
from megatron_patch.config.schema import config_schema, stage_schema
from megatron_patch.config.stage_spec import StageSpec, parse_stages
from megatron_patch.config.values import KINDS, WITH_COMMAS, Form, in_file, read_values
from megatron_patch.config.yaml_files import load_yaml
from megatron_patch.errors import ConfigError

SCHEMA = config_schema()
ROOT = Path(__file__).parent.parent.parent
FILES = sorted([*(ROOT / "examples" / "configs").glob("*.yaml"), *(ROOT / "examples" / "replicate").glob("*.yaml")])
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}


def _is(value, kind) -> bool:
    whole = kind == "integer" and isinstance(value, float) and value.is_integer()
    return whole or (isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool)))


def accepts(schema, value) -> bool:
    """Returns whether a value is valid, for the keywords of JSON schema that are used here."""
    assert set(schema) <= {
        *("$schema", "title", "description", "default", "type", "enum", "const", "anyOf", "properties", "patternProperties"),
        *("additionalProperties", "items", "minItems", "pattern", "minimum", "multipleOf"),
    }
    kinds = schema.get("type", list(TYPES))
    if not any(_is(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    if "enum" in schema and not any(value == choice and type(value) is type(choice) for choice in schema["enum"]):
        return False
    if ("const" in schema and value != schema["const"]) or not all(accepts(part, value) for part in schema.get("allOf", [])):
        return False
    if "anyOf" in schema and not any(accepts(part, value) for part in schema["anyOf"]):
        return False
    if isinstance(value, str) and "pattern" in schema and re.search(schema["pattern"], value) is None:
        return False
    if isinstance(value, (int, float)) and (
        value < schema.get("minimum", value) or (value % schema.get("multipleOf", 1) and "multipleOf" in schema)
    ):
        return False
    if isinstance(value, list):
        return len(value) >= schema.get("minItems", 0) and all(accepts(schema.get("items", {}), item) for item in value)
    if isinstance(value, dict):
        for key, item in value.items():
            parts = [schema["properties"][key]] if key in schema.get("properties", {}) else []
            parts += [part for pattern, part in schema.get("patternProperties", {}).items() if re.search(pattern, key)]
            if (not parts and schema.get("additionalProperties") is False) or not all(accepts(part, item) for part in parts):
                return False
    return True


def reads(name, value) -> bool:
    """Returns whether the program reads a value of an option; `stages:` is read to its last key."""
    if name in WITH_COMMAS and isinstance(value, list):
        return all(isinstance(item, (int, float)) for item in value)  # later checks refuse other lists
    given, problems = in_file({name: value}, "run.yaml")
    reading = read_values(given)
    if problems or reading.problems:
        return False
    try:
        return name != "stages" or "stages" not in reading.values or bool(parse_stages(reading.values["stages"]))
    except ConfigError:
        return False


VALUES = [
    None, "None", True, False, 0, 1, 3, -1, 1.0, 2.5, 1e-3, "1e-3", "4096", "2M", "1.5B", "64Ki", "3h30m", "90", "text", "a b", "0.5", "RMSNorm",
    "cosine", "full", ["a", "b"], [1, 2], [90, 10, 0], [["a"]], {"a": 1}, [{"a": 1}], [{"patch_size": 4, "steps": 2}], [{"patch_size": "x"}],
    [{"patch-size": 1, "tokens": "2M", "lr": "1e-3", "data_path": [0.7, "web"], "position_weights": [2, 1], "optimizer": "keep"}],
    "[{patch_size: 1}]", [],
]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_what_the_program_reads_is_valid(name):
    for value in VALUES:
        if reads(name, value):
            assert accepts(SCHEMA, {name: value}) and accepts(SCHEMA, {name.replace("_", "-"): value}), value


@pytest.mark.parametrize("name", KINDS)
def test_wrong_types_are_not_valid(name):
    form = KINDS[name].form
    wrong = [{"a": 1}, [["a"]]]
    wrong += ["yes", 1, ["a"]] if form is Form.SWITCH else []
    wrong += ["fast", [1], True, "2X"] if form in (Form.COUNT, Form.NUMBER, Form.DURATION, Form.INTEGER) else []
    wrong += ["-5", -5, 1.5] if form is Form.COUNT else []
    wrong += ["other", 17, ["a"]] if form is Form.CHOICE else []
    wrong += [["a"]] if form is Form.TEXT and name not in {"stages", *WITH_COMMAS} else []
    wrong += [[{"patch_sise": 4}], [{"patch_size": "four"}], [{"optimizer": "hold"}], [3], []] if name == "stages" else []
    for value in wrong:
        assert not reads(name, value), (name, value)
        assert not accepts(SCHEMA, {name: value}), (name, value)


def test_every_option_is_a_key_with_its_help_and_its_default():
    properties = SCHEMA["properties"]
    assert {key.replace("-", "_") for key in properties} == set(KINDS)
    assert properties["lr"]["default"] == 3e-4 and properties["bf16"]["default"] is False and "default" not in properties["save"]
    assert properties["zero-stage"]["enum"] == [0, 1, 2, 3, None, "None"]
    assert properties["patch-size"]["description"].startswith("K, the patch size of the recipe's first stage")
    assert all(entry["description"] for entry in properties.values())


def test_every_key_of_a_stage_is_a_key():
    assert {key.replace("-", "_") for key in stage_schema()["properties"]} == {item.name for item in fields(StageSpec)}


def test_unknown_keys_are_not_valid_and_those_of_megatron_are():
    schema = SCHEMA
    assert not accepts(schema, {"num_layer": 2}) and not accepts(schema, {"zero-stages": 1})
    assert all(
        accepts(schema, {key: 1}) and accepts(schema, {key.replace("-", "_"): 1})
        for key in MEGATRON_FLAGS
        if key.replace("-", "_") not in KINDS
    )


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_the_files_of_the_repository_are_valid(path):
    for load in (load_yaml, yaml.safe_load):
        training = {key: value for key, value in load(path.read_text()).items() if key != "study"}  # that section is for study.py
        assert accepts(SCHEMA, training), training


def test_the_program_writes_the_schema(tmp_path, capsys):
    program.main(["--output", str(tmp_path / "megatron_patch.schema.json")])
    program.main([])
    text = capsys.readouterr().out
    assert text == (tmp_path / "megatron_patch.schema.json").read_text() and json.loads(text) == config_schema()
    with pytest.raises(ConfigError, match="--output .*missing"):
        program.main(["--output", str(tmp_path / "missing" / "x.json")])
