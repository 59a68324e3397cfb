"""Every flag of the program, once: frozen dataclasses whose fields are the flags, the keys of a YAML file, and the help text.

In: nothing. Out: the types that `parsing` fills from flags and files, and that `resolve` turns into the configuration of a run. Names are
Megatron's where Megatron has one. A field whose default is None is decided by the model family, the recipe or the data. The mark of a
field (`Fixed`, `Reported` or `Free`) says what may change when a run is resumed.

The help keeps the line breaks of a docstring, so each line of a docstring here is a complete sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from megatron_patch.config.option_types import (
    OPTIONAL,
    Count,
    Duration,
    Fixed,
    Free,
    OptionalCount,
    OptionalDuration,
    OptionalFloat,
    OptionalId,
    OptionalList,
    OptionalName,
    OptionalPath,
    OptionalPattern,
    OptionalSwitch,
    Reported,
    texts,
)
from megatron_patch.stages import LrStyle, WsdDecayStyle

MuonScaleMode = Literal["spectral", "unit_rms_norm", "shape_scaling"]
MuonCoefficients = Literal["simple", "quintic", "polar_express"]


@dataclass(frozen=True)
class ModelOptions:
    """The model's shape. The first three are required; --model-family sets the defaults of many others.

    Flags marked {None,True,False} are given as --NAME or --no-NAME.
    """

    num_layers: Fixed[Count]
    """Number of transformer blocks."""
    hidden_size: Fixed[Count]
    """Width of the residual stream (H)."""
    num_attention_heads: Fixed[Count]
    """Number of query heads in each block."""
    model_family: Fixed[str] = "llama"
    """Sets the defaults of the options below. Built in: llama and mistral (RMSNorm, SwiGLU, rotary positions, no biases, untied head),
    qwen3 (the same with normalized queries and keys), smollm3 (the same as llama with every 4th block without rotation, tied head),
    olmo2 and olmo3 (the same as llama with norms after attention and feed-forward layer, and queries and keys normalized over all heads),
    gemma2 (norms before and after, GeGLU, scaled embeddings, tied head, capped scores and logits), gemma3 (the same with normalized queries
    and keys instead of caps),
    gpt2 (LayerNorm, GELU, learned positions, biases, tied head); with --num-experts mixtral (as mistral), qwen3_moe and dots1 (as qwen3),
    olmoe (as llama with queries and keys normalized over all heads). Windows are given by --window-size."""
    num_query_groups: Fixed[OptionalCount] = None
    """Number of key-value heads, for grouped-query attention. By default each query head has its own."""
    kv_channels: Fixed[OptionalCount] = None
    """Width of each attention head. By default --hidden-size / --num-attention-heads."""
    ffn_hidden_size: Fixed[OptionalCount] = None
    """Width of the feed-forward layer. By default 8/3 of --hidden-size, rounded up to a multiple of 256 (SwiGLU), or 4 times it (GELU)."""
    vocab_size: Fixed[OptionalCount] = None
    """Size of the vocabulary: all token ids are below this number. By default the size in the dataset's metadata file (PREFIX.json)."""
    make_vocab_size_divisible_by: Free[Count] = 128
    """Pad the rows of the embedding to a multiple of this number and of the tensor-parallel size. Padding is never predicted."""
    max_position_embeddings: Fixed[OptionalCount] = None
    """Length of the longest sequence, in positions. By default --seq-length, which no stage and no evaluation exceeds."""
    normalization: Fixed[Annotated[Literal["RMSNorm", "LayerNorm"] | None, OPTIONAL]] = None
    """Type of the normalization layers. By default the model family's."""
    norm_epsilon: Fixed[OptionalFloat] = None
    """Added to the variance in each normalization. By default the model family's (1e-5 or 1e-6)."""
    swiglu: Fixed[OptionalSwitch] = None
    """Use SwiGLU, a gated feed-forward layer, or with --no-swiglu GELU. By default the model family's."""
    geglu: Fixed[OptionalSwitch] = None
    """Use GeGLU, a feed-forward layer whose gate has GELU (tanh form), instead of --swiglu. By default the model family's choice."""
    zero_centered_norms: Fixed[OptionalSwitch] = None
    """Store the weights of RMSNorm minus 1, as Gemma does. By default the model family's choice."""
    scale_embeddings: Fixed[OptionalSwitch] = None
    """Multiply word embeddings by the root of --hidden-size, as Gemma does. By default the model family's choice."""
    position_embedding_type: Fixed[Annotated[Literal["rope", "learned_absolute"] | None, OPTIONAL]] = None
    """Encode positions by rotation (rope) or by learned embeddings. By default the model family's."""
    no_rope_freq: Fixed[OptionalPattern] = None
    """Blocks whose queries and keys are not rotated: every N-th one, or a list with 1 for each of them, such as ([0]*3+[1])*8.
    0: none. By default the model family's choice."""
    rotary_base: Fixed[float] = 10000.0
    """Base of the rotary frequencies (rope theta)."""
    rope_scaling: Fixed[Literal["none", "linear", "llama3", "yarn"]] = "none"
    """Lower the rotary frequencies so that the model reads longer contexts.
    linear divides all of them by --rope-scaling-factor; llama3 (Llama 3.1 and later) and yarn (YaRN) divide only the low ones."""
    rope_scaling_factor: Fixed[float] = 1.0
    """Factor by which --rope-scaling divides the rotary frequencies."""
    rope_low_freq_factor: Fixed[float] = 1.0
    """llama3 scaling: frequencies with a wavelength above --rope-original-positions / this number are divided by the full factor."""
    rope_high_freq_factor: Fixed[float] = 4.0
    """llama3 scaling: frequencies with a wavelength below --rope-original-positions / this number stay as they are."""
    rope_original_positions: Fixed[Count] = 8192
    """llama3 and yarn: context length, in positions, that the model was trained with before scaling."""
    rope_beta_fast: Fixed[float] = 32.0
    """yarn: frequencies with more turns than this in the original context stay as they are."""
    rope_beta_slow: Fixed[float] = 1.0
    """yarn: frequencies with fewer turns than this in the original context are divided by the full factor."""
    rope_attention_factor: Fixed[OptionalFloat] = None
    """yarn: factor of the rotated queries and keys. By default 1 + 0.1 ln(--rope-scaling-factor)."""
    window_size: Fixed[Annotated[str | None, texts("LEFT,0")]] = None
    """Attention sees a window: LEFT positions before a position, and itself. 4095,0 is a window of 4,096 positions. By default none."""
    window_attn_skip_freq: Fixed[OptionalPattern] = None
    """Blocks without this window: every N-th one, or a list with 0 for each of them, such as ([1]*3+[0])*8. By default none."""
    windowed_rotary_base: Fixed[OptionalFloat] = None
    """Base of the rotary frequencies of blocks with a window, to which --rope-scaling does not apply. By default that of all blocks."""
    norm_placement: Fixed[Annotated[Literal["pre", "post", "both"] | None, OPTIONAL]] = None
    """Normalize what attention and feed-forward layers read (pre), what they add to the residual stream (post), or both.
    By default the model family's choice."""
    qk_layernorm: Fixed[OptionalSwitch] = None
    """Normalize queries and keys before the rotation. By default the model family's choice."""
    qk_norm_scope: Fixed[Annotated[Literal["head", "all"] | None, OPTIONAL]] = None
    """Normalize the queries and keys of each head, or over all heads together. By default the model family's choice."""
    query_pre_attn_scalar: Fixed[OptionalFloat] = None
    """Divide the scores of attention by the root of this number. By default the width of a head (--kv-channels)."""
    attn_logit_softcapping: Fixed[OptionalFloat] = None
    """Cap the scores of attention at plus and minus this number, smoothly by tanh; 0: no cap. By default the model family's choice.
    No flash kernel does this: all T x T scores of a head are in memory, and a step is slower."""
    final_logit_softcapping: Fixed[OptionalFloat] = None
    """Cap the logits at plus and minus this number, smoothly by tanh; 0: no cap. By default the model family's choice."""
    add_qkv_bias: Fixed[OptionalSwitch] = None
    """Add biases only to the query, key and value projections, as Qwen2 does."""
    disable_bias_linear: Fixed[OptionalSwitch] = None
    """Leave out the biases of all linear layers. By default the model family's choice."""
    untie_embeddings_and_output_weights: Fixed[OptionalSwitch] = None
    """Give the output layer its own weights; with --no-… it shares those of the embedding. By default the model family's choice."""
    init_method_std: Fixed[float] = 0.02
    """Standard deviation of the initial weights."""


