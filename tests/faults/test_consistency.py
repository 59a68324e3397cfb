"""Silent corruption on real ranks: a flipped bit in a weight, other samples on one rank, a device that computes differently."""

from __future__ import annotations

import functools
import os

import pytest
import torch

from megatron_patch.engine.replicas import checksum_of_bits
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import DATA, MODEL, command, printed

PLAN = "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 4 --train-tokens 4608 --lr 3e-3 --save-interval 4"


def _corrupted(argv, kind):
    from megatron_patch.data.loader import PatchLoader
    from megatron_patch.model.gpt import GPTModel
    from megatron_patch.training import trainer

    check, forward, next_step = trainer.Trainer._check_consistency, GPTModel.forward, PatchLoader.next_step
    rank = torch.distributed.get_rank

    def flip(self, micro_batches):
        if kind == "weight" and self.step == 9 and rank() == 1:
            parameter = dict(self.engine._names.items())
            (weight,) = [p for p, name in parameter.items() if name == "blocks.1.attention_norm.weight"]
            weight.data.view(-1)[3:4].view(torch.int32).bitwise_xor_(1)
        return check(self, micro_batches)

    def other(self):
        batches = next_step(self)
        if kind == "samples" and rank() == 1 and self.step == 6:
            batches[0].input_ids[0, 0, 0] ^= 1
        return batches

    def wrong(self, *arguments):
        result = forward(self, *arguments)
        if kind == "device" and rank() == 1 and not self.training:
            wrong.count += 1
            return result[0] + 1e-3 * (wrong.count % 2), result[1]
        return result

    wrong.count = 0
    trainer.Trainer._check_consistency, PatchLoader.next_step, GPTModel.forward = flip, other, wrong
    from megatron_patch.training.pretrain import main

    return main(argv)


def run(folder, corpus, kind, *words):
    argv = command(MODEL, DATA, PLAN, *words, "--data-path", corpus, ["--save", str(folder)])
    return run_ranks(functools.partial(_corrupted, kind=kind), 2, folder.parent / f"{folder.name}-logs", argv)


@pytest.mark.parametrize("layout", ["--zero-stage 0", "--zero-stage 2", "--tensor-model-parallel-size 2"])
def test_a_flipped_bit_of_a_weight_is_found_and_named(tmp_path, corpus, layout):
    assert run(tmp_path / "run", corpus, "weight", layout, "--check-replicas-interval 3") == [6, 6]
    assert "blocks.1.attention_norm.weight: rank 1 differs from rank 0" in printed(tmp_path / "run")
    assert (tmp_path / "run" / "latest").read_text().strip() == "step-00000008", "the previous checkpoint is kept"


def test_weights_that_differ_between_replicas_are_not_saved(tmp_path, corpus):
    """The bit flips between two checks: the checkpoint of step 12 is not written, however long the interval."""
    assert run(tmp_path / "run", corpus, "weight", "--zero-stage 0 --check-replicas-interval 1000") == [6, 6]
    assert (tmp_path / "run" / "latest").read_text().strip() == "step-00000008" and not list((tmp_path / "run").glob("step-*12"))


def _different(argv, kind):
    from megatron_patch.training.faults import consistency
    from megatron_patch.training.pretrain import main

    if os.environ["RANK"] == "1":
        program = consistency._program
        if kind == "code":
            consistency._program = lambda run: {**program(run), "the code of megatron_patch": "0"}
        else:
            argv = [*argv, "--clip-grad", "2"]
    return main(argv)


@pytest.mark.parametrize(("kind", "words"), [("code", "the code of megatron_patch is"), ("options", "option clip_grad is 1.0 and 2.0")])
def test_nodes_with_different_programs_do_not_train_together(tmp_path, corpus, kind, words):
    argv = command(MODEL, DATA, PLAN, "--data-path", corpus, ["--save", str(tmp_path / "run")])
    assert run_ranks(functools.partial(_different, kind=kind), 2, tmp_path / "run-logs", argv) == [6, 6]
    assert words in printed(tmp_path / "run") and "rank 1 on " in printed(tmp_path / "run")


@pytest.mark.parametrize("layout", ["--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"])
def test_other_samples_on_a_rank_of_a_replica_are_found(tmp_path, corpus, layout):
    assert run(tmp_path / "run", corpus, "samples", layout, "--check-replicas-interval 5") == [6, 6]
    assert "rank 1 reads other samples than rank 0" in printed(tmp_path / "run")


def test_a_device_that_computes_differently_is_found(tmp_path, corpus):
    assert run(tmp_path / "run", corpus, "device", "--zero-stage 1 --replay-interval 5") == [6, 6]
    assert "computed again" in printed(tmp_path / "run") and "burn-in test) of rank 1 on " in printed(tmp_path / "run")


def test_ranks_that_agree_pass(tmp_path, corpus):
    words = "--no-untie-embeddings-and-output-weights --pipeline-model-parallel-size 2 --check-replicas-interval 2 --replay-interval 3"
    assert run(tmp_path / "run", corpus, "none", words) == [0, 0]


def test_a_digest_depends_on_values_and_their_order():
    tensor = torch.randn(1000)
    assert (
        checksum_of_bits(tensor)
        == checksum_of_bits(tensor.clone().view(10, 100))
        == checksum_of_bits(tensor.view(10, 100).t().contiguous().t())
    )
    swapped = tensor.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    flipped = tensor.clone()
    flipped.view(torch.int32)[17] ^= 1
    assert (
        len({checksum_of_bits(tensor), checksum_of_bits(swapped), checksum_of_bits(flipped), checksum_of_bits(tensor.to(torch.bfloat16))})
        == 4
    )
