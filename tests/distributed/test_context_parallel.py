"""Ranks that share the positions of samples give what one process gives, in every layout, also where their number changes at the switch."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_patch.data.collate import PatchBatch
from megatron_patch.errors import ConfigError
from megatron_patch.model.gpt import GPTModel
from megatron_patch.ops import IGNORE_INDEX
from megatron_patch.parallel.context import ContextParallel
from megatron_patch.parallel.grid import Grid
from tests.distributed.gradients import float16_program
from tests.distributed.matrix import MODELS as MATRIX_MODELS
from tests.distributed.matrix import stages_with_context
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import DATA, MODEL, Run, command, ledger, start_program, train
from tests.distributed.test_compiled import _graphs
from tests.distributed.test_documents import dense_runs, differences
from tests.faults.test_sick_steps import events, poisoned
from tests.model.shapes import GPT2
from tests.oracle.reference_muon import start_with_reference

BATCH = "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 4 --lr 3e-3"
PLAN = f"{BATCH} --num-layers 3 --train-tokens 2304 --eval-interval 4 --log-token-spans --eod-token-id 63 --reset-attention-mask"
MODELS = MATRIX_MODELS | {
    "three heads": "--num-attention-heads 3 --num-query-groups 3 --kv-channels 8 --window-size 5,0 --window-attn-skip-freq 3"
}
"""Two ranks cannot share three heads, so they gather keys and values."""
LENGTHS = {"positions": "", "tokens": "--sample constant-tokens --reset-position-ids --eod-mask-loss"}
TENSOR, PIPELINE = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
GATHER = "--cp-comm-type all_gather"
CHECKED = "--check-replicas-interval 3 --replay-interval 5"


@pytest.fixture(scope="module")
def dense(tmp_path_factory, corpus):
    """Returns a function of further words that returns the run of one process with dense masks; each is trained at its first use."""
    return dense_runs(tmp_path_factory, corpus, PLAN)


def equal_counts(run, single, corpus):
    """Checks that what several ranks share is counted once."""
    assert run.values("tokens") == single.values("tokens") and len({record["patch_size"] for record in run.records("step")}) == 2
    assert [record["eval_tokens"] for record in run.records("evaluation")] == [one["eval_tokens"] for one in single.records("evaluation")]
    assert np.array_equal(ledger(run, corpus), ledger(single, corpus)), "each sample is in one span log"


@pytest.mark.parametrize(
    ("ranks", "sizes", "length", "model", "layout"),
    [
        (2, (1, 2), "tokens", "llama", "--zero-stage 3 --recompute-granularity full --replay-interval 5"),
        (4, (4, 2), "positions", "qwen3, one group", f"--zero-stage 2 {CHECKED}"),
        (4, (2, 1), "tokens", "windows", f"--zero-stage 1 {TENSOR} --sequence-parallel --recompute-granularity selective {CHECKED}"),
        (4, (1, 2), "positions", "gpt2", f"--zero-stage 0 {PIPELINE} {CHECKED}"),
        (2, (1, 2), "tokens", "three heads", "--zero-stage 1 --recompute-granularity selective"),
        pytest.param(4, (4, 2), "positions", "three heads", "--zero-stage 3 --replay-interval 5", marks=pytest.mark.slow),
        pytest.param(4, (1, 2), "tokens", "windows", f"{GATHER} {TENSOR} --sequence-parallel", marks=pytest.mark.slow),
        pytest.param(4, (2, 1), "tokens", "qwen3, one group", f"{GATHER} {PIPELINE} --zero-stage 0", marks=pytest.mark.slow),
        pytest.param(4, (4, 2), "tokens", "gpt2", f"{GATHER} --zero-stage 2 --recompute-granularity full", marks=pytest.mark.slow),
        pytest.param(4, (2, 2), "tokens", "weighted labels", f"--zero-stage 3 {TENSOR}", marks=pytest.mark.slow),
        pytest.param(4, (1, 2), "tokens", "windows", f"--zero-stage 1 {PIPELINE} --recompute-granularity full", marks=pytest.mark.slow),
        pytest.param(4, (1, 4), "tokens", "tied", "--zero-stage 3 --micro-batch-size 1", marks=pytest.mark.slow),
    ],
)
def test_a_layout_equals_one_process_with_a_dense_mask(tmp_path, corpus, dense, ranks, sizes, length, model, layout):
    words = f"{MODELS[model]} {LENGTHS[length]}"
    run = train(tmp_path / "run", ranks, PLAN, words, layout, stages_with_context(*sizes), "--data-path", corpus)
    single = dense(words)
    found = differences(run, single)
    assert max(found.values()) < 1e-5, found
    equal_counts(run, single, corpus)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "main"), [("--bf16 --zero-stage 2", start_program), ("--fp16 --loss-scale 1024 --zero-stage 1", float16_program)]
)
def test_16_bits_differ_by_rounding(tmp_path, corpus, dense, words, main):
    words = f"{LENGTHS['tokens']} {words}"
    run = train(tmp_path / "run", 2, PLAN, words, stages_with_context(1, 2), "--data-path", corpus, main=main)
    single = dense(f"{MODELS['llama']} {LENGTHS['tokens']}")
    assert run.losses == pytest.approx(single.losses, rel=1e-3) and run.losses != pytest.approx(single.losses, rel=1e-6)


@pytest.mark.slow
def test_muon_steps_as_on_one_process(tmp_path, corpus):
    words = f"{PLAN} {LENGTHS['tokens']} --optimizer muon"
    single = train(tmp_path / "single", 1, words, "--zero-stage 0 --data-path", corpus, main=start_with_reference)
    run = train(tmp_path / "run", 2, words, "--zero-stage 2", stages_with_context(1, 2), "--data-path", corpus)
    assert max(differences(run, single).values()) < 1e-5


def test_compiled_blocks_share_positions(tmp_path, corpus, dense):
    """One unbroken graph for each number of positions of a rank, in training and in evaluation; in the patch stage also for K = 1."""
    plan = f"{PLAN} --sample constant-tokens --no-reset-attention-mask"
    plain = train(tmp_path / "plain", 2, plan, stages_with_context(1, 2), "--data-path", corpus)
    argv = command(MODEL, DATA, plan, stages_with_context(1, 2), "--compile --data-path", corpus, ["--save", str(tmp_path / "run")])
    found = run_ranks(_graphs, 2, tmp_path / "run-logs", argv)
    assert Run(tmp_path / "run").losses == pytest.approx(plain.losses, rel=1e-6)
    assert found == [(5, {})] * 2


def test_a_run_resumes_with_other_ranks_that_share_samples(tmp_path, corpus, dense):
    """Inside of the token stage, from 2 ranks with ZeRO 3 to 4 with ZeRO 1; later with a size that the flag gives."""
    words = LENGTHS["tokens"]
    first = "--zero-stage 3 --exit-interval 10"
    run = train(tmp_path / "run", 2, PLAN, words, first, stages_with_context(1, 2), "--data-path", corpus)
    assert {record["stage"] for record in run.records("step")} == {"patch", "token"} and len(run.losses) == 10
    run = train(tmp_path / "run", 4, PLAN, words, "--zero-stage 1 --context-parallel-size 4 --data-path", corpus)
    single = dense(f"{MODELS['llama']} {words}")
    assert len(run.losses) == len(single.losses) > 10
    assert max(differences(run, single).values()) < 2e-6
    equal_counts(run, single, corpus)


def test_a_rejected_step_goes_back_over_the_switch(tmp_path, corpus):
    """The checkpoint is of the stage before, in which every rank has all positions."""
    words = f"{BATCH} --on-spike rewind"
    single = poisoned(tmp_path / "single", 1, "loss", words, "--zero-stage 0 --data-path", corpus, steps=(34,))
    run = poisoned(tmp_path / "run", 2, "loss", words, stages_with_context(1, 2), "--zero-stage 2 --data-path", corpus, steps=(34,))
    for one in (single, run):
        (event,) = events(one, "rewind")
        assert event["step"] == 34 and event["to_step"] == 27
    assert max(differences(run, single).values()) < 2e-6


def _observed(argv):
    """Trains on labels of the second half of each sample; returns partitions and groups at the switch, and losses and logits after it."""
    from megatron_patch.data import loader
    from megatron_patch.engine.deepspeed_engine import DeepSpeedEngine
    from megatron_patch.engine.fragments import fragments
    from megatron_patch.training.trainer import Trainer

    make_batch, switch, check, found = loader.make_batch, DeepSpeedEngine.switch_stage, Trainer._check_consistency, {}

    def half(*arguments, **more):
        batch = make_batch(*arguments, **more)
        batch.labels[:, : batch.labels.shape[1] // 2] = IGNORE_INDEX
        return batch

    def held(engine):
        parts = fragments(engine._engine, engine._names, engine._shards, None, None)
        weights = [(part.name, part.start, part.numel, part.tensors["weight"]) for part in parts]
        digests = [hashlib.sha256(weight.numpy().tobytes()).hexdigest() for *_, weight in weights]
        places = [(name, start, numel, weight.data_ptr()) for name, start, numel, weight in weights]
        return places, digests, len(torch.distributed.distributed_c10d._world.pg_map)

    def observed_switch(self, stage):
        before = held(self)
        switch(self, stage)
        found["switch"] = before, held(self)

    def observed_check(self, micro_batches):
        if self.step == 9:
            found["local"] = self.engine.local_loss(micro_batches[0])
            found["logits"] = self.engine.logits(torch.arange(32).view(2, 16)).numpy()
            found["labels"] = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in micro_batches)
        return check(self, micro_batches)

    loader.make_batch, DeepSpeedEngine.switch_stage, Trainer._check_consistency = half, observed_switch, observed_check
    assert start_program(argv) == 0
    return found


@pytest.fixture(scope="module")
def observed(tmp_path_factory, corpus):
    """Returns (run, what was observed) of one process, and for each rank of two that share samples in the token stage, with ZeRO 1."""
    folder = tmp_path_factory.mktemp("observed")

    def run(name, ranks, words):
        argv = command(MODEL, DATA, PLAN, words, "--data-path", corpus, ["--save", str(folder / name)])
        return Run(folder / name), run_ranks(_observed, ranks, folder / f"{name}-logs", argv)

    return run("single", 1, "--zero-stage 0"), run("shared", 2, f"--zero-stage 1 {stages_with_context(1, 2)}")


def test_the_switch_changes_no_partition_and_creates_no_group(observed):
    _, (_, ranks) = observed
    for found in ranks:
        before, after = found["switch"]
        assert before == after
    assert ranks[0]["switch"][0][0] != ranks[1]["switch"][0][0], "each rank holds another part of the optimizer's state"


def test_a_rank_without_labels_adds_nothing(observed):
    (single, (alone,)), (run, ranks) = observed
    assert [found["labels"] for found in ranks] == [0, alone["labels"]] and alone["labels"] > 0
    assert max(differences(run, single).values()) < 2e-6


def test_the_loss_of_a_micro_batch_is_that_of_all_its_ranks(observed):
    (_, (alone,)), (_, ranks) = observed
    assert [found["local"] for found in ranks] == pytest.approx([alone["local"]] * 2, rel=1e-6) and ranks[0]["local"] == ranks[1]["local"]


def test_logits_are_computed_from_all_positions(observed):
    (_, (alone,)), (_, ranks) = observed
    for found in ranks:
        np.testing.assert_allclose(found["logits"], alone["logits"], rtol=1e-4, atol=1e-5)


def _attention(heads, size, groups, window, gathers):
    """Returns whether attention over shared heads or gathered keys, and its gradients, are those of one process: (to the bit, to 1e-6)."""
    from megatron_patch.ops.documents_attention import Documents, documents_attention, slice_documents, sliced_attention
    from megatron_patch.parallel.context import share_heads, share_positions
    from megatron_patch.parallel.groups import make_groups

    rank = torch.distributed.get_rank()
    context = make_groups(Grid(rank, torch.distributed.get_world_size()), [size], [size] if gathers else []).context_parallel(size)
    draw = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(2, count, 16, 8, generator=draw) for count in (heads, groups, groups))
    gradient = torch.randn(2, heads, 16, 8, generator=draw)
    bounds = torch.tensor([0, 5, 16, 19, 32], dtype=torch.int32)
    documents = Documents(bounds, bounds, torch.tensor(13))

    def attend(*tensors):
        if window is None:
            return F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
        return documents_attention(*tensors, documents, window)

    def attend_part(*tensors):
        if not gathers:
            return attend(*tensors)
        whole = documents if window is not None else Documents(samples, samples, torch.tensor(16))
        return sliced_attention(*tensors, slice_documents(whole, 16, context.rank, size), window)

    samples = torch.tensor([0, 16, 32], dtype=torch.int32)

    def part(tensor):
        return tensor.chunk(size, dim=2)[context.rank]

    whole = [tensor.requires_grad_() for tensor in (queries, keys, values)]
    own = [part(tensor).detach().requires_grad_() for tensor in whole]
    expected, found = attend(*whole), share_positions(attend_part(*share_heads(*own, context)), context)
    expected.backward(gradient)
    found.backward(part(gradient))
    pairs = [(found, part(expected)), *((mine.grad, part(all_of.grad)) for mine, all_of in zip(own, whole, strict=True))]
    return all(torch.equal(*pair) for pair in pairs), all(torch.allclose(*pair, rtol=1e-6, atol=1e-6) for pair in pairs)


def _attentions():
    from megatron_patch.engine.distributed import init_distributed

    init_distributed(1)
    cases = itertools.product((2, 4), (8, 4, 2, 1), (None, 4), (False, True))
    return {case: _attention(8, *case) for case in cases}


def test_attention_over_shared_heads_or_gathered_keys_is_that_of_one_process(tmp_path):
    """Of repeated key-value heads, and of gathered ones, gradients are sums in another order."""
    for found in run_ranks(_attentions, 4, tmp_path):
        for (size, groups, window, gathers), (equal, close) in found.items():
            assert equal if groups >= size and not gathers else close, (size, groups, window, gathers)


def _reads(flipped):
    """Returns the error of `check_batches` on two ranks that share samples, of which the second one reads another token."""
    from megatron_patch.engine.distributed import init_distributed
    from megatron_patch.errors import CorruptionError
    from megatron_patch.training.faults.consistency import check_batches

    init_distributed(1)
    rank = int(os.environ["RANK"])
    ids = torch.arange(32).view(2, 16, 1)
    if flipped and rank == 1:
        ids[1, 3] += 1  # which is in the other rank's part
    batch = PatchBatch(ids, ids + 1, None, None, ()).part(rank, 2)
    try:
        check_batches(Grid(rank, 2), [batch], 2)
    except CorruptionError as error:
        return error.what
    return ""


def test_ranks_that_share_samples_read_the_same_ones(tmp_path):
    assert run_ranks(_reads, 2, tmp_path / "same", False) == ["", ""]
    assert run_ranks(_reads, 2, tmp_path / "other", True) == ["rank 1 reads other samples than rank 0 of the same replica"] * 2


def test_parts_of_samples_may_not_exceed_the_learned_positions():
    model = GPTModel(dataclasses.replace(GPT2, max_positions=16))
    inputs = torch.zeros(1, 16, 1, dtype=torch.int64)
    with pytest.raises(ConfigError, match="a sample of 32 positions, but the model has 16 learned positions"):
        model(inputs, inputs, None, None, None, ContextParallel(1, 2, "unused"))
