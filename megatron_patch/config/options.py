"""Every flag of the program, once: frozen dataclasses whose fields are the flags, the keys of a YAML file, and the help text.

In: nothing. Out: the types that `parsing` fills from flags and files and that `resolve` turns into what the rooms need. Names are
Megatron's where Megatron has one. A field whose default is None is decided by the model family, the recipe or the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from tyro.constructors import PrimitiveConstructorSpec

from megatron_patch.errors import ConfigError
from megatron_patch.stages import LrStyle, WsdDecayStyle
from megatron_patch.utils.units import parse_count, parse_duration

Value = TypeVar("Value")


def _reader(parse: Callable[[str], Value], or_none: bool) -> Callable[[list[str]], Value | None]:
    """Reads one word of a command line; tyro wants a ValueError. Where a value may be left out, None takes a file's back."""

    def read(words: list[str]) -> Value | None:
        if or_none and words[0] == "None":
            return None
        try:
            return parse(words[0])
        except ConfigError as error:
            raise ValueError(f"{error.what} (allowed: {error.allowed})") from error

    return read


def _of_numbers(parse: Callable[[str], Value], metavar: str, or_none: bool = False) -> PrimitiveConstructorSpec[Value | None]:
    """How tyro reads a number that is written with units."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=_reader(parse, or_none),
        is_instance=lambda value: value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)),
        str_from_instance=lambda value: [str(value)],
    )


Count = Annotated[int, _of_numbers(parse_count, "COUNT")]
"""A whole number with an optional unit: 4096, 512k, 2M, 270B."""
OptionalCount = Annotated[int | None, _of_numbers(parse_count, "COUNT", or_none=True)]
"""A count that is decided elsewhere where it is not given."""
Duration = Annotated[float, _of_numbers(parse_duration, "TIME")]
"""Seconds, written with units: 45min, 3h30m, 1.5d."""
OptionalDuration = Annotated[float | None, _of_numbers(parse_duration, "TIME", or_none=True)]
"""A time span that may be left out."""


@dataclass(frozen=True)
class ModelOptions:
    """The model's shape."""

    num_layers: Count
    """Transformer blocks."""
    hidden_size: Count
    """Width of the residual stream."""
    num_attention_heads: Count
    """Query heads."""
    model_family: str = "llama"
    """Sets the defaults of the options below. Built in: llama (RMSNorm, SwiGLU, rotary positions, no biases, untied head), qwen3 (the
    same with normalized queries and keys), gpt2 (LayerNorm, GELU, learned positions, biases, tied head)."""
    num_query_groups: OptionalCount = None
    """Key-value heads of grouped-query attention; by default one for each query head."""
    kv_channels: OptionalCount = None
    """Size of a head; by default hidden size / heads."""
    ffn_hidden_size: OptionalCount = None
    """Width of the feed-forward layer; by default 8/3 of the hidden size, rounded up to 256 (SwiGLU), or 4 times (GELU)."""
    vocab_size: OptionalCount = None
    """Token ids are below this; by default what the dataset's side file says."""
    make_vocab_size_divisible_by: Count = 128
    """The embedding's rows are padded to a multiple of this times the tensor-parallel size; padding is never predicted."""
    max_position_embeddings: OptionalCount = None
    """Longest sequence of positions; by default --seq-length, which no stage and no evaluation exceeds."""
    normalization: Literal["RMSNorm", "LayerNorm"] | None = None
    """Kind of normalisation."""
    norm_epsilon: float | None = None
    """Added to the variance."""
    swiglu: bool | None = None
    """Gated feed-forward layer instead of GELU."""
    position_embedding_type: Literal["rope", "learned_absolute"] | None = None
    """Rotary or learned positions."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """Lower the rotary frequencies for longer contexts: all by --rope-scaling-factor, or the slow ones (Llama 3.1 and later)."""
    rope_scaling_factor: float = 1.0
    """By how much."""
    rope_low_freq_factor: float = 1.0
    """llama3: waves longer than --rope-original-positions over this are scaled whole."""
    rope_high_freq_factor: float = 4.0
    """llama3: waves shorter than --rope-original-positions over this are left alone."""
    rope_original_positions: Count = 8192
    """llama3: the context that the frequencies were made for."""
    qk_layernorm: bool | None = None
    """Normalise queries and keys of each head before the rotation."""
    add_qkv_bias: bool | None = None
    """Biases in the query, key and value projections alone."""
    disable_bias_linear: bool | None = None
    """No biases in linear layers."""
    untie_embeddings_and_output_weights: bool | None = None
    """An output head of its own instead of the embedding's transpose."""
    init_method_std: float = 0.02
    """Standard deviation of initial weights."""