@dataclass(frozen=True)
class ExpertOptions:
    """Mixture of experts: a router chooses some of many small feed-forward layers for each position. --num-experts turns it on."""

    num_experts: Fixed[OptionalCount] = None
    """Number of experts in each block that has them. By default none."""
    moe_ffn_hidden_size: Fixed[OptionalCount] = None
    """Width of each expert. By default --ffn-hidden-size."""
    moe_router_topk: Fixed[Count] = 2
    """Number of experts that each position uses."""
    moe_layer_freq: Fixed[OptionalPattern] = None
    """Blocks with experts: every N-th one from the first, or a list with 1 for each of them, such as ([0]*1+[1]*15). By default all."""
    moe_shared_expert_intermediate_size: Fixed[OptionalCount] = None
    """Width of a feed-forward layer that all positions use in addition to their experts. By default there is none."""
    moe_router_score_function: Fixed[Literal["softmax", "sigmoid"]] = "softmax"
    """Turn the router's logits into scores by softmax over the experts, or by the sigmoid of each (DeepSeek-V3)."""
    moe_router_pre_softmax: Fixed[bool] = False
    """Weigh the chosen experts by their softmax over all experts (OLMoE). By default these weights are divided by their sum."""
    moe_router_topk_scaling_factor: Fixed[float] = 1.0
    """Factor of the weights of the chosen experts."""
    moe_router_enable_expert_bias: Fixed[bool] = False
    """Choose experts by score plus a bias, which moves after each step against their load (DeepSeek-V3). Weights do not contain it."""
    moe_router_bias_update_rate: Reported[float] = 1e-3
    """How much the bias of an expert moves in a step. --moe-router-enable-expert-bias turns it on."""
    moe_router_load_balancing_type: Reported[Literal["global_aux_loss", "none"]] = "global_aux_loss"
    """Add an auxiliary loss that balances the load of the experts over the global batch, or none."""
    moe_aux_loss_coeff: Reported[float] = 1e-2
    """Coefficient of this loss, of which the load is the mean over earlier global batches."""
    moe_z_loss_coeff: Reported[float] = 0.0
    """Coefficient of the z-loss, which keeps the router's logits small."""


