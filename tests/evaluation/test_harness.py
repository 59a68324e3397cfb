"""Every kind of request and metric against the harness' Hugging Face model on the exported checkpoint, with local data."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest

from megatron_patch.convert.checkpoint_io import open_checkpoint
from megatron_patch.convert.to_hugging_face import to_hugging_face
from megatron_patch.engine.inference import load_model
from megatron_patch.errors import ConfigError, DataError
from megatron_patch.evaluation.harness import find_local_dataset, run_tasks
from megatron_patch.tokenizers.base import load_tokenizer
from tests.convert.models import make_checkpoint, make_tokenizer
from tests.distributed.ranks import run_ranks
from tests.model.shapes import LLAMA3
from tests.tools.test_tools import tool

TASKS = {
    "choices": {
        "dataset_path": "Someone/choices", "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "last_word": {
        "dataset_path": "Someone/words", "dataset_name": "de", "output_type": "loglikelihood", "test_split": "test",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}", "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}, {"metric": "acc"}],
    },
    "whole": {
        "dataset_path": "Someone/words", "dataset_name": "de", "output_type": "loglikelihood_rolling", "test_split": "test", "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "answer": {
        "dataset_path": "Someone/choices", "output_type": "generate_until", "test_split": "test", "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}", "generation_kwargs": {"until": ["t", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip
TEXTS = ["the cat sat on the mat", "the dog sat on the log and the cat sat on the log and the dog sat on the mat", "on the log", "cat dog"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Makes (checkpoint, model, tokenizer, folder of data, folder of tasks, exported checkpoint)."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = make_tokenizer(folder / "tokenizer", 280)
    info = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tokenizer)}
    path = make_checkpoint(folder / "ckpt", dataclasses.replace(LLAMA3, vocab_size=280, padded_vocab_size=384), data_metadata=info)
    to_hugging_face(open_checkpoint(str(path)), folder / "hf")
    (folder / "tasks").mkdir()
    for name, task in TASKS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps({"task": name, **task}))
    rows = [
        {"question": f"{text} and", "choices": [" the cat", " the dog sat", " mat"], "label": number % 3, "answer": "he ca"}
        for number, text in enumerate(TEXTS * 3)
    ]
    for place, lines in (("choices", rows), ("words/de", [{"text": text} for text in TEXTS])):
        (folder / "data" / "Someone" / place).mkdir(parents=True)
        (folder / "data" / "Someone" / place / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loaded = load_model(str(path))
    return path, loaded.model, load_tokenizer("HuggingFaceTokenizer", str(tokenizer)), folder / "data", folder / "tasks", folder / "hf"


@pytest.fixture(autouse=True)
def _only_our_tasks(monkeypatch):
    """Loads only the tasks of this test, because the harness needs long to read all of its own."""
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))


def test_every_task_gives_the_metrics_of_the_exported_model(world):
    """Multiple choice, log-likelihoods (also of texts longer than the model's positions), and generation with stop texts."""
    pytest.importorskip("accelerate")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from megatron_patch.evaluation.harness import _local_datasets_first, _numbers

    _, model, tokenizer, data, tasks, export = world
    found = run_tasks(model, tokenizer, list(TASKS), 32, 3, data, tasks)
    with _local_datasets_first(data):
        theirs = HFLM(pretrained=str(export), device="cpu", dtype="float32", batch_size=2, max_length=32)
        reference = simple_evaluate(
            theirs, tasks=list(TASKS), task_manager=TaskManager(include_path=str(tasks)), log_samples=False, bootstrap_iters=0
        )
    expected = {task: _numbers(values) for task, values in reference["results"].items()}
    assert found.keys() == expected.keys() == TASKS.keys()
    for task, metrics in expected.items():
        assert metrics and found[task] == pytest.approx(metrics, rel=1e-4), task
    assert found["whole"]["word_perplexity"] > 1 and 0 <= found["choices"]["acc"] <= 1


def test_answers_to_single_requests_are_those_of_the_harness_model(world):
    """Compares log-likelihoods and texts, as metrics could hide a difference; includes a context that is too long."""
    pytest.importorskip("accelerate")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from megatron_patch.evaluation.harness_model import HarnessModel

    _, model, tokenizer, _, _, export = world
    ours, theirs = (
        HarnessModel(model, tokenizer, 32, 2),
        HFLM(pretrained=str(export), device="cpu", dtype="float32", batch_size=1, max_length=32),
    )

    def ask(kind, arguments):
        requests = [Instance(kind, {}, pair, 0) for pair in arguments]
        return getattr(ours, kind)(requests), getattr(theirs, kind)(requests)

    pairs = [("the cat ", "sat"), ("", "the dog"), (TEXTS[1] * 3, " and the cat"), ("a", "b")]
    for (mine, greedy), (reference, their_greedy) in zip(*ask("loglikelihood", pairs), strict=True):
        assert mine == pytest.approx(reference, rel=1e-4) and greedy == their_greedy
    mine, reference = ask("loglikelihood_rolling", [(text,) for text in (TEXTS[0], TEXTS[1] * 4)])
    assert mine == pytest.approx(reference, rel=1e-4)
    stops = [{"until": ["e"], "max_gen_toks": 9, "do_sample": False}, {"until": ["\n\n"], "max_gen_toks": 14, "do_sample": False}]
    mine, reference = ask("generate_until", [(text, stop) for text in TEXTS for stop in stops])
    assert mine == reference and len(set(mine)) > 3


def _answers(path, tokenizer):
    """Runs in each of two ranks: answers of two replicas, and of one model that both ranks share."""
    import torch
    from lm_eval.api.instance import Instance

    from megatron_patch.engine.distributed import init_distributed
    from megatron_patch.engine.inference import load_distributed_model
    from megatron_patch.evaluation.harness_model import HarnessModel
    from megatron_patch.parallel.grid import Grid
    from megatron_patch.parallel.groups import make_groups

    device, found = init_distributed(), []
    for sizes in ((1, 1), (2, 1), (1, 2)):
        loaded = load_distributed_model(path, make_groups(Grid(torch.distributed.get_rank(), 2, *sizes)), device)
        found.append(_ask(HarnessModel(loaded.model, tokenizer, 32, 2, loaded.replicas), Instance))
    return found


def _ask(model, instance):
    stop = {"until": ["e"], "max_gen_toks": 9, "do_sample": False}
    pairs = {"loglikelihood": [(a, b) for a in TEXTS for b in (" the cat", " on")], "generate_until": [(text, stop) for text in TEXTS]}
    pairs["loglikelihood_rolling"] = [(text,) for text in TEXTS]
    return {kind: getattr(model, kind)([instance(kind, {}, pair, 0) for pair in found]) for kind, found in pairs.items()}


def test_two_ranks_give_the_answers_of_one_process(world, tmp_path):
    """Two replicas divide the requests, or two ranks share a model; every rank has every answer."""
    from lm_eval.api.instance import Instance

    from megatron_patch.evaluation.harness_model import HarnessModel

    path, model, tokenizer, _, _, _ = world
    expected = _ask(HarnessModel(model, tokenizer, 32, 2), Instance)
    for found in run_ranks(_answers, 2, tmp_path / "logs", str(path), tokenizer):
        for answers in found:
            assert answers["generate_until"] == expected["generate_until"]
            assert answers["loglikelihood_rolling"] == pytest.approx(expected["loglikelihood_rolling"], rel=1e-5)
            assert [greedy for _, greedy in answers["loglikelihood"]] == [greedy for _, greedy in expected["loglikelihood"]]
            assert [score for score, _ in answers["loglikelihood"]] == pytest.approx([s for s, _ in expected["loglikelihood"]], rel=1e-5)


def test_the_tool_runs_tasks_and_reports_what_is_missing(world, tmp_path):
    path, model, tokenizer, data, tasks, _ = world
    words = ("--load", path, "--task-path", tasks, "--seq-length", "32")
    result = json.loads(tool("evaluate", *words, "--task-data", data, "--tasks", "choices,last_word", "--limit", "5").splitlines()[-1])
    assert result["tasks"] == {
        task: pytest.approx(values)
        for task, values in run_tasks(model, tokenizer, ["choices", "last_word"], 32, 8, data, tasks, limit=5).items()
    }
    with pytest.raises(DataError, match=r"cannot read task data Someone/choices from .*or from the hub"):
        run_tasks(model, tokenizer, ["choices"], 32, 8, tmp_path, tasks)
    with pytest.raises(ConfigError, match="--tasks nonsense: unknown to lm-eval"):
        run_tasks(model, tokenizer, ["nonsense"], 32, 8, data, tasks)
    with pytest.raises(ConfigError, match="--task-data nowhere is not a folder"):
        run_tasks(model, tokenizer, ["choices"], 32, 8, Path("nowhere"), tasks)


def test_local_datasets_are_found_by_path_and_configuration(tmp_path):
    assert find_local_dataset(None, "a/b", None) is None and find_local_dataset(tmp_path, "a/b", None) is None
    (tmp_path / "a" / "b" / "de").mkdir(parents=True)
    assert find_local_dataset(tmp_path, "a/b", "de") == (str(tmp_path / "a/b/de"), None)
    assert find_local_dataset(tmp_path, "a/b", "en") == (str(tmp_path / "a/b"), None)
    (tmp_path / "a" / "b" / "README.md").write_text("---\nconfigs: []\n---\n")
    assert find_local_dataset(tmp_path, "a/b", "en") == (str(tmp_path / "a/b"), "en")


def test_without_the_harness_the_extra_is_named(monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"\[eval\]"):
        run_tasks(None, None, ["x"], 8, 1)