@dataclass(frozen=True)
class StageOptions:
    """How many tokens are read, in which patches, in which batches."""

    recipe: str | None = None
    """patch-train: patches, then tokens; constant tokens a step; learning rate and optimizer start afresh at the switch.
    token-superposition: constant positions a step; one learning-rate schedule over the run; optimizer kept.
    token-level: the ordinary baseline. Without it: patch-train where --patch-size is above 1, else token-level."""
    patch_size: OptionalCount = None
    """K: tokens averaged into one position, and labels scored at each, in the recipe's first stage; by default 2 for a model below 100M
    parameters and 4 for a larger one where --recipe names patches, else 1."""
    patch_fraction: float | None = None
    """λ: share of the training tokens read as patches (default 2/3 for patch-train). Give this or --patch-compute-share."""
    patch_compute_share: float | None = None
    """r: share of the compute spent on patches (default 0.3 for token-superposition)."""
    stages: str | None = None
    """The stages themselves instead of a recipe; in a YAML file a list, on the command line the same as JSON."""
    train_tokens: OptionalCount = None
    """Tokens read in the whole run."""
    seq_length: Count = 2048
    """Positions of a sample, in every stage (a patch stage's sample then has K times the tokens)."""
    sample: Literal["constant-positions", "constant-tokens"] = "constant-positions"
    """Whether stages share a sample's positions (T) or its tokens (T/K positions in a patch stage)."""
    batch: Literal["constant-tokens", "constant-positions"] | None = None
    """Whether stages share a step's tokens or its positions; by default what the recipe says."""
    micro_batch_size: Count = 1
    """Samples of one rank in one forward pass."""
    global_batch_size: OptionalCount = None
    """Samples of --seq-length tokens in one step at token level. Give this or --global-batch-tokens."""
    global_batch_tokens: OptionalCount = None
    """Tokens in one step at token level, rounded to whole micro-batches on all ranks."""
    position_weights: str = "uniform"
    """Weights of a position's K labels: uniform, power (1/(k+1)), exponential (2^-k), first, or numbers with commas."""
    anneal_share: float = 0.0
    """Soft switch: the last part of the patch stage over which the weights move to the first label alone."""
    block_tokens: OptionalCount = None
    """Unit in which the corpus is dealt to the stages; by default the least common multiple of their samples."""
    start_tokens: Count = 0
    """Tokens of the corpus order to leave out at the start, because another run has read them."""