@dataclass(frozen=True)
class StageOptions:
    """How many tokens the run reads, in which patches and in which batches. --recipe or --stages chooses the stages."""

    recipe: Fixed[OptionalName] = None
    """Name of the recipe that makes the stages. By default patch-train where --patch-size is above 1, else token-level.
    - patch-train: patches, then single tokens, as many tokens in each step. Learning rate and optimizer restart at the switch.
    - token-superposition: patches, then single tokens, as many positions in each step. One schedule; the optimizer is kept.
    - token-level: single tokens throughout, the baseline."""
    patch_size: Fixed[OptionalCount] = None
    """K, the patch size of the recipe's first stage: tokens averaged into one position, and labels that each position predicts.
    By default 1. Where --recipe names patches it is 2 for models below 100M parameters and 4 for larger ones."""
    patch_fraction: Fixed[OptionalFloat] = None
    """Share of the training tokens that is read as patches (lambda, between 0 and 1). By default 2/3 for patch-train.
    Give this or --patch-compute-share."""
    patch_compute_share: Fixed[OptionalFloat] = None
    """Share of the run's compute that is spent on patches (r, between 0 and 1). By default 0.3 for token-superposition.
    Give this or --patch-fraction."""
    stages: Fixed[OptionalList] = None
    """The list of stages, instead of a recipe: a YAML list in a file, JSON on the command line. docs/method.md explains its keys."""
    train_tokens: Reported[OptionalCount] = None
    """Number of tokens that the run reads over all its stages."""
    seq_length: Fixed[Count] = 2048
    """Length of a sample at K = 1, in positions. By default the number of positions in every stage; see --sample."""
    sample: Fixed[Literal["constant-positions", "constant-tokens"]] = "constant-positions"
    """What the samples of all stages have in common: their positions (T), or their tokens (T/K positions in a patch stage)."""
    batch: Fixed[Annotated[Literal["constant-tokens", "constant-positions"] | None, OPTIONAL]] = None
    """What the steps of all stages have in common: their tokens, or their positions. By default the recipe's choice."""
    micro_batch_size: Free[Count] = 1
    """Number of samples that one rank computes in one forward pass. Larger is faster as long as it fits into memory."""
    global_batch_size: Fixed[OptionalCount] = None
    """Number of samples in one optimizer step at K = 1, over all ranks. Give this or --global-batch-tokens."""
    global_batch_tokens: Fixed[OptionalCount] = None
    """Number of tokens in one optimizer step at K = 1, over all ranks, rounded to full micro-batches of all ranks.
    Give this or --global-batch-size."""
    position_weights: Fixed[Annotated[str, tyro.conf.arg(metavar="NAME|NUMBERS")]] = "uniform"
    """How much each of the K labels of a position counts in the patch loss; k numbers the labels from 0.
    uniform (1), power (1/(k+1)), exponential (e^-k), first (only the first label), or K numbers with commas between them."""
    anneal_share: Fixed[float] = 0.0
    """Share of the patch stage's steps, at its end, over which the weights move to the first label. This softens the switch."""
    block_tokens: Fixed[OptionalCount] = None
    """Size of the blocks, in tokens, in which the corpus is divided among the stages.
    By default the least common multiple of the tokens in a sample of each stage, which is rarely worth changing."""
    start_tokens: Fixed[Count] = 0
    """Skip this many tokens at the start of the corpus order, because an earlier run has read them."""


