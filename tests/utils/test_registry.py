"""Registries: an entry by its name, or an error that lists the names and suggests the nearest."""

from __future__ import annotations

import pytest

from megatron_patch.errors import ConfigError, DataError
from megatron_patch.utils.registry import lookup, suggestion

COLORS = {"red": 1, "green": 2, "DarkBlue": 3}


def test_a_registered_name_gives_its_entry():
    assert lookup(COLORS, "green", "--color") == 2


@pytest.mark.parametrize(("name", "do"), [("gren", "did you mean green?"), ("darkblue", "did you mean DarkBlue?"), ("#", "choose one")])
def test_an_unknown_name_lists_all_and_suggests_the_nearest(name, do):
    with pytest.raises(ConfigError) as error:
        lookup(COLORS, name, "--color")
    assert error.value.what == f"--color {name} is not a known name"
    assert error.value.allowed == "red, green, DarkBlue"
    assert error.value.do is not None and error.value.do.startswith(do)


def test_the_error_has_the_class_and_the_alternative_that_the_caller_names():
    with pytest.raises(DataError, match="Allowed: red, green, DarkBlue, or three numbers"):
        lookup(COLORS, "rouge", "--color", also="three numbers", error=DataError)


def test_several_names_are_suggested_where_several_are_near():
    assert suggestion("save_intervall", ["save_interval", "save_interval_tokens", "lr"]) == (
        "did you mean save_interval or save_interval_tokens?"
    )
    assert suggestion("x", ["save_interval"]) is None
