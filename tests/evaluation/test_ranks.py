"""Evaluation and generation on several ranks give the numbers and the text of one process, in every layout."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys

import pytest

from tests.convert.models import SHAPES, make_checkpoint, make_tokenizer
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import ROOT, make_corpus

TEXTS = ["the cat sat on the mat and the dog sat on the log", "the dog", "a log on the mat on the log " * 3]
TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
LAYOUTS = {
    "TP2": (2, TP2, "qwen3"),
    "TP2, one group": (2, TP2, "one-group"),
    "PP2": (2, PP2, "gpt2"),
    "DP2": (2, [], "llama"),
    "TP2 PP2": (4, [*TP2, *PP2], "llama3-tied"),
    "PP2 DP2": (4, PP2, "gpt2-untied"),
}


def _tool(name, argv):
    """Runs a tool in a rank; its output goes to the log of the rank."""
    sys.path.insert(0, str(ROOT / "tools"))
    importlib.import_module(name).main([str(word) for word in argv])


def ask(name, ranks, logs, *argv):
    """Returns the lines that rank 0 printed; the others must have printed nothing."""
    run_ranks(_tool, ranks, logs, name, argv)
    printed = [(logs / f"rank-{rank}.log").read_text() for rank in range(ranks)]
    lines = [[line for line in text.splitlines() if line.startswith("{")] for text in printed]
    assert not any(lines[1:]), "one rank answers for all"
    return [json.loads(line) for line in lines[0]]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Makes (checkpoint by family, tokens, text); the vocabulary size is not a multiple of two."""
    folder = tmp_path_factory.mktemp("ranks")
    info = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(make_tokenizer(folder / "tokenizer", 280))}
    checkpoints = {
        name: make_checkpoint(folder / name, dataclasses.replace(SHAPES[name], vocab_size=280, padded_vocab_size=281), data_metadata=info)
        for _, _, name in LAYOUTS.values()
    }
    with (folder / "t.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    return checkpoints, make_corpus(folder / "walks", documents=12), folder / "t.jsonl"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_numbers_of_one_process(layout, world, tmp_path):
    ranks, words, name = LAYOUTS[layout]
    checkpoints, corpus, text = world
    load = ("--load", checkpoints[name], "--seq-length", 8, "--micro-batch-size", 2)
    for number, more in enumerate([("--data-path", corpus, "--patch-size", 3), ("--text", text, "--overlap", 3)]):
        (alone,) = ask("evaluate", 1, tmp_path / f"alone-{number}", *load, *more)
        (together,) = ask("evaluate", ranks, tmp_path / f"together-{number}", *load, *more, *words)
        assert together == {name: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value for name, value in alone.items()}
        assert alone["tokens"] > 30


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "DP" not in name])
@pytest.mark.parametrize("temperature", [0, 1])
def test_every_layout_generates_the_text_of_one_process(layout, temperature, world, tmp_path):
    ranks, words, name = LAYOUTS[layout]
    prompts = [word for prompt in ("the cat", "on", "the dog sat on the") for word in ("--prompt", prompt)]
    argv = ("--load", world[0][name], "--max-new-tokens", 9, "--temperature", temperature, "--json", *prompts)
    alone = ask("generate", 1, tmp_path / "alone", *argv)
    assert ask("generate", ranks, tmp_path / "together", *argv, *words) == alone and len(alone) == 3


def test_ranks_that_do_not_fit_are_refused(world, tmp_path):
    load = ("--load", world[0]["llama"])
    for name, ranks, words, text in (
        ("evaluate", 1, [*TP2, "--data-path", world[1]], "1 rank with tensor-parallel size 2"),
        (
            "evaluate",
            2,
            ["--pipeline-model-parallel-size", "3", "--data-path", world[1]],
            "2 ranks with tensor-parallel size 1 and pipeline-parallel size 3",
        ),
        ("generate", 2, [], "2 ranks for --tensor-model-parallel-size 1"),
    ):
        with pytest.raises(RuntimeError, match=text):
            run_ranks(_tool, ranks, tmp_path / name, name, (*load, *words))