@dataclass(frozen=True)
class ScheduleOptions:
    """The length of a warm-up or decay is given in tokens, in steps, or as a share. Steps become tokens once, at the first start.
    --recipe or --stages decides what restarts at a switch.
    """

    lr: Reported[float] = 3e-4
    """Highest learning rate."""
    min_lr: Reported[float] = 0.0
    """Learning rate at the end of the decay."""
    lr_warmup_tokens: Reported[Count] = 0
    """Length of the linear warm-up from 0, in tokens."""
    lr_warmup_steps: Reported[OptionalCount] = None
    """Length of the warm-up in optimizer steps, instead of --lr-warmup-tokens."""
    lr_warmup_fraction: Reported[OptionalFloat] = None
    """Length of the warm-up as a share of the schedule's tokens, instead of --lr-warmup-tokens."""
    lr_decay_style: Reported[Annotated[LrStyle | None, OPTIONAL]] = None
    """Shape of the decay after the warm-up; WSD is warm-up, stable, decay.
    By default cosine, or WSD for the recipe token-superposition."""
    lr_decay_tokens: Reported[OptionalCount] = None
    """Number of tokens from the schedule's start after which --min-lr is reached. By default the length of the schedule."""
    lr_decay_steps: Reported[OptionalCount] = None
    """Number of optimizer steps from the schedule's start after which --min-lr is reached, instead of --lr-decay-tokens."""
    lr_wsd_decay_tokens: Reported[OptionalCount] = None
    """Length of WSD's final decay, in tokens."""
    lr_wsd_decay_steps: Reported[OptionalCount] = None
    """Length of WSD's final decay in optimizer steps, instead of --lr-wsd-decay-tokens."""
    lr_wsd_decay_fraction: Reported[OptionalFloat] = None
    """Length of WSD's final decay as a share of the schedule's steps, instead of --lr-wsd-decay-tokens.
    By default 0.1, or 0.5 for models below 100M parameters (docs/replication.md)."""
    lr_wsd_decay_style: Reported[WsdDecayStyle] = "linear"
    """Shape of WSD's final decay."""
    optimizer: Fixed[str] = "adamw"
    """adamw, muon, or a name that your own script registers.

    - adamw: NVIDIA Apex's fused AdamW if installed, else torch's.
    - muon: orthogonalized momentum for the matrices of the blocks; AdamW for embeddings, head, norms and biases (docs/optimizers.md)."""
    weight_decay: Reported[float] = 0.1
    """Decoupled weight decay of weight matrices. Biases and normalization weights are never decayed."""
    embedding_weight_decay: Reported[OptionalFloat] = None
    """Decoupled weight decay of word embeddings and head. By default --weight-decay."""
    decoupled_lr: Reported[OptionalFloat] = None
    """Highest learning rate of word embeddings and head, whose whole schedule is scaled by its ratio to --lr. By default --lr."""
    muon_lr: Reported[OptionalFloat] = None
    """Highest learning rate of Muon's matrices, whose whole schedule is scaled by its ratio to --lr.
    By default --lr: with the default scale, a rate tuned for AdamW carries over."""
    muon_weight_decay: Reported[OptionalFloat] = None
    """Decoupled weight decay of Muon's matrices. By default --weight-decay."""
    muon_momentum: Reported[float] = 0.95
    """Decay rate of Muon's momentum."""
    muon_nesterov: Reported[bool] = True
    """Orthogonalize Nesterov's momentum, the weighted mean of gradient and momentum, instead of the momentum alone."""
    muon_scale_mode: Reported[MuonScaleMode] = "spectral"
    """Factor of Muon's update of a matrix of R rows and C columns.

    - spectral: the root of max(R, C).
    - unit_rms_norm: the root of R/C.
    - shape_scaling: the root of max(1, R/C)."""
    muon_extra_scale_factor: Reported[float] = 0.2
    """Further factor of Muon's update. 0.2 with spectral gives it the size of AdamW's update (arXiv 2502.16982)."""
    muon_num_ns_steps: Reported[Count] = 5
    """Number of Newton-Schulz steps that orthogonalize the momentum."""
    muon_coefficient_type: Reported[MuonCoefficients] = "simple"
    """Coefficients of these steps, by Megatron's names.

    - simple: the same in each step (Jordan 2024, as torch.optim.Muon).
    - quintic: five different ones, which Megatron has by default (modded-nanogpt).
    - polar_express: the best ones for each step (arXiv 2505.16932)."""
    adam_beta1: Reported[float] = 0.9
    """Decay rate of Adam's first moment (beta 1)."""
    adam_beta2: Reported[float] = 0.95
    """Decay rate of Adam's second moment (beta 2)."""
    adam_eps: Reported[float] = 1e-8
    """Added to the square root of Adam's second moment (epsilon)."""
    clip_grad: Reported[float] = 1.0
    """Scale the gradient down to this norm if its norm is larger. 0 turns clipping off."""