@dataclass(frozen=True)
class ScheduleOptions:
    """Learning rate and optimizer."""

    lr: float = 3e-4
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_warmup_tokens: Count = 0
    """Tokens of linear warm-up."""
    lr_warmup_fraction: float | None = None
    """The same as a share of the schedule's tokens."""
    lr_decay_style: LrStyle | None = None
    """Form of the decay; by default cosine (patch-train, token-level) or WSD (token-superposition)."""
    lr_decay_tokens: OptionalCount = None
    """Tokens after which --min-lr is reached; by default the schedule's end."""
    lr_wsd_decay_tokens: OptionalCount = None
    """Tokens of the final decay of WSD."""
    lr_wsd_decay_fraction: float | None = None
    """The same as a share of the schedule's steps; by default 0.1, for models below 100M parameters 0.5 (docs/replication.md)."""
    lr_wsd_decay_style: WsdDecayStyle = "linear"
    """Form of that decay."""
    optimizer: str = "adamw"
    """Name of the optimizer: adamw (NVIDIA Apex's fused AdamW if installed, else torch's), or one that a launcher script registers."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases have none."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""


@dataclass(frozen=True)
class DataOptions:
    """Where tokens come from."""

    data_path: tuple[str, ...] = ()
    """Dataset prefixes (without .bin and .idx), or weights and prefixes in turn for a blend: 0.7 web 0.3 code.

    A glob in quotes ('shards/*_text_document') or @FILE, a list of prefixes, is one corpus of many shards."""
    valid_data_path: tuple[str, ...] = ()
    """Held-out datasets; without them a part of --data-path by --split."""
    split: str = "969,30,1"
    """Parts of --data-path for training, validation and test."""
    tokenizer_type: str | None = None
    """Tokenizer of the data, for samples; by default what the dataset's side file says."""
    tokenizer_model: str | None = None
    """Its file or folder."""
    eod_token_id: int | None = None
    """Id of the end-of-document token; by default what the dataset's side file says."""
    reset_attention_mask: bool = False
    """No attention across documents."""
    reset_position_ids: bool = False
    """Positions start at 0 in each document."""
    eod_mask_loss: bool = False
    """Do not score labels of another document than that of the position that predicts them."""
    max_epochs: tuple[str, ...] = ()
    """How often a corpus may be read in the whole run: a number for all, PREFIX=NUMBER for one; a run that would read more is refused."""
    shuffle_window_blocks: Count = 1024
    """Blocks whose samples are shuffled together."""
    num_workers: Count = 2
    """Steps prepared ahead of training; 0 prepares each when asked for."""


@dataclass(frozen=True)
class EngineOptions:
    """Precision, parallelism and memory."""

    bf16: bool = False
    """bfloat16 weights and activations; gradients accumulate in float32."""
    fp16: bool = False
    """float16 with loss scaling (GPU only)."""
    loss_scale: float | None = None
    """Constant loss scale for --fp16; by default it adapts."""
    initial_loss_scale: float = 65536.0
    """First loss scale where it adapts; a power of two."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """What ZeRO shards over data-parallel ranks: 1 optimizer, 2 and gradients, 3 and weights; by default 1."""
    tensor_model_parallel_size: Count = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: Count = 1
    """Ranks that share the list of layers."""
    pipeline_balance: Literal["parameters", "flops", "blocks"] = "parameters"
    """What pipeline stages get even shares of: parameters (memory), FLOPs (time), or the number of blocks."""
    sequence_parallel: bool = False
    """Shard norms and residuals along positions over the tensor-parallel ranks."""
    deepspeed_config: str | None = None
    """DeepSpeed's own JSON, passed through (offload, communication, …); what it and flags both set must agree."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Recompute activations in the backward pass: the attention product, or whole blocks."""
    compile: bool = False
    """Compile the model's blocks with torch.compile."""
    operators: Literal["fused", "plain"] = "fused"
    """Embedding and loss: compiled kernels where they are built, or their plain formulas (at K = 1 bit by bit an ordinary model's)."""
    seed: int = 1234
    """Of initial weights and of the data's order."""
    local_rank: int = -1
    """Given by the launcher."""
    distributed_timeout_minutes: Count = 40
    """How long a rank waits for its peers in a collective before it ends with an error; longer than --hang-timeout."""


