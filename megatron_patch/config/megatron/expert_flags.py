"""The table of Megatron's flags of mixtures of experts. Only data; `experts` has the functions of those that depend on others.

In: nothing. Out: `EXPERTS`, a part of the long tail.
"""

from __future__ import annotations

from megatron_patch.config.megatron.flags import BOTH, DS, LM, Kind, MegatronFlag, rows

_SAME, _VALUES, _IGNORED, _REFUSED, _OTHER, _DETAIL = (
    *(Kind.SAME, Kind.VALUES, Kind.IGNORED, Kind.REFUSED),
    *(Kind.OTHER_MODEL, Kind.DETAIL),
)
_MOE = "Mixture of experts"

EXPERTS: tuple[MegatronFlag, ...] = (
    *rows(
        _MOE,
        "num-experts/n",
        BOTH,
        _VALUES,
        "the number of experts of a block, as in Megatron-LM; 1 is an ordinary feed-forward layer; Megatron-DeepSpeed's experts, also in a "
        "list, have a capacity and drop tokens: another model",
        "",
        "1",
    ),
    *rows(
        _MOE,
        "moe-ffn-hidden-size moe-router-topk moe-layer-freq moe-shared-expert-intermediate-size moe-router-pre-softmax/0 "
        "moe-router-topk-scaling-factor moe-router-enable-expert-bias/0 moe-router-bias-update-rate moe-z-loss-coeff",
        LM,
        _SAME,
        "the same",
    ),
    *rows(
        _MOE,
        "moe-router-score-function",
        LM,
        _VALUES,
        "softmax or sigmoid; Megatron does not divide the sigmoid of a single expert by itself, which is refused",
    ),
    *rows(
        _MOE,
        "moe-router-load-balancing-type/n",
        LM,
        _VALUES,
        "global_aux_loss or none; aux_loss, Megatron's default, is none without a coefficient; with one, aux_loss and seq_aux_loss are "
        "refused, since results would depend on the micro-batch size, and so is sinkhorn",
    ),
    *rows(_MOE, "moe-aux-loss-coeff/n", LM, _VALUES, "the coefficient of global_aux_loss; 0 if it is not given, as in Megatron"),
    *rows(
        _MOE,
        "moe-grouped-gemm/0 moe-use-legacy-grouped-gemm/0 moe-permute-fusion/0 moe-router-fusion/0 moe-router-padding-for-fp8/0 "
        "moe-pad-experts-for-cuda-graph-inference/0",
        LM,
        _IGNORED,
        "the program and PyTorch choose the kernels",
    ),
    *rows(
        _MOE,
        "moe-token-dispatcher-type moe-enable-deepep/0 moe-deepep-num-sms moe-shared-expert-overlap/0 overlap-moe-expert-parallel-comm/0 "
        "delay-wgrad-compute/0",
        LM,
        _IGNORED,
        "ranks send positions by an all-to-all, in messages as long as the choices make them",
    ),
    *rows(_MOE, "moe-per-layer-logging/0", LM, _IGNORED, "the load of each block's experts is always in SAVE/metrics.jsonl"),
    *rows(_MOE, "moe-router-dtype", LM, _REFUSED, "routers compute in float32", "", "fp32"),
    *rows(
        _MOE,
        "expert-model-parallel-size",
        LM,
        _SAME,
        "the same, among neighboring data-parallel ranks; tensor-parallel ranks hold different experts, too",
    ),
    *rows(
        _MOE,
        "expert-tensor-parallel-size",
        LM,
        _REFUSED,
        "tensor-parallel ranks hold different experts, each of them whole",
        "",
        "1",
    ),
    *rows(_MOE, "moe-extended-tp/0", LM, _REFUSED, "tensor-parallel ranks hold different experts, each of them whole"),
    *rows(
        _MOE,
        "moe-expert-capacity-factor moe-pad-expert-input-to-capacity/0",
        LM,
        _REFUSED,
        "experts have no capacity: no position is dropped or padded",
    ),
    *rows(_MOE, "moe-token-drop-policy", LM, _REFUSED, "no position is dropped", "", ("probs", "position")),
    *rows(
        _MOE,
        "moe-router-num-groups moe-router-group-topk",
        LM,
        _REFUSED,
        "a position chooses among all experts, not among groups of them",
        "",
        "1",
    ),
    *rows(_MOE, "moe-input-jitter-eps", LM, _REFUSED, "the router's input has no noise", "", "0"),
    *rows(_MOE, "moe-router-force-load-balancing/0", LM, _REFUSED, "experts are chosen by the router, never at random"),
    *rows(
        _MOE,
        "moe-use-upcycling/0 moe-upcycling-granularity",
        LM,
        _REFUSED,
        "experts are not made of a dense model's feed-forward layers",
    ),
    *rows(_MOE, "moe-apply-probs-on-input/0", LM, _REFUSED, "weights are factors of what experts return, not of their input"),
    *rows(_MOE, "moe-layer-recompute/0", LM, _REFUSED, "whole blocks or attention are recomputed", "--recompute-granularity full"),
    *rows(_MOE, "num-experts-switch", DS, _OTHER, "Megatron-DeepSpeed's experts have a capacity and drop tokens"),
    *rows(
        _MOE,
        "mlp-type topk expert-interval disable-moe-token-dropping/0 moe-train-capacity-factor moe-eval-capacity-factor moe-min-capacity "
        "moe-loss-coeff create-moe-param-group/0 disable-moe-top2-2nd-expert-sampling/0 use-tutel/0 enable-expert-tensor-parallelism/0 "
        "moe-expert-parallel-size",
        DS,
        _DETAIL,
        "belongs to Megatron-DeepSpeed's mixture of experts",
        "num-experts",
    ),
)
