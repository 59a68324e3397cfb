"""Experts and their balance: every layout gives the results of one process, and checkpoints move between layouts."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_patch.config.resolve import load_config
from megatron_patch.engine.deepspeed_config import resolve_engine_config
from megatron_patch.engine.expert_balance import ExpertBalancer
from megatron_patch.engine.inference import load_model
from megatron_patch.errors import ConfigError
from megatron_patch.model.expert_balance import RouterBalance
from megatron_patch.model.gpt import GPTModel
from megatron_patch.parallel.grid import Grid
from megatron_patch.parallel.groups import make_groups
from megatron_patch.stages import ExpertBalance, Stage
from tests.distributed.matrix import MODELS, Combination, compare
from tests.distributed.matrix import PLAN as PARITY_PLAN
from tests.distributed.runs import MODEL, Run, train
from tests.model.test_experts import KINDS, shape_with

QUICK = [
    Combination(1, 1, 2, zero=3, model="sigmoid experts"),
    Combination(2, 1, 2, sequence=True, zero=1, model="experts"),
    Combination(1, 3, 1, zero=0, model="sigmoid experts", extra="--recompute-granularity full"),
    Combination(1, 1, 2, zero=2, model="experts", extra="--micro-batch-size 3", context=(1, 2)),
    Combination(2, 1, 1, zero=0, model="sigmoid experts", optimizer="muon"),
    Combination(1, 1, 2, zero=1, model="experts", extra="--bf16"),
    Combination(2, 1, 2, sequence=True, zero=1, model="experts", extra="--expert-model-parallel-size 2"),
    Combination(1, 2, 2, zero=0, model="sigmoid experts", extra="--expert-model-parallel-size 2"),
    Combination(1, 1, 4, zero=2, model="experts", extra="--expert-model-parallel-size 2"),
]
PLAN = "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 4 --train-tokens 4608 --lr 3e-3 --num-layers 3"
PLAN += f" --eval-interval 8 --moe-aux-loss-coeff 0.05 {MODELS['sigmoid experts']}"


@pytest.mark.parametrize("combination", QUICK, ids=str)
def test_a_layout_equals_one_process(tmp_path, references, combination):
    found = compare(combination, tmp_path / "run", references)
    assert found.steps >= 20 and found.within(combination), found


def start_unmarked(argv: list[str]) -> int:
    """Runs the program without the signs by which DeepSpeed knows experts."""
    from megatron_patch.engine import deepspeed_engine
    from megatron_patch.training.pretrain import main

    deepspeed_engine.mark_experts = lambda *_: None
    return main(argv)


def test_without_deepspeeds_signs_expert_parallelism_would_be_wrong(tmp_path, references, corpus):
    """The comparison sees it: DeepSpeed would add up the gradients of different experts, without an error."""
    combination = Combination(1, 1, 2, zero=1, model="experts", extra="--expert-model-parallel-size 2")
    words = (PARITY_PLAN, combination.reference, combination.words)
    run = train(tmp_path / "run", 2, *words, "--data-path", corpus, main=start_unmarked)
    single = references(combination.reference)
    assert run.losses[-1] != pytest.approx(single.losses[-1], rel=1e-4) and run.losses[-1] == pytest.approx(single.losses[-1], rel=0.1)


def states(run: Run) -> dict[str, torch.Tensor]:
    """Returns the loads and biases of a run's newest checkpoint."""
    return {name: tensor for name, tensor in load_model(str(run.folder)).model.state_dict().items() if ".balance." in name}


def test_weights_and_the_state_of_the_balance_move_over_layouts(tmp_path, corpus):
    unbroken = train(tmp_path / "unbroken", 1, PLAN, "--zero-stage 0 --data-path", corpus)
    moves = [
        (4, 2, "--zero-stage 3"),
        (15, 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        (17, 2, "--expert-model-parallel-size 2 --zero-stage 2"),
        (20, 4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"),
        (24, 4, "--expert-model-parallel-size 2 --zero-stage 1 --check-replicas-interval 1"),
    ]
    for stop, ranks, words in moves:
        run = train(tmp_path / "run", ranks, PLAN, words, f"--exit-interval {stop}", "--data-path", corpus)
    assert len(run.losses) == 24
    assert run.losses == pytest.approx(unbroken.losses, rel=1e-5)
    assert run.values("expert_load") == unbroken.values("expert_load")
    assert run.values("expert_blocks") == [[1, 2]] * 24
    expected, found = states(unbroken), states(run)
    assert sorted(found) == [f"blocks.{n}.feed_forward.router.balance.{name}" for n in (1, 2) for name in ("bias", "load")]
    for name, state in expected.items():
        assert torch.equal(found[name], state), name
        assert float(state.std()) > 0, "it has changed"


def test_only_a_step_that_is_taken_changes_the_state_of_the_balance():
    shape = shape_with(KINDS["sigmoid"])
    model = GPTModel(shape)
    balancer = ExpertBalancer(model, shape, make_groups(Grid(0, 1)), torch.device("cpu"))
    settings = ExpertBalance(aux_loss_coeff=0.1, z_loss_coeff=0.2, bias_update_rate=0.5)
    balancer.start_stage(Stage("s", 1, positions=4, micro_batch_size=1, global_batch_size=2, steps=1, expert_balance=settings))
    balances = [module for module in model.modules() if isinstance(module, RouterBalance)]
    counts, scores = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 4, 2], [0, 1, 2]]), torch.full((4, 6), 1 / 6)
    for taken in (False, True):
        balancer.start_step(scale=4.0)
        for balance in balances:
            assert balance.factors.tolist() == pytest.approx([0.1 * 6 * 4 / 8, 0.2 * 4 / 8])
            balance.count_choices(counts, scores)
        loads = balancer.finish_step(taken)
        assert [(load.block, load.largest, load.dead) for load in loads] == [(0, 2.0, 1), (1, 2.0, 1)]
        assert loads[0].entropy == pytest.approx(1.791759)
        for balance in balances:
            if not taken:
                assert balance.bias.tolist() == [0.0] * 6 and balance.load.tolist() == pytest.approx([1 / 6] * 6)
            assert balance.counts.tolist() == [0] * 6
    for balance in balances:  # 4, 3, 3, 1, 1 and 0 choices, of which the mean is 2
        assert balance.bias.tolist() == [-0.5, -0.5, -0.5, 0.5, 0.5, 0.5]
        expected = [0.9 / 6 + 0.1 * count / 12 for count in (4, 3, 3, 1, 1, 0)]
        assert balance.load.tolist() == pytest.approx(expected)


