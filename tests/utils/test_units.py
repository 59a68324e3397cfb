"""Counts and durations as people write them, against decimal arithmetic done here."""

from __future__ import annotations

import contextlib
import re
from decimal import Decimal

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from megatron_patch.errors import ConfigError
from megatron_patch.utils.units import format_count, format_duration, parse_count, plural

UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("4096", 4096),
        ("2M", 2_000_000),
        ("270B", 270_000_000_000),
        ("1.5k", 1500),
        (" 64 Ki ", 65536),
        ("1_000_000", 10**6),
        ("1,234,567", 1234567),
        ("1e9", 10**9),
        ("2.5E3", 2500),
        (".5k", 500),
        ("3e11", 3 * 10**11),
        (4096, 4096),
        (2e6, 2_000_000),
        (1e16, 10**16),
        (1e22, 10**22),
    ],
)
def test_counts_as_people_write_them(text, count):
    value = parse_count(text)
    assert value == count and type(value) is int


@given(st.decimals(0, 10**6, allow_nan=False, places=4), st.sampled_from(sorted(UNITS)), st.booleans(), st.sampled_from(["", " ", "  "]))
def test_a_fraction_times_its_unit_exactly_or_an_error(number, unit, upper, space):
    text = f"{number:f}{space}{unit.upper() if upper else unit.lower()}"
    exact = number * UNITS[unit]
    if exact == exact.to_integral_value():
        assert parse_count(text) == int(exact)
    else:
        with pytest.raises(ConfigError, match="not a whole number"):
            parse_count(text)


@given(st.integers(0, 10**18))
def test_whole_numbers_come_back_as_they_are(count):
    assert parse_count(count) == parse_count(str(count)) == parse_count(f"{count:,}") == parse_count(f"{count:_}") == count


@given(st.integers(0, 2**53))
def test_floats_that_are_whole_are_read_exactly(count):
    assert parse_count(float(count)) == count


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "-1",
        "+1",
        "2X",
        "MM",
        "k",
        "1.5",
        "1.0005k",
        "0.5",
        "1..5",
        "1.5.5",
        "0x10",
        "1e-3",
        "ten",
        "1 2",
        "inf",
        "nan",
        "1Kb",
        "２M",
        "2M\n3M",
        "1,5M",
        "1,2,3",
        "12,3456",
        ",5",
        "1_",
        "1__0",
        "9" * 5000,
        "9" * 400 + ".5",
    ],
)
def test_what_is_no_count_is_refused_with_its_text(text):
    with pytest.raises(ConfigError) as refusal:
        parse_count(text)
    assert repr(text)[:80] in str(refusal.value) and len(str(refusal.value)) < 300
    assert refusal.value.allowed and refusal.value.do


@pytest.mark.parametrize("value", [True, False, None, float("nan"), float("inf"), -1, -2.0, 0.5])
def test_values_of_yaml_that_are_no_count_are_refused(value):
    with pytest.raises(ConfigError):
        parse_count(value)


@given(st.text(max_size=12))
@example("1" * 12)
def test_any_text_is_a_count_or_a_config_error(text):
    with contextlib.suppress(ConfigError):
        assert parse_count(text) >= 0


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1k"),
        (1500, "1.5k"),
        (2_000_000, "2M"),
        (1_234_567, "1.23M"),
        (999_999, "1M"),
        (270_000_000_000, "270B"),
        (10**12, "1T"),
        (123_456 * 10**12, "123,456T"),
        (-1500, "-1.5k"),
        (0.25, "0.25"),
        (999.7, "1k"),
    ],
)
def test_counts_as_people_read_them(count, text):
    assert format_count(count) == text


@given(st.integers(1, 10**15))
@example(999_499)
@example(999_500)
@example(999_500_000)
@example(9_995)
@example(999_499_999_999_999)
@example(999_500_000_000_000)
def test_a_written_count_is_within_three_digits_of_the_truth(count):
    text = format_count(count)
    assert re.fullmatch(r"[\d,]+(\.\d+)?[kMBT]?", text)
    unit = text[-1] if text[-1].isalpha() else ""
    written = Decimal(text.removesuffix(unit).replace(",", "")) * UNITS[unit]
    assert abs(written - count) <= Decimal(count) * Decimal("0.0051")
    assume(count < 999_500_000_000_000)  # above it there is no larger unit to write it in
    digits = text.removesuffix(unit).replace(".", "").lstrip("0")
    assert len(digits) <= 3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (42, "42 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (2 * 3600 + 7 * 60, "2 h 07 min"),
        (4 * 86400 + 3 * 3600, "4 d 03 h"),
        (5190 * 86400, "5,190 d 00 h"),
        (float("inf"), "?"),
        (float("nan"), "?"),
    ],
)
def test_durations_as_people_read_them(seconds, text):
    assert format_duration(seconds) == text


@given(st.floats(0, 10**8))
def test_a_written_duration_is_within_its_smallest_unit(seconds):
    scale = {"s": 1, "min": 60, "h": 3600, "d": 86400}
    words = format_duration(seconds).split()
    written = sum(int(number.replace(",", "")) * scale[unit] for number, unit in zip(words[::2], words[1::2], strict=True))
    assert -0.5 <= seconds - written + 0.5 <= scale[words[-1]] + 0.5


@pytest.mark.parametrize(
    ("count", "words", "text"),
    [(1, ("step",), "1 step"), (0, ("step",), "0 steps"), (1200, ("step",), "1,200 steps"), (2, ("loss", "losses"), "2 losses")],
)
def test_counts_have_the_right_noun(count, words, text):
    assert plural(count, *words) == text