@dataclass(frozen=True)
class DataOptions:
    """Training data, held-out data, and how documents are separated. megatron-patch preprocess makes datasets from text."""

    data_path: Fixed[Annotated[tuple[str, ...], texts("PREFIX ...")]] = ()
    """Training datasets, by their paths without .bin and .idx: one or more prefixes, or a weight before each: 0.7 web 0.3 code.
    A quoted glob ('shards/*_text_document') or @FILE, a file that lists prefixes, is one corpus of many shards."""
    valid_data_path: Reported[Annotated[tuple[str, ...], texts("PREFIX ...")]] = ()
    """Held-out datasets for evaluation, written like --data-path. By default the part of --data-path that --split reserves.
    Weights weigh the losses of the datasets, each of which is also reported (docs/data.md)."""
    split: Fixed[Annotated[str, tyro.conf.arg(metavar="TRAIN,VALID,TEST")]] = "969,30,1"
    """Relative sizes of the parts of --data-path for training, validation and test. Ignored with --valid-data-path."""
    tokenizer_type: Free[OptionalName] = None
    """Type of the tokenizer that encoded the data; only --sample-prompts needs it. By default the one in the dataset's metadata file.
    HuggingFaceTokenizer, SentencePieceTokenizer, Llama2Tokenizer, GPT2BPETokenizer, TikTokenizer or NullTokenizer."""
    tokenizer_model: Free[OptionalPath] = None
    """File or folder of that tokenizer. By default the one in the dataset's metadata file."""
    eod_token_id: Fixed[OptionalId] = None
    """Id of the end-of-document token. By default the one in the dataset's metadata file."""
    reset_attention_mask: Fixed[bool] = False
    """Prevent positions from attending to other documents of the same sample."""
    reset_position_ids: Fixed[bool] = False
    """Number the positions of each document from 0."""
    eod_mask_loss: Fixed[bool] = False
    """Exclude a label from the loss if it belongs to another document than the position that predicts it."""
    max_epochs: Free[Annotated[tuple[str, ...], texts("LIMIT ...")]] = ()
    """Refuse a run that would read a corpus more often than this: NUMBER limits all corpora, PREFIX=NUMBER one of them."""
    shuffle_window_blocks: Fixed[Count] = 1024
    """Size of the shuffle window in blocks: samples are shuffled within it. A larger window mixes better and reads more at random."""
    num_workers: Free[Count] = 2
    """Number of steps whose batches are prepared ahead of training. 0 prepares each batch when it is needed."""

    @property
    def separating(self) -> list[str]:
        """Names of the options given here that separate documents, for which the end-of-document token must be known."""
        return [name for name in ("reset_attention_mask", "reset_position_ids", "eod_mask_loss") if getattr(self, name)]


