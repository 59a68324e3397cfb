"""A wrong --data-path is named as such, with the dataset that was probably meant; it is not a vocabulary that is unknown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_patch.cli import inspect_dataset
from megatron_patch.config.resolve import load_config
from megatron_patch.config.stage_spec import parse_blend
from megatron_patch.data.missing_dataset import check_datasets, missing_dataset, missing_datasets
from megatron_patch.errors import ConfigError, DataError
from megatron_patch.training.pretrain import main
from tests.data.streams import write_numbers

MODEL = (
    "--num-layers 1 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --micro-batch-size 1 --global-batch-size 2 --train-tokens 4200"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two datasets, the text of one of them, and other text."""
    (tmp_path / "data").mkdir()
    for name in ("web_text_document", "code_text_document"):
        write_numbers(tmp_path / "data" / name, 50)
    for name in ("web.jsonl", "books.jsonl.gz", "notes.md", "web_text_document.json"):
        (tmp_path / "data" / name).write_text("{}")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("word", "what", "do"),
    [
        ("data/wep_text_document", "data/wep_text_document.bin does not exist", "did you mean data/web_text_document"),
        ("data/web", "data/web.bin does not exist", "did you mean data/web_text_document"),
        ("data/wep", "data/wep.bin does not exist", "did you mean data/web_text_document?"),
        ("data/web.jsonl", "data/web.jsonl is a file, not a dataset", "give the dataset that was made of it: data/web_text_document"),
        (
            "data/books.jsonl.gz",
            "data/books.jsonl.gz is a file, not a dataset",
            "convert it: python tools/preprocess_data.py --input data/books.jsonl.gz --output-prefix data/books --tokenizer-type …",
        ),
        ("data/notes.md", "data/notes.md is a file, not a dataset", "give the prefix of a dataset"),
        ("data/web_text_document.json", "data/web_text_document.json is a file, not a dataset", "give the prefix: data/web_text_document"),
        (
            "data",
            "data is a folder, not a dataset",
            "give one of its datasets (data/code_text_document, data/web_text_document), or all as one corpus: 'data/*'",
        ),
        ("empty", "empty is a folder, not a dataset", "give a dataset; this folder has none"),
        (
            "date/web_text_document",
            "date/web_text_document.bin does not exist, because the folder date does not exist",
            "did you mean the folder data?",
        ),
        ("data/zzz", "data/zzz.bin does not exist", "the datasets there: data/code_text_document, data/web_text_document"),
        ("data/web_*_documents", "data/web_*_documents matches no dataset", "did you mean data/web_text_document"),
        ("@data/list", "@data/list cannot be read", "check the path"),
        ("nowhere", "nowhere.bin does not exist", "check the path, which begins at "),
    ],
)
def test_a_wrong_word_is_answered_with_what_is_there(folder, word, what, do):
    error = missing_dataset(word, "--data-path")
    assert error is not None and error.what.startswith(f"--data-path: {what}") and error.do.startswith(do)


def test_words_of_datasets_that_exist_are_not_questioned(folder):
    Path("list").write_text("data/web_text_document\n")
    for word in ("data/web_text_document", "data/web_text_document.bin", "data/web_text_document.idx", "data/*_document", "@list"):
        assert missing_dataset(word, "--data-path") is None
    Path("data/code_text_document.bin").unlink()
    assert missing_dataset("data/code_text_document", "--data-path") is None, "which of its files is missing, opening it says"


def test_all_wrong_words_are_named_at_once(folder):
    words = [("--data-path", "data/wep"), ("--data-path", "data/web_text_document"), ("--valid-data-path", "data")]
    assert len(missing_datasets(words)) == 2
    with pytest.raises(DataError, match=r"--data-path: data/wep\.bin(.|\n)*--valid-data-path: data is a folder"):
        check_datasets(words)
    with pytest.raises(DataError, match=r"^--data-path: data/wep\.bin"):
        check_datasets(words[:2])


@pytest.mark.parametrize("flags", [[], ["--vocab-size", "64"]])
def test_the_path_is_checked_before_the_vocabulary(folder, flags, capsys):
    """A metadata file of the first corpus, or --vocab-size, hides no missing one; of several ranks, one explains it."""
    assert main([*MODEL.split(), *flags, "--data-path", "data/web"]) == 3
    error = capsys.readouterr().err
    assert "--data-path: data/web.bin does not exist" in error and "did you mean data/web_text_document?" in error
    assert "vocabulary" not in error
    stages = "[{name: a, patch_size: 2, token_share: 0.5, data_path: data/cod}, {patch_size: 1}]"
    words = [
        *MODEL.split(),
        "--vocab-size",
        "64",
        "--data-path",
        "data/web_text_document",
        "--valid-data-path",
        "0.5",
        "data/we",
        "0.5",
        "x",
    ]
    Path("data/web_text_document.json").unlink()
    assert main([*words, "--stages", stages]) == 3
    error = capsys.readouterr().err
    for found in ("stage a: data_path: data/cod.bin does not exist", "--valid-data-path: data/we.bin does not exist", "x.bin"):
        assert found in error


def test_only_the_first_rank_explains_missing_data(folder, capsys, monkeypatch):
    for rank, local, shown in (("1", "1", ""), ("8", "0", "rank 8 on .*: DataError: --data-path: data/web.bin does not exist\n")):
        for name, value in (("RANK", rank), ("LOCAL_RANK", local), ("WORLD_SIZE", "16")):
            monkeypatch.setenv(name, value)
        assert main([*MODEL.split(), "--global-batch-size", "16", "--data-path", "data/web"]) == 3
        assert re.fullmatch(shown, capsys.readouterr().err)


def test_a_dry_run_needs_no_data_and_names_what_is_missing(folder, capsys):
    words = [*MODEL.split(), "--dry-run", "--data-path", "data/web", "--valid-data-path", "data/cod"]
    assert main(words) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Note --data-path: data/web.bin does not exist; did you mean data/web_text_document?" in text
    assert "Note --valid-data-path: data/cod.bin does not exist" in text
    assert main([*MODEL.split(), "--dry-run", "--data-path", "nowhere/*"]) == 0
    assert "nowhere/* matches no dataset" in capsys.readouterr().out


def test_a_dry_run_on_several_ranks_prints_once(folder, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main([*MODEL.split(), "--dry-run"]) == 0
        assert ("Stages" in capsys.readouterr().out) == (rank == "0")


def test_tools_answer_in_the_same_way(folder):
    with pytest.raises(DataError, match="did you mean data/web_text_document"):
        inspect_dataset.main(["data/web"])


def test_a_weight_is_no_dataset():
    for words in (["0.7"], ["0.7", "0.3"], ["0.7", "web", "0.3"]):
        with pytest.raises(ConfigError, match="not every prefix has a weight"):
            parse_blend(words)
    assert load_config([*MODEL.split(), "--dry-run", "--data-path", "1", "./2"], 1).blend == (("./2", 1.0),)
