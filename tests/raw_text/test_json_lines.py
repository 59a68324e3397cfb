"""Which lines are documents, and what is said about the others. The reference is Python's json module."""

from __future__ import annotations

import json
import re

import pytest

from megatron_patch.raw_text.json_lines import key_paths, texts_of_line


def read(line, *keys):
    line = line.encode() if isinstance(line, str) else line
    return texts_of_line(memoryview(line), key_paths(keys or ("text",)))


@pytest.mark.parametrize(
    "other",
    [
        r'"\ud800"',
        r'"\udc00\ud800"',
        r'{"\udfff": ["\ud83d", {"a": "\ud83d\ude00\ude00"}]}',
        "NaN",
        "[-Infinity, 1e999, -1e999]",
        "1" * 5000,
        f"-{'9' * 400}",
        f"{'9' * 400}.5e-9999",
        "[" * 900 + "]" * 900,
        '{"text": "nested"}',
        "null",
    ],
)
def test_only_the_wanted_keys_are_judged(other):
    for line in (
        f'{{"other": {other}, "text": "né"}}',
        f' {{"text": "né", "other": {other}}}\r',
        f'{{"text": 1, "x": {other}, "text": "né"}}',
    ):
        assert read(line) == ("né",)
    document = json.loads(f'{{"other": {other.replace("1" * 5000, "1")}, "text": "né"}}')
    if not isinstance(document["other"], str):
        assert "key 'other' is " in read(f'{{"other": {other}, "text": "né"}}', "other")


def test_bytes_that_are_not_utf8_count_under_the_wanted_keys_only():
    line = b'{"a\xff": "caf\xe9", "text": "caf\xc3\xa9", "title": "caf\xe9", "half": "\\ud83d"}'
    assert read(line) == ("café",)
    assert read(line, "title") == "key 'title' is not UTF-8"
    assert read(b'{"text": "\xed\xa0\xbd\xed\xb8\x80"}') == "key 'text' is not UTF-8"
    assert read(r'{"text": "a\ud83db", "x": "é"}') == "key 'text' has half of a surrogate pair, which is no character"
    assert read(r'{"text": "a\ud83d\ude00b", "x": NaN}') == ("a😀b",)


def test_a_byte_order_mark_before_a_line_is_skipped_and_kept_inside_of_a_text():
    assert read('\ufeff{"text": "\ufeffa"}') == ("\ufeffa",)
    assert read("\ufeff") is None and read("\ufeff \r") is None and read("") is None and read(" \t\r") is None


@pytest.mark.parametrize(
    ("document", "key", "expected"),
    [
        ({"a.b": "literal", "a": {"b": "nested"}}, "a.b", ("literal",)),
        ({"a": {"b": "nested"}}, "a.b", ("nested",)),
        ({"a": {"b.c": "x"}}, "a.b.c", ("x",)),
        ({"a.b": {"c": "x"}, "a": {"b": {"c": "y"}}}, "a.b.c", ("x",)),
        ({"a.b": {"d": "x"}, "a": {"b": {"c": "y"}}}, "a.b.c", ("y",)),
        ({"a.b": 1, "a": {"b": "nested"}}, "a.b", "key 'a.b' is a number, not a string"),
        ({"a": "x"}, "a.b", "key 'a.b' is missing; the keys with text are a"),
        ({"": "x"}, "", ("x",)),
        ({".": "x", "": {"": "y"}}, ".", ("x",)),
    ],
)
def test_a_key_with_a_dot_is_literal_first_and_nested_second(document, key, expected):
    assert read(json.dumps(document), key) == expected


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "jq -c . FILE"),
        ("{\r", "jq -c . FILE"),
        ("[", r"JSON array.*jq -c '\.\[\]' FILE"),
        ('[{"text": "a"},', r"JSON array.*jq -c '\.\[\]' FILE"),
        ('  {"text": "a"},\r', r"JSON array.*jq -c '\.\[\]' FILE"),
        ('[{"text": "a"}]', r"^an array, not an object; .*jq -c '\.\[\]' FILE"),
        ('{"text": "a"} {"text": "b"}', "several objects.*jq -c . FILE"),
        ('{"text": "a"}\r{"text": "b"}', r"carriage returns only.*tr '\\r' '\\n'"),
        ('"a"', "^a string, not an object$"),
        ("5", "^a number, not an object$"),
        ("null", "^null, not an object$"),
        ('{"text": null}', "^key 'text' is null, not a string$"),
        ('{"text": ["a"]}', "^key 'text' is an array, not a string$"),
        ('{"text": {"a": "b"}}', "^key 'text' is an object, not a string$"),
        ('{"text": true}', "^key 'text' is true or false, not a string$"),
        (
            '{"content": "a", "meta": {"title": "t", "n": 1, "in.ner": {"x": "y"}}}',
            "keys with text are content, meta.title, meta.in.ner.x$",
        ),
        ('{"a": 1, "b": {"c": [], "d": {}}}', "missing; the keys are a, b.c, b.d$"),
        (
            '{"meta/text": "a", "": "b", "a b": "c", "..": "d", "t,u": "e", "it\'s": {"": "f"}}',
            r"""text are meta/text, '', 'a b', '\.\.', 't,u', "it's\."$""",
        ),
        ("{}", "missing; the object is empty$"),
        (r'{"a\n\ud800": "x", "é": "y"}', r"the keys with text are 'a\\n\\ud800', é$"),
        ('{"text": "a', r"^not valid JSON: Unterminated string starting at \(character 10\)$"),
        ("{'text': 'a'}", "property name enclosed in double quotes"),
        (b'{"text": "a", "x" \xff}', r"it is not UTF-8 \(byte 19\)$"),
        (b"\x1f\x8b\x08\0\0", r"looks like gzip \(.gz\): give the file that suffix"),
        (b"\x50\x2a\x4d\x18\x04\0\0\0abcd", r"looks like zstd \(.zst\): give the file that suffix"),
        (b"\x5f\x2a\x4d\x18\x04\0\0\0", r"looks like zstd \(.zst\): give the file that suffix"),
        (b"PAR1\x15\x04", r"looks like Parquet \(.parquet\): give the file"),
        (b"PK\x03\x04", "looks like a zip archive$"),
        ("[" * 99_999, "nested too deeply$"),
    ],
)
def test_the_reason_why_a_line_is_left_out(line, reason):
    found = read(line)
    assert isinstance(found, str) and re.search(reason, found), found


def test_a_list_of_keys_is_short():
    found = read(json.dumps({f"key{number}" + "x" * 1000: "a" for number in range(10_000)}))
    assert len(found) < 2000 and "key19" in found and "key20" not in found
    deep: dict = {}
    for _ in range(900):
        deep = {"a": deep}
    assert len(read(json.dumps(deep))) < 200