@dataclass(frozen=True)
class EngineOptions:
    """How ranks share the model and in which precision they compute. docs/parallelism.md shows which combinations run."""

    bf16: Reported[bool] = False
    """Compute in bfloat16. Gradients are accumulated in float32."""
    fp16: Reported[bool] = False
    """Compute in float16 with loss scaling. Needs a GPU; prefer --bf16 where the GPU supports it."""
    loss_scale: Reported[OptionalFloat] = None
    """Constant loss scale for --fp16. By default the scale adapts to overflows."""
    initial_loss_scale: Reported[float] = 65536.0
    """First loss scale for --fp16 where the scale adapts; a power of two."""
    zero_stage: Free[Annotated[Literal[0, 1, 2, 3] | None, OPTIONAL]] = None
    """ZeRO level, that is what data-parallel ranks shard: 0 nothing, 1 the optimizer's state, 2 also gradients, 3 also weights.
    By default 1, or the level in --deepspeed_config. A higher level saves memory and communicates more."""
    tensor_model_parallel_size: Free[Count] = 1
    """Number of ranks that split each layer (tensor parallel). Use it when a layer does not fit on one GPU; best within one node."""
    pipeline_model_parallel_size: Free[Count] = 1
    """Number of ranks that split the list of layers (pipeline parallel). Use it when the model does not fit on one node."""
    pipeline_balance: Free[Literal["parameters", "flops", "blocks"]] = "parameters"
    """What is divided evenly among pipeline ranks: parameters (memory), FLOPs (time), or the number of transformer blocks."""
    sequence_parallel: Free[bool] = False
    """Split normalization and residual stream along positions over the tensor-parallel ranks. Saves activation memory."""
    deepspeed_config: Reported[OptionalPath] = None
    """JSON file that is passed through to DeepSpeed, for example for offloading. Values that a flag also sets must agree."""
    expert_model_parallel_size: Free[Count] = 1
    """Neighbors among the data-parallel ranks that divide the experts of each block, and send positions to each other."""
    context_parallel_size: Free[Count] = 1
    """Number of ranks that share the positions of each sample (context parallel). Use it for samples that are too long for one GPU.
    It divides the data-parallel ranks. Stages with fewer positions than --seq-length, such as a patch stage, take a share of it.
    A stage of `stages:` may have its own context_parallel_size."""
    cp_comm_type: Free[Annotated[Literal["a2a", "all_gather"] | None, OPTIONAL]] = None
    """How context-parallel ranks exchange queries, keys and values: a2a sends positions and receives heads (Ulysses), all_gather gathers
    keys and values. Default: a2a, or all_gather where the ranks do not divide the heads."""
    recompute_granularity: Free[Literal["none", "selective", "full"]] = "none"
    """Save memory by computing activations again in the backward pass: those of attention (selective), or of full blocks (full)."""
    compile: Free[bool] = False
    """Compile the transformer blocks with torch.compile: a slower start, faster steps."""
    operators: Free[Literal["fused", "plain"]] = "fused"
    """Code for the patch embedding and the loss: compiled kernels where they are built (fused), or the plain formulas in PyTorch (plain).
    With plain and K = 1, results equal those of an ordinary language model bit by bit."""
    seed: Fixed[int] = 1234
    """Random seed of the initial weights and of the data order."""
    local_rank: Free[int] = -1
    """Set by the launcher; do not give it."""
    distributed_timeout_minutes: Free[Count] = 40
    """Minutes that a rank waits for the others in a collective before it fails. Must be longer than --hang-timeout."""


