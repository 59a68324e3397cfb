"""The JSON schema (draft 2020-12) of configuration files, for editors. Out: the schema as a value of JSON.

Every key, type, choice and default comes from `options` and `stage_spec`, so that the schema accepts what the program reads. Numbers are
checked for their form only; ranges, and combinations of keys, are checked by the program.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megatron_patch import __version__
from megatron_patch.config.help_texts import help_texts
from megatron_patch.config.megatron.translator import MEGATRON_FLAGS
from megatron_patch.config.options import Options
from megatron_patch.config.stage_spec import COUNTS, StageSpec
from megatron_patch.config.values import KINDS, WITH_COMMAS, Form, Kind

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_Schema = dict[str, Any]
_COUNT: _Schema = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "number", "minimum": 0, "multipleOf": 1},
        {"type": "string", "pattern": r"^\s*([0-9][0-9_,]*(\.[0-9]+)?|\.[0-9]+)([eE]\+?[0-9]{1,2})?\s*([kKmMbBgGtT][iI]?)?\s*$"},
    ]
}
_NUMBER: _Schema = {
    "anyOf": [
        {"type": "number"},
        # YAML 1.1 reads 1e-3, without a point, as a text.
        {"type": "string", "pattern": r"^\s*[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?\s*$"},
    ]
}
_INTEGER: _Schema = {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^[+-]?[0-9]+$"}]}
_DURATION = {
    "anyOf": [
        {"type": "number", "minimum": 0},
        {"type": "string", "pattern": r"^(\s*[0-9]+(\.[0-9]+)?\s*(d|h|min|m|s|)\s*)+$"},
    ]
}
_SCALAR: _Schema = {"type": ["string", "number"], "pattern": r"\S"}
_FORMS: dict[Form, _Schema] = {
    Form.SWITCH: {"type": "boolean"},
    Form.COUNT: _COUNT,
    Form.DURATION: _DURATION,
    Form.INTEGER: _INTEGER,
    Form.NUMBER: _NUMBER,
    Form.TEXT: _SCALAR,
    Form.TEXTS: {"anyOf": [_SCALAR, {"type": "array", "items": _SCALAR}]},
    Form.INTEGERS: {"anyOf": [*_INTEGER["anyOf"], {"type": "array", "items": _INTEGER}]},
}
_COMMAS = {"anyOf": [_SCALAR, {"type": "array", "items": _NUMBER}]}


def config_schema() -> _Schema:
    """Returns the schema. Keys may have underscores or dashes; null stands for the default."""
    properties: _Schema = {}
    defaults = _defaults()
    for name, text in help_texts().items():
        entry = _entry(name, text, defaults[name])
        for key in dict.fromkeys((name.replace("_", "-"), name)):
            properties[key] = entry
    return {
        "$schema": DRAFT,
        "title": f"Configuration of megatron_patch {__version__}",
        "description": "A file for --config: one option on each line. Flags on the command line override it.",
        "type": ["object", "null"],
        "properties": properties,
        "patternProperties": {_megatrons_names(properties): {"description": "A flag of Megatron; see docs/migrating.md."}},
        "additionalProperties": False,
    }


def _megatrons_names(own: _Schema) -> str:
    """Returns the pattern of keys in Megatron's words, which a file may have too."""
    names = sorted(MEGATRON_FLAGS.keys() - own.keys())
    return "^(" + "|".join(re.escape(name).replace(r"\-", "[-_]") for name in names) + ")$"


def _entry(name: str, text: str, default: Any) -> _Schema:
    """Returns the schema of one option."""
    result: _Schema = {"description": text}
    if default is not MISSING and default is not None:
        result["default"] = list(default) if isinstance(default, tuple) else default
    if name == "stages":
        return {**result, "anyOf": [{"type": "array", "minItems": 1, "items": stage_schema()}, {"type": "string"}, {"type": "null"}]}
    if name in WITH_COMMAS:
        return {**result, "anyOf": [*_COMMAS["anyOf"], {"type": "null"}]}
    return {**result, **_or_null(_of_kind(KINDS[name]))}


def _of_kind(kind: Kind) -> _Schema:
    return {"enum": [*kind.choices]} if kind.form is Form.CHOICE else _FORMS[kind.form]


def _or_null(schema: _Schema) -> _Schema:
    """Returns a schema that also accepts null, and the text None, which is the same."""
    none: Sequence[Any] = ({"type": "null"}, {"const": "None"})
    if "enum" in schema:
        return {"enum": [*schema["enum"], None, "None"]}
    return {"anyOf": [*schema.get("anyOf", [schema]), *none]}


def _defaults() -> _Schema:
    return {item.name: item.default for group in get_type_hints(Options).values() for item in fields(group)}


def stage_schema() -> _Schema:
    """Returns the schema of one entry of `stages:`."""
    hints, properties = get_type_hints(StageSpec), {}
    for item in fields(StageSpec):
        kinds = [kind for kind in (get_args(hints[item.name]) or (hints[item.name],)) if kind is not NoneType]
        if get_origin(hints[item.name]) is Literal:
            kinds = [hints[item.name]]
        entry = {"anyOf": [*_stage_value(item.name, kinds), {"type": "null"}]}
        for key in dict.fromkeys((item.name, item.name.replace("_", "-"))):
            properties[key] = entry
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _stage_value(name: str, kinds: Sequence[Any]) -> list[_Schema]:
    if name in COUNTS:
        return list(_COUNT["anyOf"])
    if name == "data_path":
        return [_SCALAR, {"type": "array", "minItems": 1, "items": _SCALAR}]
    if name == "position_weights":
        return [{"type": "string"}, {"type": "array", "items": _NUMBER}]
    result: list[_Schema] = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            result.append({"enum": list(get_args(kind))})
        else:
            result += list(_NUMBER["anyOf"]) if kind is float else [{"type": "string"}]
    return result
