"""A switch has exactly the effect of stopping a run and starting another one from its weights."""

from __future__ import annotations

import json

import pytest
import torch

from tests.distributed.runs import Run, command, train

COMMON = command("--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --lr 3e-3 --zero-stage 1 --shuffle-window-blocks 1")
PATCH = {"patch_size": 3, "steps": 12, "lr_warmup_tokens": 400}
TOKEN = {"patch_size": 1, "steps": 10, "lr_warmup_tokens": 400}


def stages(*entries):
    return ["--stages", json.dumps(entries)]


def test_a_reset_switch_equals_a_new_run_from_the_weights(tmp_path, corpus):
    whole = train(tmp_path / "whole", 2, COMMON, stages(PATCH, TOKEN), "--data-path", corpus)
    patch = train(tmp_path / "patch", 2, COMMON, stages(PATCH), "--block-tokens 48 --data-path", corpus)
    tokens = int(patch.values("tokens")[-1])
    token = train(
        tmp_path / "token",
        2,
        COMMON,
        stages(TOKEN),
        f"--block-tokens 48 --start-tokens {tokens} --finetune --load {tmp_path / 'patch'} --data-path",
        corpus,
    )
    assert whole.losses[:12] == patch.losses
    assert whole.losses[12:] == token.losses
    assert whole.values("lr")[12:] == pytest.approx(token.values("lr"))


def test_a_switch_that_keeps_optimizer_and_schedule_changes_nothing(tmp_path, corpus):
    once = train(tmp_path / "once", 2, COMMON, stages({"patch_size": 1, "steps": 20}), "--data-path", corpus)
    keep = {"patch_size": 1, "steps": 11, "optimizer": "keep", "lr_policy": "continue"}
    twice = train(tmp_path / "twice", 2, COMMON, stages({"patch_size": 1, "steps": 9}, keep), "--data-path", corpus)
    assert twice.losses == once.losses
    assert twice.values("lr") == once.values("lr")


def test_a_switch_to_another_accumulation_keeps_steps_complete(tmp_path, corpus):
    """Stage one has 9 steps of 6 micro-batches, stage two 4 micro-batches per step: 54 micro-batches are not a multiple of 4."""
    once = train(tmp_path / "once", 1, COMMON, stages({"patch_size": 1, "steps": 16}), "--data-path", corpus)
    other = {"patch_size": 1, "steps": 7, "micro_batch_size": 3, "optimizer": "keep", "lr_policy": "continue"}
    twice = train(tmp_path / "twice", 1, COMMON, stages({"patch_size": 1, "steps": 9}, other), "--data-path", corpus)
    assert twice.losses == pytest.approx(once.losses, rel=1e-5)
    assert twice.values("grad_norm") == pytest.approx(once.values("grad_norm"), rel=1e-4)


def test_policies_differ_and_eight_four_two_one_runs(tmp_path, corpus):
    def run(name: str, **policy: str) -> Run:
        entries = [
            {"patch_size": 8, "steps": 4, "position_weights": "power"},
            {"patch_size": 4, "steps": 4, "batch": "constant-positions", **policy},
            {"patch_size": 2, "steps": 4, "side": "input", **policy},
            {"patch_size": 2, "steps": 4, "side": "output", "anneal_share": 0.5, **policy},
            {"patch_size": 1, "steps": 4, **policy},
        ]
        return train(
            tmp_path / name,
            1,
            "--seq-length 16 --micro-batch-size 2 --global-batch-size 8 --lr 3e-3",
            stages(*entries),
            "--data-path",
            corpus,
        )

    losses = {
        "reset": run("reset", lr_policy="continue", optimizer="reset").losses,
        "keep": run("keep", lr_policy="continue", optimizer="keep").losses,
        "moments": run("moments", lr_policy="continue", optimizer="reset_moments").losses,
        "rewarm": run("rewarm", lr_policy="rewarm", lr_warmup_tokens="512", optimizer="keep").losses,
    }
    assert all(len(values) == 20 for values in losses.values())
    assert len({tuple(values) for values in losses.values()}) == 4, "each policy must have an effect"
    assert len({tuple(values[:5]) for values in losses.values()}) == 1, "no policy may have an effect before the first step after a switch"