@dataclass(frozen=True)
class CheckpointOptions:
    """Saving and resuming. The same command, started again, resumes from the newest valid checkpoint."""

    save: Free[OptionalPath] = None
    """Folder of the run, for checkpoints, metrics and plots. Without it nothing is saved."""
    load: Free[OptionalPath] = None
    """Folder to resume from. By default --save. A folder without checkpoints starts a new run."""
    finetune: Free[bool] = False
    """Start a new run from the weights of --load: optimizer, schedule and data order start again.
    Where --save already holds checkpoints of the new run, the new run resumes from them."""
    save_interval: Free[OptionalCount] = None
    """Number of steps between checkpoints. The end of each stage is always saved."""
    save_interval_tokens: Free[OptionalCount] = None
    """Number of tokens between checkpoints, instead of --save-interval."""
    keep_last: Free[Count] = 3
    """Number of newest checkpoints to keep; older ones are deleted. 0 keeps all. Those at the end of a stage are always kept."""
    keep_every: Free[OptionalCount] = None
    """Also keep the first checkpoint at or after each multiple of this many steps."""
    keep_every_tokens: Free[OptionalCount] = None
    """Also keep the first checkpoint at or after each multiple of this many tokens."""
    async_save: Free[bool] = False
    """Write checkpoints in the background. Training waits only while weights and moments are copied to host memory."""
    exit_interval: Free[OptionalCount] = None
    """Save and stop (exit code 0) at each multiple of this many steps."""


@dataclass(frozen=True)
class SafetyOptions:
    """When to stop, which steps to reject, and how long to wait. docs/operations.md explains what the program detects."""

    exit_duration: Free[OptionalDuration] = None
    """Save and stop (exit code 75) after this time, for example 3h30m. The same command then resumes."""
    exit_margin: Free[Duration] = 300.0
    """Save and stop this long before the time limit of a Slurm job, but not before half of the job's time."""
    kill_switch: Free[OptionalPath] = None
    """Save and stop as soon as this file exists."""
    on_spike: Reported[Literal["skip", "rewind", "stop", "ignore"]] = "skip"
    """What to do when the loss spikes or the gradient explodes. A step with a loss or gradient that is not finite is never taken.
    - skip: leave out the update of this step.
    - rewind: also return to weights and optimizer state of the newest checkpoint; data read since then is not read again.
    - stop: end with exit code 5.
    - ignore: take the step."""
    spike_threshold: Reported[float] = 20.0
    """The loss spikes when it is this many robust deviations above the median of the stage's last steps.
    A robust deviation is 1.4826 times the median absolute deviation, and at least 0.01 nats."""
    spike_window: Reported[Count] = 128
    """Number of last steps of a stage for that median. Nothing is a spike before half of them are done."""
    spike_grad_norm: Reported[OptionalFloat] = None
    """The gradient explodes when its norm is this many times the median norm. By default only clipping limits gradients."""
    max_sick_steps: Free[Count] = 10
    """Stop (exit code 5) after this many rejected steps in a row."""
    hang_timeout: Free[Duration] = 1800.0
    """End the job (exit code 76) and write the stacks of all ranks when there is no progress for this time. 0 turns this off."""
    straggler_interval: Free[Count] = 100
    """Number of steps between checks for ranks that compute more slowly than the others. 0 never checks."""
    check_replicas_interval: Free[OptionalCount] = None
    """Number of steps between checks that ranks with the same weights or the same samples agree bit by bit. By default never."""
    replay_interval: Free[OptionalCount] = None
    """Number of steps between replays: the loss of a micro-batch is computed twice and must be the same. By default never."""


