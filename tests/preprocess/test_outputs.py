"""An --output-prefix that cannot be created is refused in a sentence; missing folders are created."""

from __future__ import annotations

import pytest

from megatron_patch.errors import DataError
from megatron_patch.preprocess.encode import EncodeSettings
from megatron_patch.preprocess.outputs import output_prefixes
from megatron_patch.preprocess.pipeline import preprocess


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "1", "b": "2"}\n')
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    return tmp_path


def run(prefix, **more):
    return preprocess(["a.jsonl"], prefix, EncodeSettings("NullTokenizer", None, vocab_size=10, **more))


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("file/x", "file: not a folder"),
        ("file/deeper/x", "file: not a folder"),
        ("link/x", "link: not a folder"),
        ("n" * 240, "n*_text_document.*: File name too long"),
        (("d" * 200 + "/") * 30 + "x", "d.*: File name too long"),
        ("/dev/null/x", "/dev/null: not a folder"),
        ("/proc/nothing/x", "/proc/nothing: No such file"),
        ("/proc/x", "/proc.*: No such file"),
    ],
)
def test_a_prefix_that_cannot_be_created_is_refused(here, prefix, words, resume):
    before = sorted(here.iterdir())
    with pytest.raises(DataError, match=rf"^--output-prefix .* cannot be created: ({words})[^\n]*\n.*Allowed.*\n.*another --output-prefix"):
        preprocess(["a.jsonl"], prefix, EncodeSettings("NullTokenizer", None, vocab_size=10), resume=resume)
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize("prefix", ["x", "new/deep/x", "folder/", "./a b/ü", "c\nd"])
def test_missing_folders_are_created(here, prefix):
    (output,) = run(prefix).outputs
    assert (here / f"{output}.bin").is_file() and output == f"{prefix}_text_document"


def test_a_key_never_changes_the_folder(here):
    (here / "a.jsonl").write_text('{"m/t": "1", "../../up": "2", "/abs": "3", "": "4", "x/../../t": "5"}\n')
    before = {path.name for path in here.iterdir()}
    summary = run("deep/x", keys=("m/t", "../../up", "/abs", "", "x/../../t"))
    assert summary.outputs == tuple(f"deep/x_{name}_document" for name in ("m_t", "______up", "_abs", "", "x_______t"))
    assert {path.name for path in here.iterdir()} == before | {"deep"} and not any(path.is_dir() for path in (here / "deep").iterdir())


def test_two_keys_never_write_the_same_files(here):
    for keys in (("a.b", "a_b"), ("text", "b", "text")):
        with pytest.raises(DataError, match=rf"--json-keys {keys[0]} and {keys[-1]} would both write x_.*\n.*Allowed.*\n.*What to do"):
            run("x", keys=keys)
    for keys in (("a/b", "a_b"), ("a.b", "a/b"), ("..", "//")):
        with pytest.raises(DataError, match="would both write x_"):
            run("x", keys=keys)
    assert output_prefixes("x", ("a.b", "ab")) == ["x_a_b_document", "x_ab_document"]