def test_constant_tokens_lengthen_the_sequence_at_the_switch(tmp_path, corpus):
    plan = command("--seq-length 48 --sample constant-tokens --micro-batch-size 2 --global-batch-size 4 --patch-size 3 --train-tokens 4000")
    single = train(tmp_path / "single", 1, plan, "--zero-stage 0 --lr 3e-3 --eval-interval 3 --data-path", corpus)
    run = train(tmp_path / "run", 2, plan, "--zero-stage 3 --lr 3e-3 --eval-interval 3 --data-path", corpus)
    assert run.losses == pytest.approx(single.losses, rel=1e-5)
    assert len(run.records("switch")) == 1


def test_recomputation_and_documents_change_nothing_between_layouts(tmp_path, corpus):
    plan = command(
        "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 3 --train-tokens 2400 --lr 3e-3",
        "--eod-token-id 63 --reset-attention-mask --reset-position-ids --eod-mask-loss",
    )
    single = train(tmp_path / "single", 1, plan, "--zero-stage 0 --data-path", corpus)
    full = train(tmp_path / "full", 2, plan, "--zero-stage 3 --recompute-granularity full --data-path", corpus)
    selective = train(tmp_path / "selective", 3, plan, "--zero-stage 1 --recompute-granularity selective --data-path", corpus)
    assert full.losses == pytest.approx(single.losses, rel=1e-5)
    assert selective.losses == pytest.approx(single.losses, rel=1e-5), "masked labels must be normalized over the global batch"
    plain = train(tmp_path / "plain", 1, plan[:-5], "--zero-stage 0 --data-path", corpus)
    assert plain.losses != pytest.approx(single.losses, rel=1e-3)


def test_a_reset_zeroes_moments_and_step_count(tmp_path):
    from megatron_patch.optimizers.state import ensure_state, set_step_count, step_count, zero_state

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    assert step_count(optimizer) == 0
    weight.grad = torch.ones(3)
    optimizer.step()
    optimizer.step()
    assert step_count(optimizer) == 2 and ensure_state(optimizer, weight)["exp_avg"].abs().sum() > 0
    zero_state(optimizer.state.values())
    assert step_count(optimizer) == 2 and ensure_state(optimizer, weight)["exp_avg"].abs().sum() == 0
    set_step_count(optimizer, 0)
    fresh = torch.nn.Parameter(weight.detach().clone())
    other = torch.optim.AdamW([fresh], lr=0.1, fused=True)
    fresh.grad = weight.grad.clone()
    optimizer.step()
    other.step()
    assert torch.equal(weight, fresh)


def test_aligned_documents_train_and_their_padding_is_not_scored(tmp_path):
    """Text is preprocessed with --patch-align 4; repeated end-of-document tokens are not scored."""
    from megatron_patch.data.corpus import TokenCorpus
    from megatron_patch.preprocess.encode import EncodeSettings
    from megatron_patch.preprocess.pipeline import preprocess

    lines = [json.dumps({"text": " ".join(str((i * j) % 60) for j in range(3 + i % 9))}) for i in range(600)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    made = preprocess(
        [str(tmp_path / "a.jsonl")], str(tmp_path / "a"), EncodeSettings("NullTokenizer", "64", append_eod=True, patch_align=4)
    )
    prefix = made.outputs[0]
    plan = "--seq-length 16 --micro-batch-size 2 --global-batch-size 8 --patch-size 4 --train-tokens 2000 --lr 3e-3 --eval-tokens 256"
    run = train(tmp_path / "run", 1, plan, "--reset-attention-mask --eod-mask-loss --log-token-spans --data-path", prefix)
    assert run.losses[-1] < run.losses[0]
    tokens = TokenCorpus([prefix]).read(0, TokenCorpus([prefix]).num_tokens)
    assert len(tokens) % 4 == 0 and (tokens.reshape(-1, 4)[:, -1] == 63).sum() == 600, "each document ends at the end of a patch"