@dataclass(frozen=True)
class LoggingOptions:
    """What is measured, sampled and printed during training."""

    log_interval: Free[Count] = 10
    """Number of steps between lines on the console."""
    eval_interval: Free[OptionalCount] = None
    """Number of steps between evaluations. The end of each stage is always evaluated where there is held-out data."""
    eval_interval_tokens: Free[OptionalCount] = None
    """Number of tokens between evaluations, instead of --eval-interval."""
    eval_tokens: Reported[Count] = 1_000_000
    """Number of held-out tokens in an evaluation, divided equally among the held-out datasets."""
    sample_prompts: Free[Annotated[tuple[str, ...], texts("TEXT ...")]] = ()
    """Texts that the model continues at each evaluation. An empty text stands for the start of a document."""
    sample_tokens: Free[Count] = 64
    """Number of tokens in each continuation."""
    sample_temperature: Free[float] = 0.0
    """Temperature of sampling. 0 always takes the most likely token."""
    sample_top_p: Free[float] = 0.95
    """Sample from the smallest set of tokens whose probabilities sum to this number."""
    tensorboard_dir: Free[OptionalPath] = None
    """Folder for TensorBoard event files."""
    wandb_project: Free[OptionalName] = None
    """Weights & Biases project to log to."""
    wandb_exp_name: Free[OptionalName] = None
    """Name of the run in Weights & Biases."""
    mlflow_experiment: Free[OptionalName] = None
    """MLflow experiment to log to."""
    mlflow_tracking_uri: Free[Annotated[str | None, texts("ADDRESS")]] = None
    """Address of MLflow's tracking server. By default that of the environment (MLFLOW_TRACKING_URI)."""
    mlflow_run_name: Free[OptionalName] = None
    """Name of the run in MLflow. By default the name of the folder of --save."""
    prometheus_file: Free[OptionalPath] = None
    """File NAME.prom for the newest numbers, which the textfile collector of Prometheus' node_exporter reads."""
    prometheus_port: Free[Annotated[int | None, texts("PORT")]] = None
    """Port at which rank 0 shows the newest numbers to Prometheus."""
    prometheus_address: Free[Annotated[str, texts("ADDRESS")]] = "0.0.0.0"
    """Address at which that port listens. By default every address of the node."""
    profile: Free[Annotated[str | None, texts("STEPS")]] = None
    """Steps to record with torch's profiler, such as 10 or 10-12. The trace is written to SAVE/profile/."""
    profile_ranks: Free[Annotated[tuple[int, ...], texts("RANK ...")]] = (0,)
    """Ranks that record those steps."""
    profile_shapes: Free[bool] = False
    """Record the shapes of tensors too."""
    profile_nsys: Free[bool] = False
    """Mark those steps for Nsight Systems (nsys) with NVTX ranges, instead of recording them."""
    log_token_spans: Free[bool] = False
    """Write which tokens each rank reads to SAVE/spans/, for audits of the data order."""
    peak_tflops: Free[OptionalFloat] = None
    """Peak of one device in TFLOP/s, for the MFU. By default the peak of a known device."""
    dry_run: Free[bool] = False
    """Print the plan and its cost, and stop. Needs no data and no GPUs."""
    world_size: Free[OptionalCount] = None
    """Number of ranks to plan for in a --dry-run. By default those that were started."""


@dataclass(frozen=True)
class Options:
    """Pretrain a language model on patches of tokens first and on single tokens last.

    First steps and units:
      --dry-run           prints the plan and its cost, without data or GPUs
      --config FILE.yaml  reads options from a file, one "name: value" on each line,
                          for example "train-tokens: 10B"; the names are those below,
                          without the leading dashes; flags override the file
      --NAME None         takes back what the file sets, for every option
      --version           prints the versions of this program, torch and DeepSpeed
      COUNT               a whole number: 4096, 512k, 2M, 270B
      TIME                a duration: 90s, 45min, 3h30m, 1.5d
    """

    model: ModelOptions
    experts: Annotated[ExpertOptions, tyro.conf.arg(name="mixture of experts")]
    stages: Annotated[StageOptions, tyro.conf.arg(name="stage")]
    schedule: Annotated[ScheduleOptions, tyro.conf.arg(name="learning rate and optimizer")]
    data: DataOptions
    engine: Annotated[EngineOptions, tyro.conf.arg(name="precision, parallelism and memory")]
    checkpoint: CheckpointOptions
    safety: Annotated[SafetyOptions, tyro.conf.arg(name="fault handling")]
    logging: Annotated[LoggingOptions, tyro.conf.arg(name="evaluation and logging")]
