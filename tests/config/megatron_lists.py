"""Three public argument lists of Megatron, as flags and values, with paths made up."""

import shlex

LLAMA_2 = shlex.split("""
--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-layers 24 --hidden-size 2048 --ffn-hidden-size 5504
--num-attention-heads 16 --micro-batch-size 4 --global-batch-size 32 --seq-length 2048 --max-position-embeddings 2048 --train-iters 250000
--save ckpt --load ckpt --data-path 1 data/books --data-impl mmap --tokenizer-type GPTSentencePieceTokenizer
--tokenizer-model tokenizer.model --split 949,50,1 --distributed-backend nccl --lr 3e-4 --lr-decay-style cosine --min-lr 3e-5
--weight-decay 0.1 --clip-grad 1 --lr-warmup-iters 2000 --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --log-interval 1
--save-interval 10000 --eval-interval 1000 --eval-iters 10 --bf16 --no-query-key-layer-scaling --attention-dropout 0 --hidden-dropout 0
--use-rotary-position-embeddings --untie-embeddings-and-output-weights --swiglu --normalization rmsnorm --disable-bias-linear
--num-key-value-heads 4 --zero-stage=0 --deepspeed_config=ds.json --deepspeed
""")
"""Megatron-DeepSpeed: examples_deepspeed/pretrain_llama2_distributed.sh."""

LLAMA_2_JSON = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "steps_per_print": 1,
    "zero_optimization": {"stage": 0},
    "bf16": {"enabled": True},
}

GPT_1_3B = shlex.split("""
--override-opt_param-scheduler --adam-beta1 0.9 --adam-beta2 0.95 --tensor-model-parallel-size 2 --init-method-std 0.013
--lr-decay-tokens 300000000000 --lr-warmup-tokens 3000000000 --micro-batch-size 2 --exit-duration-in-mins 30000000 --global-batch-size 512
--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 --train-tokens 300000000000
--train-samples 292968750 --lr 2.0e-4 --min-lr 1.0e-6 --lr-decay-style cosine --split 949,50,1 --log-interval 10 --eval-interval 100
--eval-iters 10 --save-interval 100 --weight-decay 0.1 --clip-grad 1.0 --hysteresis 2 --num-workers 0 --fp16 --seed 1234 --load ckpt
--save ckpt --no-async-tensor-model-parallel-allreduce --tensorboard-queue-size 1 --log-timers-to-tensorboard
--log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard --tensorboard-dir tb --checkpoint-activations
--log-optimizer-states-to-tensorboard --vocab-file vocab.json --merge-file merges.txt --data-path data/pile --data-impl mmap --deepspeed
--deepspeed_config ds.json --zero-stage 1 --pipeline-model-parallel-size 2 --deepspeed-activation-checkpointing
""")
"""Megatron-DeepSpeed: examples_deepspeed/rebase/ds_pretrain_gpt_1.3B.sh."""

GPT_1_3B_JSON = {
    "train_batch_size": 512,
    "train_micro_batch_size_per_gpu": 2,
    "steps_per_print": 10,
    "zero_optimization": {"stage": 1},
    "gradient_clipping": 1.0,
    "fp16": {"enabled": True, "loss_scale": 0, "loss_scale_window": 500, "hysteresis": 2, "min_loss_scale": 1, "initial_scale_power": 11},
    "wall_clock_breakdown": False,
}

LLAMA_3_8B = shlex.split("""
--use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention
--num-query-groups 8 --kv-channels 128 --seq-length 8192 --max-position-embeddings 8192 --position-embedding-type rope
--rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0 --hidden-dropout 0.0 --swiglu --init-method-std 0.0134
--attention-backend fused --apply-layernorm-1p --untie-embeddings-and-output-weights --disable-bias-linear --micro-batch-size 1
--global-batch-size 128 --train-samples 1953125000 --lr-decay-samples 1949218748 --lr-warmup-samples 3906252 --lr 0.00015
--min-lr 0.00001 --decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5 --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1
--adam-beta1 0.9 --adam-beta2 0.95 --bf16 --grad-reduce-in-bf16 --cross-entropy-loss-fusion --calculate-per-token-loss --manual-gc
--empty-unused-memory-level 1 --exit-duration-in-mins 235 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
--fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max --fp8-param-gather --tensor-model-parallel-size 1
--context-parallel-size 1 --sequence-parallel --data-path data/web --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer
--vocab-size 128256 --data-cache-path cache --split "'99,1,0'" --no-create-attention-mask-in-dataloader --no-mmap-bin-files
--num-workers 1 --log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput --profile
--profile-step-start 4 --profile-step-end 6 --ckpt-format torch_dist --distributed-timeout-minutes 60 --save ckpt --load ckpt
--tensorboard-dir tb
""")
"""Megatron-LM: examples/llama/train_llama3_8b_h100_fp8.sh; the quotes of --split reach the program, as in the script."""

REFUSED_IN_LLAMA_3 = ("--decoupled-min-lr", "--fp8-format", "--fp8-amax-history-len", "--fp8-param-gather")