def config(*words: str):
    argv = [*MODEL, "--seq-length", "16", "--global-batch-size", "12", "--train-tokens", "4608", "--dry-run", *words]
    return load_config(argv, 1)


def test_stages_may_have_coefficients_of_their_own():
    stages = [{"patch_size": 4, "token_share": 0.5, "moe_aux_loss_coeff": 0.2, "moe_router_bias_update_rate": 0}, {"moe_z_loss_coeff": 0.1}]
    flags = ("--num-experts", "4", "--moe-router-enable-expert-bias", "--stages", json.dumps(stages))
    balances = [stage.expert_balance for stage in config(*flags).plan.stages]
    assert balances == [ExpertBalance(0.2, 0.0, 0.0), ExpertBalance(0.01, 0.1, 0.001)]


def test_without_the_auxiliary_loss_there_is_none():
    run = config("--num-experts", "4", "--moe-router-load-balancing-type", "none")
    assert run.plan.stages[0].expert_balance == ExpertBalance()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--moe-router-topk", "2", "--moe-z-loss-coeff", "0.1"), "--moe-router-topk, --moe-z-loss-coeff without --num-experts"),
        (("--num-experts", "4", "--moe-router-topk", "5"), "--moe-router-topk 5 of --num-experts 4"),
        (("--num-experts", "4", "--moe-router-topk", "1"), "would not learn from the loss"),
        (("--num-experts", "4", "--moe-layer-freq", "[1,1,1]"), "--moe-layer-freq .* a list of 3"),
        (("--num-experts", "4", "--moe-layer-freq", "[0,0]"), "not all"),
        (("--num-experts", "4", "--moe-aux-loss-coeff", "-1"), "--moe-aux-loss-coeff -1"),
        (("--num-experts", "4", "--moe-router-bias-update-rate", "0.1"), "without --moe-router-enable-expert-bias"),
        (("--num-experts", "4", "--moe-router-pre-softmax", "--moe-router-score-function", "sigmoid"), "--moe-router-pre-softmax with"),
        (("--num-experts", "4", "--moe-router-load-balancing-type", "none", "--moe-aux-loss-coeff", "0.1"), "0.1 with .* none"),
        (("--num-experts", "4", "--no-swiglu"), "--num-experts with GELU"),
        (("--stages", '[{"moe_aux_loss_coeff": 0.1}]'), "moe_aux_loss_coeff without --num-experts"),
        (("--num-experts", "4", "--stages", '[{"moe_router_bias_update_rate": 0.1}]'), "without --moe-router-enable-expert-bias"),
        (("--num-experts", "4", "--stages", '[{"moe_aux_loss_coeff": -0.1}]'), "entry 1: moe_aux_loss_coeff is -0.1"),
        (
            ("--num-experts", "4", "--moe-router-load-balancing-type", "none", "--stages", '[{"moe_aux_loss_coeff": 0.1}]'),
            "moe_aux_loss_coeff 0.1 with .* none",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(words, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        config(*words)


@pytest.mark.parametrize(
    ("ranks", "words", "message"),
    [
        (2, "--num-experts 3 --tensor-model-parallel-size 2", "--num-experts 3 does not divide into 2 tensor-parallel ranks"),
        (2, "--expert-model-parallel-size 2", "in a model without experts"),
        (2, "--num-experts 3 --expert-model-parallel-size 2", "--num-experts 3 with --expert-model-parallel-size 2"),
        (3, "--num-experts 4 --expert-model-parallel-size 2", "--expert-model-parallel-size 2 with 3 data-parallel ranks"),
        (4, "--num-experts 4 --expert-model-parallel-size 2 --pipeline-model-parallel-size 2 --moe-layer-freq [0,1]", "pipeline rank 0 of"),
        # The head alone is on the last rank; and two problems at once.
        (
            9,
            "--num-experts 5 --expert-model-parallel-size 2 --pipeline-model-parallel-size 3",
            "(?=.*a divisor of 3)(?=.*--num-experts 5)(?=.*of blocks without)",
        ),
    ],
)
def test_experts_that_ranks_cannot_share_are_refused(monkeypatch, ranks, words, message):
    monkeypatch.setenv("COLUMNS", "100")  # a table of several problems breaks its sentences at the width of the terminal
    argv = [*MODEL, "--seq-length", "16", "--global-batch-size", "18", "--train-tokens", "4608", "--dry-run", *words.split()]
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_config(argv, ranks)


def test_zero_3_with_expert_parallelism_is_refused():
    argv = [*MODEL, "--seq-length", "16", "--global-batch-size", "12", "--train-tokens", "4608", "--dry-run", "--num-experts", "4"]
    run = load_config([*argv, "--zero-stage", "3", "--expert-model-parallel-size", "2"], 2)
    with pytest.raises(ConfigError, match="--zero-stage 3 with --expert-model-parallel-size 2"):
        resolve_engine_config(run.options.engine, run.options.schedule, run.origins, run.plan, run.data_parallel_size)
