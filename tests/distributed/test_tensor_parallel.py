"""Layers shared by 2 and 4 ranks compute what one process computes, across the switch, with positions sharded or not."""

from __future__ import annotations

import pytest

from tests.distributed.runs import Run, train

PLAN = "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 4 --train-tokens 4608 --lr 3e-3 --lr-warmup-fraction 0.2"
SHORT = "--sample constant-tokens"
FAMILIES = {
    "llama": "",
    "tied": "--no-untie-embeddings-and-output-weights",
    "qwen3": "--model-family qwen3 --num-query-groups 1",
    "gpt2": "--model-family gpt2",
}


@pytest.fixture(scope="module")
def singles(tmp_path_factory, corpus):
    """One process' run of each kind, made when it is asked for."""
    runs: dict[str, Run] = {}

    def run(words: str) -> Run:
        if words not in runs:
            runs[words] = train(
                tmp_path_factory.mktemp("single") / "run", 1, PLAN, words, "--zero-stage 0 --eval-interval 5 --data-path", corpus
            )
        return runs[words]

    return run


def check(run: Run, single: Run) -> None:
    assert run.losses == pytest.approx(single.losses, rel=1e-5)
    assert run.values("grad_norm") == pytest.approx(single.values("grad_norm"), rel=1e-4)
    for mine, theirs in zip(run.records("evaluation"), single.records("evaluation"), strict=True):
        assert mine["token_loss"] == pytest.approx(theirs["token_loss"], rel=1e-5)
        assert mine["patch_loss"] == pytest.approx(theirs["patch_loss"], rel=1e-5)
        assert mine["eval_tokens"] == theirs["eval_tokens"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("ranks", "words"), [(2, ""), (2, "--sequence-parallel"), (4, "--sequence-parallel"), (4, "")])
def test_shared_layers_equal_one_process(tmp_path, corpus, singles, family, ranks, words):
    words += f" --tensor-model-parallel-size {ranks} --zero-stage 1"
    check(train(tmp_path / "run", ranks, PLAN, FAMILIES[family], words, "--eval-interval 5 --data-path", corpus), singles(FAMILIES[family]))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("words", ["", "--sequence-parallel"])
def test_shared_layers_under_every_zero_stage(tmp_path, corpus, singles, stage, words):
    words += f" --tensor-model-parallel-size 2 --zero-stage {stage} --recompute-granularity full"
    check(train(tmp_path / "run", 4, PLAN, words, "--eval-interval 5 --data-path", corpus), singles(""))


@pytest.mark.parametrize("words", ["--sequence-parallel", "--sequence-parallel --operators plain", "--operators plain"])
def test_samples_of_constant_tokens_change_the_number_of_positions(tmp_path, corpus, singles, words):
    words += f" --tensor-model-parallel-size 2 --zero-stage 2 {SHORT}"
    check(train(tmp_path / "run", 2, PLAN, words, "--eval-interval 5 --data-path", corpus), singles(SHORT))


def test_bfloat16_follows_its_float32_twin(tmp_path, corpus, singles):
    words = "--tensor-model-parallel-size 2 --sequence-parallel --zero-stage 1 --bf16"
    run = train(tmp_path / "run", 2, PLAN, words, "--eval-interval 5 --data-path", corpus)
    assert run.losses == pytest.approx(singles("").losses, rel=1e-2)
