"""A file that is one JSON document, not JSON lines, ends the run; a single such line further on is a bad line."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import subprocess
import sys

import pytest

from megatron_patch.errors import DataError
from megatron_patch.raw_text import first_lines, readers
from megatron_patch.raw_text.inputs import FileRange, shard_inputs
from megatron_patch.raw_text.parse_documents import parse_batch
from megatron_patch.raw_text.readers import read_batches

PACK = {"a.jsonl": bytes, "a [1].json": bytes, "a.jsonl.gz": gzip.compress, "a.json.bz2": bz2.compress, "-": bytes}
OBJECTS = [json.dumps({"text": f"{number}", "a": {"b": [1, "},"]}}) for number in range(9)]
LONG = json.dumps({"text": "x" * 9999})
OTHERS = {
    "one object a line": "[\n" + ",\n".join(OBJECTS) + "\n]\n",
    "after the bracket": "[" + ",\n".join(OBJECTS) + "]",
    "leading commas": "[" + "\n,".join(OBJECTS) + "\n]",
    "one line": json.dumps([json.loads(text) for text in OBJECTS]),
    "indented": json.dumps([json.loads(text) for text in OBJECTS], indent=2),
    "after blank lines": "\n \r\n" * 3000 + "[\r\n" + ",\r\n".join(OBJECTS) + "\r\n]\r\n",
    "without brackets": ",\n".join(OBJECTS),
    "without brackets, long": LONG + ", \n" + ",\n".join(OBJECTS),
    "without brackets, leading commas": "\n , ".join(OBJECTS),
    "without brackets, long, leading commas": LONG + "\n," + LONG,
    "objects over many lines": "\n".join(json.dumps(json.loads(text), indent=1) for text in OBJECTS),
}


def texts(parts):
    return [text for batch in read_batches(parts) for text in parse_batch(batch, ("text",)).columns[0]]


@pytest.mark.parametrize("size", [1, 1 << 20])
@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_that_is_no_json_lines_is_refused_and_the_command_converts_it(tmp_path, monkeypatch, kind, name, size):
    monkeypatch.setattr(readers, "BATCH_BYTES", size)
    data = b"\xef\xbb\xbf" * (size == 1) + OTHERS[kind].encode()
    path = tmp_path / name
    path.write_bytes(PACK[name](data))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    with pytest.raises(DataError, match=r"is not JSON lines: it (begins with \[|has ).*\n.*one object per line.*\n.*convert ") as error:
        texts([FileRange(name if name == "-" else str(path))])
    if name != "a [1].json" and name != "a.jsonl":
        assert " FILE > NEW.jsonl" in str(error.value)
    elif name == "a [1].json" and size > 1:
        command = str(error.value).split("convert it with ")[1].split(" > NEW")[0]
        if command.startswith("sed"):  # jq is not everywhere
            made = subprocess.run(command, shell=True, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
            assert [json.loads(line) for line in made.splitlines()] == [
                json.loads(text) for text in ([LONG] * ("long" in kind) + ([LONG] if kind.endswith("long, leading commas") else OBJECTS))
            ]
        for number in range(3):
            for part in shard_inputs([str(path)], number, 3):
                with pytest.raises(DataError, match="is not JSON lines"):
                    texts([part])


@pytest.mark.parametrize(
    "data",
    [
        "{object}\n[\n{object},\n]\n",
        "{object}\n[{object}]\n,{object}\n,{object}",
        '{{"text": "cut", "a": {{"b": 1}},\n{object}\n',
        "\n\n{object}\n{{\n,",
        ",\n{object}\n",
        "x" * 5000 + "\n,{object}",
        "{object} {object},\n",
        "{{}},x\n",
    ],
)
def test_a_bad_line_among_others_is_one_bad_line(tmp_path, monkeypatch, data):
    path = tmp_path / "a.jsonl"
    path.write_text(data.format(object=OBJECTS[0]))
    assert len(texts([FileRange(str(path))])) == sum(line == OBJECTS[0] for line in path.read_text().split("\n"))


def test_little_of_a_line_of_any_length_is_read(tmp_path, monkeypatch):
    sizes = []
    for data in (b"\0" * (1 << 20), b"[" + b" " * (1 << 20), b'{"text": "a"}\n' + b'{"text": ' * (1 << 17)):
        file = io.BytesIO(data)
        try:
            assert first_lines.judge_first_lines(file, "x") == first_lines.JUDGED_LINES
        except DataError:
            assert data.startswith(b"[")
        sizes.append(file.tell())
    assert max(sizes) < 1 << 14