@dataclass(frozen=True)
class CheckpointOptions:
    """Saving and resuming."""

    save: str | None = None
    """Folder of the run: checkpoints, metrics, plots."""
    load: str | None = None
    """Folder to resume from; a folder without a checkpoint starts a new run. By default --save."""
    finetune: bool = False
    """Take only the weights of --load: a new run with a fresh optimizer, schedule and data order. Where --save holds checkpoints of that
    run already, it goes on with them."""
    save_interval: OptionalCount = None
    """Steps between checkpoints (stage ends are always saved)."""
    save_interval_tokens: OptionalCount = None
    """The same in tokens."""
    keep_last: Count = 3
    """Checkpoints to keep; 0 keeps all. Those at stage ends are always kept."""
    keep_every: OptionalCount = None
    """Beside --keep-last, keep the first checkpoint at or behind each multiple of so many steps, for good."""
    keep_every_tokens: OptionalCount = None
    """The same in tokens."""
    async_save: bool = False
    """Write checkpoints beside training, which waits only until its weights and moments are copied to the host's memory."""
    exit_interval: OptionalCount = None
    """Save and stop after this many steps of the whole run."""


@dataclass(frozen=True)
class SafetyOptions:
    """Faults: when to stop, what to do about sick steps, how long to wait."""

    exit_duration: OptionalDuration = None
    """Save and stop (exit code 75) after so long, as 3h30m; the same command then goes on."""
    exit_margin: Duration = 300.0
    """Stop so long before the end that Slurm has set for the job, after half of its time at the earliest."""
    kill_switch: str | None = None
    """Save and stop when this file exists."""
    on_spike: Literal["skip", "rewind", "stop", "ignore"] = "skip"
    """A step whose loss spikes or whose gradient explodes: leave its update out, go back to the weights of the newest checkpoint too and
    leave the data since then out, stop (exit code 5), or take it. What is not finite is never taken."""
    spike_threshold: float = 20.0
    """A loss is a spike from so many robust deviations (1.4826 times the median deviation, at least 0.01 nats) above the median of the
    stage's last steps."""
    spike_window: Count = 128
    """Steps of a stage that the median is of; nothing is a spike before half of them."""
    spike_grad_norm: float | None = None
    """A gradient has exploded from so many times the median norm; by default that is left to clipping."""
    max_sick_steps: Count = 10
    """Stop after so many sick steps in a row."""
    hang_timeout: Duration = 1800.0
    """End the job (exit code 76, with the stacks of all ranks) when nothing moves for so long; 0 never."""
    straggler_interval: Count = 100
    """Steps between looks at which ranks compute slower than the others; 0 never."""
    check_replicas_interval: OptionalCount = None
    """Steps between checks that ranks that hold the same weights, or read the same samples, agree bit by bit."""
    replay_interval: OptionalCount = None
    """Steps between replays: a micro-batch's loss is computed twice and must be the same."""


@dataclass(frozen=True)
class LoggingOptions:
    """Evaluation, metrics and the console."""

    log_interval: Count = 10
    """Steps between console lines."""
    eval_interval: OptionalCount = None
    """Steps between evaluations; stage ends are always evaluated where there is held-out data."""
    eval_interval_tokens: OptionalCount = None
    """The same in tokens."""
    eval_tokens: Count = 1_000_000
    """Held-out tokens of an evaluation."""
    sample_prompts: tuple[str, ...] = ()
    """Texts that the model continues with every evaluation; an empty one is the start of a document."""
    sample_tokens: Count = 64
    """Length of a continuation."""
    sample_temperature: float = 0.0
    """0 takes the likeliest token."""
    sample_top_p: float = 0.95
    """Draw from the smallest set of tokens with this mass."""
    tensorboard_dir: str | None = None
    """Write TensorBoard events here."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project."""
    wandb_exp_name: str | None = None
    """Name of the run there."""
    log_token_spans: bool = False
    """Write every token span that each rank reads to SAVE/spans/, for audits."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s, for the MFU of devices that are not in the table."""
    dry_run: bool = False
    """Print the resolved plan and stop; needs neither data nor GPUs."""
    world_size: OptionalCount = None
    """Ranks to pretend in a dry run."""


@dataclass(frozen=True)
class Options:
    """Pretrain a language model on patches of tokens first and on single tokens last."""

    model: ModelOptions
    stages: StageOptions
    schedule: ScheduleOptions
    data: DataOptions
    engine: EngineOptions
    checkpoint: CheckpointOptions
    safety: SafetyOptions
    logging: LoggingOptions
