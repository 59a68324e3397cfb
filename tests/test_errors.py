"""The errors of users: three parts in one message, an exit code for each class, and nothing lost between processes."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.errors import CheckpointError, ConfigError, DataError, MegatronPatchError

ERRORS = (ConfigError, DataError, CheckpointError)
parts = st.one_of(st.none(), st.text(min_size=1))


@pytest.mark.parametrize("error", ERRORS)
def test_the_message_has_its_three_parts_in_order(error):
    message = str(error("--patch-size 3", allowed="a divisor of 2048", do="use --patch-size 4"))
    assert message.splitlines() == ["--patch-size 3", "  Allowed: a divisor of 2048", "  What to do: use --patch-size 4"]


def test_parts_that_are_not_given_leave_no_trace():
    assert str(DataError("no such file: a.bin")) == "no such file: a.bin"
    assert str(DataError("no such file: a.bin", do="run tools/preprocess_data.py")).splitlines() == [
        "no such file: a.bin",
        "  What to do: run tools/preprocess_data.py",
    ]


@given(st.sampled_from(ERRORS), st.text(), parts, parts)
def test_an_error_survives_the_way_between_processes(error, what, allowed, do):
    original = error(what, allowed=allowed, do=do)
    copy = pickle.loads(pickle.dumps(original))
    assert type(copy) is error
    assert (copy.what, copy.allowed, copy.do, str(copy)) == (what, allowed, do, str(original))


def test_scripts_can_tell_the_errors_apart_and_from_a_crash():
    codes = {error.exit_code for error in (*ERRORS, MegatronPatchError)}
    assert len(codes) == 4 and 0 not in codes
    assert all(issubclass(error, MegatronPatchError) for error in ERRORS)
    assert MegatronPatchError.exit_code == 1
