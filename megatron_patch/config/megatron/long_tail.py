"""The table of Megatron's other flags: groups with one reason each. Only data; `table` has the flags that decide what is trained.

In: nothing. Out: `LONG_TAIL`.
"""

from __future__ import annotations

from megatron_patch.config.megatron.expert_flags import EXPERTS
from megatron_patch.config.megatron.flags import BIGSCIENCE, BOTH, DS, LM, Kind, MegatronFlag, rows

_IGNORED, _REFUSED, _OTHER, _DETAIL = Kind.IGNORED, Kind.REFUSED, Kind.OTHER_MODEL, Kind.DETAIL
_SPEED = "Kernels, communication and memory of the process"
_LOGS = "Details of logs, profiles and restarts"
_ELSE = "Other models and programs"

LONG_TAIL: tuple[MegatronFlag, ...] = (
    *rows(
        _SPEED,
        "attention-backend transformer-impl use-mcore-models/0 use-legacy-models/0 no-rope-fusion/0 no-bias-swiglu-fusion/0 "
        "cross-entropy-loss-fusion/0 cross-entropy-fusion-impl use-fused-weighted-squared-relu/0 "
        "use-te-activation-func/0 te-rng-tracker/0 "
        "deterministic-mode/0 enable-cuda-graph/0 cuda-graph-warmup-steps external-cuda-graph/0 cuda-graph-impl cuda-graph-scope "
        "no-clone-scatter-output-in-embedding/0 enable-experimental/0",
        LM,
        _IGNORED,
        "the program and PyTorch choose the kernels",
    ),
    *rows(
        _SPEED,
        "use-flash-attn/0 no-masked-softmax-fusion/0 no-bias-gelu-fusion/0 no-bias-dropout-fusion/0 no-persist-layer-norm/0 "
        "no-gradient-accumulation-fusion/0 no-async-tensor-model-parallel-allreduce/0 onnx-safe",
        BOTH,
        _IGNORED,
        "the program and PyTorch choose the kernels",
    ),
    *rows(
        _SPEED,
        "use-flash-attn-v1/0 use-flash-attn-v2/0 use-flash-attn-triton/0 use-flash-attn-builder/0 disable-mem-efficient-ln/0",
        DS,
        _IGNORED,
        "the program and PyTorch choose the kernels",
    ),
    *rows(_SPEED, "abort-on-unmet-fused-kernel-constraints/0", BIGSCIENCE, _IGNORED, "the program and PyTorch choose the kernels"),
    *rows(
        _SPEED,
        "tp-comm-overlap/0 tp-comm-overlap-cfg disable-tp-comm-overlap-ag/0 disable-tp-comm-overlap-rs/0 tp-comm-overlap-rs-dgrad/0 "
        "disable-tp-comm-bulk-dgrad/0 disable-tp-comm-bulk-wgrad/0 disable-tp-comm-split-ag/0 disable-tp-comm-split-rs/0 "
        "tp-comm-bootstrap-backend overlap-grad-reduce/0 overlap-param-gather/0 overlap-param-gather-with-optimizer-step/0 "
        "no-align-grad-reduce/0 no-align-param-gather/0 defer-embedding-wgrad-compute/0 wgrad-deferral-limit ddp-num-buckets "
        "ddp-bucket-size ddp-pad-buckets-for-high-nccl-busbw/0 ddp-reduce-scatter-with-fp32-accumulation/0 ddp-average-in-collective/0 "
        "no-overlap-p2p-communication/0 overlap-p2p-communication-warmup-flush/0 pipeline-model-parallel-comm-backend "
        "high-priority-stream-groups/n use-nccl-ub/0 disable-symmetric-registration/0 use-sharp/0 sharp-enabled-group "
        "init-model-with-meta-device/0 no-gradient-reduce-div-fusion/0 fsdp-double-buffer/0 suggested-communication-unit-size "
        "enable-full-sharding-in-hsdp/0 num-distributed-optimizer-instances nccl-communicator-config-path use-tp-pp-dp-mapping/0 "
        "disable-gloo-process-groups/0 train-sync-interval dump-param-to-param-group-map",
        LM,
        _IGNORED,
        "the program and DeepSpeed decide how ranks communicate",
    ),
    *rows(
        _SPEED,
        "no-scatter-gather-tensors-in-pipeline/0 use-ring-exchange-p2p/0 lazy-mpu-init use-cpu-initialization/0 empty-unused-memory-level",
        BOTH,
        _IGNORED,
        "the program and DeepSpeed decide how ranks communicate and use memory",
    ),
    *rows(
        _SPEED,
        "overlap-p2p-communication/0 DDP-impl no-contiguous-buffers-in-local-ddp/0 zero-reduce-scatter/0 zero-contigious-gradients/0 "
        "zero-reduce-bucket-size zero-allgather-bucket-size use-pin-memory/0 scattered-embeddings/0 split-transformers/0 "
        "memory-centric-tiled-linear/0 tile-factor",
        DS,
        _IGNORED,
        "the program and DeepSpeed decide how ranks communicate and use memory (--deepspeed_config)",
    ),
    *rows(_SPEED, "sync-tp-duplicated-parameters/0", BIGSCIENCE, _IGNORED, "tensor-parallel ranks keep the same norms"),
    *rows(_SPEED, "use-contiguous-buffers-in-ddp/0", BIGSCIENCE, _IGNORED, "the program and DeepSpeed decide how ranks communicate"),
    *rows(
        _SPEED,
        "no-delay-grad-reduce/0 delay-grad-reduce/0 delay-param-gather/0 fp8-wgrad/0 nccl-ub/0",
        LM,
        _IGNORED,
        "flags of earlier versions; the program and DeepSpeed decide how ranks communicate",
    ),
    *rows(_SPEED, "manual-gc/0 manual-gc-interval no-manual-gc-eval/0", LM, _IGNORED, "Python collects garbage as usual"),
    *rows(
        _SPEED,
        "data-cache-path",
        BOTH,
        _IGNORED,
        "no index files are built, so there is no cache",
    ),
    *rows(
        _SPEED,
        "no-mmap-bin-files/0 no-create-attention-mask-in-dataloader/0 num-dataset-builder-threads object-storage-cache-path "
        "mid-level-dataset-surplus allow-ambiguous-pad-tokens/0 disable-msc/0",
        LM,
        _IGNORED,
        "data is read from .bin files, without index files, masks and padding",
    ),
    *rows(
        _SPEED,
        "mmap-warmup/0 repeated-dataloader/0 return-data-index/0 aml-data-download-path",
        DS,
        _IGNORED,
        "data is read from .bin files",
    ),
    *rows(_SPEED, "valid-num-workers", BIGSCIENCE, _IGNORED, "data is read from .bin files"),
    *rows(
        _LOGS,
        "log-params-norm/0 log-num-zeros-in-grad/0 timing-log-level timing-log-option no-barrier-with-level-1-timing/0 "
        "tensorboard-log-interval tensorboard-queue-size log-timers-to-tensorboard/0 no-log-loss-scale-to-tensorboard/0 "
        "log-validation-ppl-to-tensorboard/0 log-memory-to-tensorboard/0 log-world-size-to-tensorboard/0 adlr-autoresume/0 "
        "adlr-autoresume-interval test-mode/0",
        BOTH,
        _IGNORED,
        "every step is in SAVE/metrics.jsonl, whatever is drawn",
    ),
    *rows(
        _LOGS,
        "log-throughput/0 log-progress/0 log-energy/0 logging-level "
        "record-memory-history/0 memory-snapshot-path result-rejected-tracker-filename config-logger-dir log-straggler/0 "
        "disable-straggler-on-startup/0 straggler-ctrlr-port straggler-minmax-count run-workload-inspector-server/0 no-one-logger/0 "
        "one-logger-project one-logger-run-name one-logger-async/0 app-tag-run-name app-tag-run-version",
        LM,
        _IGNORED,
        "every step is in SAVE/metrics.jsonl; --straggler-interval finds slow ranks",
    ),
    *rows(
        _LOGS,
        "log-batch-size-to-tensorboard/0 no-log-learnig-rate-to-tensorboard/0 log-optimizer-states-to-tensorboard/0",
        DS,
        _IGNORED,
        "every step is in SAVE/metrics.jsonl, whatever is drawn",
    ),
    *rows(_LOGS, "log-level log-level-replica codecarbon-dir log-path", BIGSCIENCE, _IGNORED, "every step is in SAVE/metrics.jsonl"),
    *rows(
        _LOGS,
        "inprocess-restart/0 inprocess-max-iterations inprocess-monitor-thread-interval inprocess-monitor-process-interval "
        "inprocess-progress-watchdog-interval inprocess-heartbeat-interval inprocess-soft-timeout inprocess-hard-timeout "
        "inprocess-heartbeat-timeout inprocess-barrier-timeout inprocess-completion-timeout inprocess-last-call-wait "
        "inprocess-termination-grace-time inprocess-granularity inprocess-active-world-size inprocess-empty-cuda-cache/0 "
        "enable-ft-package/0 calc-ft-timeouts/0",
        LM,
        _IGNORED,
        "the same command, started again, resumes; --hang-timeout ends a job that hangs",
    ),
    *EXPERTS,
    *rows(_ELSE, "multi-latent-attention/0", LM, _OTHER, "attention has no latent keys and values"),
    *rows(
        _ELSE,
        "q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim rotary-scaling-factor mscale mscale-all-dim "
        "cache-mla-latents/0",
        LM,
        _DETAIL,
        "belongs to multi-latent attention",
        "multi-latent-attention",
    ),
    *rows(_ELSE, "mtp-num-layers", LM, _OTHER, "there are no further layers that predict later tokens", "", "0"),
    *rows(_ELSE, "mtp-loss-scaling-factor", LM, _DETAIL, "belongs to multi-token prediction", "mtp-num-layers"),
    *rows(_ELSE, "is-hybrid-model/0 hybrid-override-pattern", LM, _OTHER, "there are no Mamba layers"),
    *rows(_ELSE, "hybrid-attention-ratio hybrid-mlp-ratio", LM, _OTHER, "there are no Mamba layers", "", "0"),
    *rows(
        _ELSE,
        "mamba-state-dim mamba-head-dim mamba-num-groups mamba-num-heads disable-mamba-mem-eff-path/0",
        LM,
        _DETAIL,
        "belongs to Mamba layers",
        "is-hybrid-model",
    ),
    *rows(
        _ELSE,
        "heterogeneous-layers-config-path heterogeneous-layers-config-encoded-json",
        LM,
        _OTHER,
        "all blocks have the same sizes",
    ),
    *rows(
        _ELSE,
        "decoder-num-layers decoder-seq-length pipeline-model-parallel-split-rank",
        BOTH,
        _OTHER,
        "there are no encoder-decoder models (T5)",
    ),
    *rows(_ELSE, "relative-attention-num-buckets relative-attention-max-distance", LM, _IGNORED, "read only with relative positions"),
    *rows(
        _ELSE,
        "mask-prob short-seq-prob retriever-seq-length bert-no-binary-head/0 output-bert-embeddings/0 bert-embedder-type ict-head-size "
        "biencoder-projection-dim biencoder-shared-query-context-model/0 ict-load bert-load titles-data-path query-in-block-prob "
        "use-one-sent-docs/0 evidence-data-path retriever-report-topk-accuracies/n retriever-score-scaling/0 "
        "block-data-path embedding-path "
        "indexer-batch-size indexer-log-interval",
        BOTH,
        _IGNORED,
        "read only by the programs for BERT and retrieval, which do not exist here",
    ),
    *rows(_ELSE, "vision-pretraining/0", BOTH, _OTHER, "there are no image models"),
    *rows(
        _ELSE,
        "num-classes img-h img-w num-channels patch-dim classes-fraction data-per-class-fraction no-data-sharding/0 head-lr-mult "
        "vision-pretraining-type vision-backbone-type swin-backbone-type mask-type mask-factor iter-per-epoch dino-local-img-size "
        "dino-local-crops-number dino-head-hidden-size dino-bottleneck-size dino-freeze-last-layer dino-norm-last-layer/0 "
        "dino-warmup-teacher-temp dino-teacher-temp dino-warmup-teacher-temp-epochs",
        BOTH,
        _DETAIL,
        "belongs to image models; --patch-dim is no patch of tokens",
        "vision-pretraining",
    ),
    *rows(_ELSE, "retro-project-dir", LM, _OTHER, "there are no models with retrieval"),
    *rows(_ELSE, "retro-workdir retro-return-doc-ids/0", DS, _OTHER, "there are no models with retrieval"),
    *rows(_ELSE, "retro-add-retriever/0", BOTH, _OTHER, "there are no models with retrieval"),
    *rows(
        _ELSE,
        "retro-cyclic-train-iters retro-encoder-layers retro-encoder-hidden-dropout retro-encoder-attention-dropout retro-num-neighbors",
        BOTH,
        _DETAIL,
        "belongs to models with retrieval",
        "retro-add-retriever",
    ),
    *rows(
        _ELSE,
        "retro-attention-gate retro-no-verify-neighbor-count/0",
        LM,
        _DETAIL,
        "belongs to models with retrieval",
        "retro-add-retriever",
    ),
    *rows(_ELSE, "retro-num-retrieved-chunks", BOTH, _DETAIL, "belongs to models with retrieval", "retro-add-retriever"),
    *rows(_ELSE, "kd/0 mos/0", DS, _OTHER, "there is no distillation"),
    *rows(
        _ELSE,
        "kd-alpha-ce kd-beta-ce kd-temp load-teacher num-layers-teacher num-experts-teacher/n hidden-size-teacher "
        "num-attention-heads-teacher",
        DS,
        _DETAIL,
        "belongs to distillation",
        "kd",
    ),
    *rows(_ELSE, "perform-rl-step/0", LM, _OTHER, "there is no reinforcement learning"),
    *rows(
        _ELSE,
        "rl-prompts-per-eval grpo-prompts-per-step grpo-group-size grpo-iterations grpo-clamp-eps-lower grpo-clamp-eps-upper grpo-kl-beta "
        "grpo-entropy-term-weight grpo-filter-groups-with-same-reward/0 grpo-default-temperature grpo-default-top-p "
        "langrl-inference-server-type langrl-inference-server-conversation-template langrl-external-server/0 no-langrl-external-server/0 "
        "langrl-env-config rl-offload-optimizer-during-inference/0 rl-offload-kv-cache-during-training/0 "
        "no-rl-offload-kv-cache-during-training/0 rl-remove-kv-cache-during-training/0 no-rl-remove-kv-cache-during-training/0 "
        "rl-reset-cuda-graphs/0 no-rl-reset-cuda-graphs/0 rl-partial-rollouts/0 no-rl-partial-rollouts/0 "
        "rl-inference-logprobs-is-correction/0 no-rl-inference-logprobs-is-correction/0 rl-importance-sampling-truncation-coef "
        "rl-calculate-intra-group-similarity/0 no-rl-calculate-intra-group-similarity/0 rl-use-sequence-packing/0 "
        "rl-sequence-packing-bin-size rl-sequence-packing-algo",
        LM,
        _DETAIL,
        "belongs to reinforcement learning",
        "perform-rl-step",
    ),
    *rows(
        _ELSE,
        "loss-on-targets-only/0 reweight-loss-based-on-position-frequency/0",
        BIGSCIENCE,
        _OTHER,
        "there are no models with a prefix (non-causal decoders)",
    ),
    *rows(_ELSE, "img-dim", BIGSCIENCE, _DETAIL, "belongs to image models", "vision-pretraining"),
    *rows(_ELSE, "sft/0", LM, _OTHER, "there is no training on conversations"),
    *rows(_ELSE, "sft-tokenizer-prompt-format", LM, _DETAIL, "belongs to training on conversations", "sft"),
    *rows(
        _ELSE,
        "inference-batch-times-seqlen-threshold max-tokens-to-oom",
        BOTH,
        _IGNORED,
        "read only by generation, which is tools/generate.py here",
    ),
    *rows(
        _ELSE,
        "inference-rng-tracker/0 flash-decode/0 use-legacy-static-engine/0 inference-max-requests inference-max-seq-length "
        "inference-max-batch-size inference-dynamic-batching/0 inference-dynamic-batching-buffer-size-gb "
        "inference-dynamic-batching-block-size inference-dynamic-batching-buffer-guaranteed-fraction "
        "inference-dynamic-batching-buffer-overflow-factor inference-dynamic-batching-max-requests-override "
        "inference-dynamic-batching-max-tokens-override inference-dynamic-batching-num-cuda-graphs "
        "inference-dynamic-batching-track-paused-request-events/0 decode-only-cuda-graphs/0 "
        "inference-dynamic-batching-unified-memory-level "
        "symmetric-ar-type nccl-all-reduce-for-prefill/0 mlp-chunks-for-prefill disable-chunked-prefill/0 "
        "inference-wandb-logging-step-interval",
        LM,
        _IGNORED,
        "read only by generation, which is tools/generate.py here",
    ),
    *rows(_ELSE, "ds-inference/0 inference/0", DS, _REFUSED, "training always trains", "tools/generate.py"),
    *rows(_ELSE, "use-dataset-only", DS, _REFUSED, "training always trains", "", ("false",)),
    *rows(_ELSE, "yaml-cfg", LM, _REFUSED, "a file of Megatron is not read", "--config FILE.yaml with the names of the flags"),
)
