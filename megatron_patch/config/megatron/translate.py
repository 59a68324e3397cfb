"""The flags of Megatron whose translation depends on their value or on other flags, a function for each.

In: the translator, a flag as it was given, and its record in the table. Out: rows and flags in the translator's result. `translate()` is
the entry to the translation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from megatron_patch.config.megatron import experts, muon
from megatron_patch.config.megatron.flags import MegatronFlag
from megatron_patch.config.megatron.translator import COMMAND_LINE, MEGATRON_FLAGS, Given, Translation, Translator
from megatron_patch.errors import ConfigError
from megatron_patch.utils.units import parse_count, plural


def translate(given: Sequence[Given], ours: Collection[str], dry_run: bool = False) -> Translation:
    """Translates flags of Megatron; those of this program stay as they are.

    Args:
        given: the flags, those of a file before those of the command line.
        ours: names of the flags of this program, with dashes.
        dry_run: whether the run is only planned, so that it needs no data.
    """
    return Translator(given, ours, dry_run, _FUNCTIONS).run()


def _count(words: Sequence[str]) -> int | None:
    """Returns a whole number of a command line, or None if it is none; whoever reads it then reports it."""
    try:
        return parse_count(words[0])
    except (ConfigError, IndexError):
        return None


def _step_tokens(to: Translator) -> int | None:
    """Returns the tokens of a step at K = 1, or None if they are not known."""
    total = to.value("global-batch-tokens")
    if total is not None:
        return _count([total])
    samples, length = to.value("global-batch-size"), _length(to)
    batch = _count([samples]) if samples is not None else None
    return batch * length if batch is not None and length is not None else None


def _length(to: Translator) -> int | None:
    return _count([to.value("seq-length", "encoder-seq-length") or "2048"])


def _same_length(to: Translator, given: Given, option: str) -> tuple[list[Given], list[Given]]:
    """Returns the other flags for the length of an option, in any unit: those that count in place of `given`, and those that do not.

    Flags of this program override those of Megatron, and the command line overrides files.
    """
    stem = option.rpartition("-")[0]

    def found(*units: str) -> list[Given]:
        keys = [f"{stem}-{unit}" for unit in units]
        return [to.last[key] for key in keys if key in to.last and key != given.key and to.last[key].words[:1] != ("None",)]

    own = found("tokens", "steps")
    stronger = [flag for flag in own if flag.source in (COMMAND_LINE, given.source)]
    if option.startswith("lr-"):
        stronger += [flag for flag in found("iters", "samples") if flag.source == COMMAND_LINE != given.source]
    return stronger, [flag for flag in own if flag not in stronger]


def _replace(to: Translator, flags: Sequence[Given]) -> None:
    """Takes flags of this program out of the result, before or after they are in it."""
    to.replaced += flags
    to.result.flags = [flag for flag in to.result.flags if not any(flag is other for other in flags)]


def _tokens(option: str, steps: bool) -> Callable[[Translator, Given, MegatronFlag], None]:
    """Returns the function for a flag that counts steps (or samples) where this program counts tokens."""

    def function(to: Translator, given: Given, flag: MegatronFlag) -> None:
        number, unit = _count(given.words), _step_tokens(to) if steps else _length(to)
        if number is None:
            return to.refuse(given, "not a whole number", f"--{option} TOKENS")
        if unit is None:
            write = "--global-batch-size, from which the tokens of a step follow" if steps else f"--{option} TOKENS"
            return to.refuse(given, "the tokens of a step are not known", write)
        tokens = number * unit
        stronger, weaker = _same_length(to, given, option)
        if stronger:
            other, shorter = stronger[0], _count(stronger[0].words)
            if option != "train-tokens" or other.source != given.source or shorter is None or shorter <= tokens:
                return to.ignore(given, f"{tokens:,} tokens; --{other.key} {' '.join(other.words)} counts")
        if option == "train-tokens" and flag.key == "train-samples" and "train-iters" in to.last:
            return to.refuse(given, "together with --train-iters", "one of --train-iters, --train-samples and --train-tokens")
        formula = f"{plural(number, 'step' if steps else 'sample')} x {unit:,} tokens"
        _replace(to, [*weaker, *(to.last[key] for key in [option] if key in to.last)])
        if tokens == 0 and option != "train-tokens":
            return to.ignore(given, "0 is the default")
        return to.emit(given, f"--{option} {tokens}", meaning=formula)

    return function


def _steps(option: str) -> Callable[[Translator, Given, MegatronFlag], None]:
    """Returns the function for a flag that counts steps where this program can, too, so that the batch does not matter."""

    def function(to: Translator, given: Given, flag: MegatronFlag) -> None:
        number = _count(given.words)
        if number is None:
            return to.refuse(given, "not a whole number", f"--{option} STEPS")
        stronger, weaker = _same_length(to, given, option)
        if stronger:
            return to.ignore(given, f"{plural(number, 'step')}; --{stronger[0].key} {' '.join(stronger[0].words)} counts")
        _replace(to, weaker)
        if number == 0:
            return to.ignore(given, "0 is the default")
        return to.emit(given, f"--{option} {number}", meaning=flag.text)

    return function


def _eval_iters(to: Translator, given: Given, flag: MegatronFlag) -> None:
    number = _float(given.words)
    if number is not None and number <= 0:  # a negative number turns them off as well
        to.ignore(given, "evaluations cannot be turned off; they read --eval-tokens at the end of each stage")
    else:
        _tokens("eval-tokens", steps=True)(to, given, flag)


def _warmup_fraction(to: Translator, given: Given, flag: MegatronFlag) -> None:
    decay = next((to.last[key] for key in ("lr-decay-samples", "lr-decay-iters") if key in to.last), None)
    fraction, number = _float(given.words), _count(decay.words) if decay is not None else None
    unit = _length(to) if decay is not None and decay.key == "lr-decay-samples" else _step_tokens(to)
    if fraction is None or number is None or unit is None:
        to.result.flags.append(given)
        return
    to.emit(given, f"--lr-warmup-tokens {round(fraction * number * unit)}", meaning=f"{fraction:g} x {number * unit:,} tokens of the decay")


def _float(words: Sequence[str]) -> float | None:
    try:
        return float(words[0])
    except (ValueError, IndexError):
        return None


def _exit_duration(to: Translator, given: Given, flag: MegatronFlag) -> None:
    minutes = _count(given.words)
    if minutes is None:
        to.refuse(given, "not a whole number", "--exit-duration 3h30m")
    elif minutes > 30 * 365 * 24 * 60:
        to.ignore(given, "more than 30 years are no limit")
    else:
        to.emit(given, f"--exit-duration {minutes}min", meaning="a time with its unit")


def _profile(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if given.words and given.words[0] not in ("pt", "pt-full"):
        to.result.flags.append(given)
        return
    # Megatron-DeepSpeed's --profile_steps are 2,3 by default; Megatron-LM's two flags count the steps that are done.
    names = ("profile-step-start", "profile-step-end")
    words = (to.value("profile-steps") or "2,3").split(",") if given.words else [to.value(names[0]) or "10", to.value(names[1]) or "12"]
    first, last = _count(words[:1]), _count(words[1:])
    if first is None or last is None:
        return to.refuse(given, f"{' to '.join(words)} are not steps", "--profile 11-12")
    first = max(first, 1) if given.words else first + 1
    marks = [] if given.words or "use-pytorch-profiler" in to.last else ["--profile-nsys"]
    to.emit(given, f"--profile {first}-{max(first, last)}", *marks, meaning="the steps, of which the first is 1")


def _group_query(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if to.value("num-query-groups", "num-key-value-heads") is not None:
        to.ignore(given, "--num-query-groups is enough")
    else:
        to.emit(given, "--num-query-groups 1", meaning="Megatron's default number of groups")


def _no_positions(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if to.value("position-embedding-type") in ("rope", "rotary") or "use-rotary-position-embeddings" in to.last:
        to.ignore(given, "no learned positions, as with rotary ones anyway")
    else:
        to.refuse(given, "a model without positions does not exist here", "--position-embedding-type rope, if that is meant", True)


def _interpolation(to: Translator, given: Given, flag: MegatronFlag) -> None:
    factor = _float(given.words)
    if factor == 1.0:
        to.ignore(given, "a factor of 1 changes nothing")
    else:
        to.emit(given, "--rope-scaling linear", f"--rope-scaling-factor {' '.join(given.words)}", meaning=flag.text)


def _rope_scaling(to: Translator, given: Given, flag: MegatronFlag) -> None:
    factor = [] if to.value("rope-scaling-factor") is not None else ["--rope-scaling-factor 8.0"]
    to.emit(given, "--rope-scaling llama3", *factor, meaning="scaling of Llama 3.1; Megatron's default factor is 8")


def _qk_norm(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if (to.value("normalization") or "").lower() == "layernorm":
        to.refuse(given, "queries and keys are normalized by RMSNorm, in Megatron by --normalization LayerNorm", "", True)
    else:
        to.result.flags.append(given)


def _glu(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if given.words == ("swiglu",):
        to.emit(given, "--swiglu", meaning="SwiGLU")
    else:
        to.refuse(given, "the feed-forward layer has GELU, SwiGLU or GeGLU with the approximation by tanh", "", True)


def _choices(known: Mapping[str, str], refused: Mapping[str, str], write: str) -> Callable[[Translator, Given, MegatronFlag], None]:
    """Returns the function for a flag of ours some of whose values Megatron writes differently.

    Args:
        known: Megatron's value in lower case -> ours.
        refused: Megatron's value in lower case -> why it does not exist here; the model is another one.
        write: what to write instead of a refused value.
    """

    def function(to: Translator, given: Given, flag: MegatronFlag) -> None:
        word = given.words[0] if given.words else ""
        if word.lower() in refused:
            to.refuse(given, refused[word.lower()], write, True)
        elif word.lower() in known and known[word.lower()] != word:
            to.emit(given, f"--{flag.name} {known[word.lower()]}", meaning="another name for the same")
        else:
            to.result.flags.append(given)

    return function


def _split(to: Translator, given: Given, flag: MegatronFlag) -> None:
    joined = "".join(given.words).replace("'", "").replace('"', "").replace(" ", "")
    if given.words == (joined,):
        to.result.flags.append(given)
    else:
        to.emit(given, f"--split {joined}", meaning="without quotes and spaces")


def _exit_interval(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if given.words == ("0",):
        to.ignore(given, "0 means never, as without the flag")
    else:
        to.result.flags.append(given)


def _sequence_parallel(to: Translator, given: Given, flag: MegatronFlag) -> None:
    alone = any(key not in to.ours for key in to.last) and to.value("tensor-model-parallel-size", "model-parallel-size") in (None, "1")
    if alone and not given.words:
        to.ignore(given, "without tensor parallelism there is nothing to share; Megatron turns it off, too")
    else:
        to.result.flags.append(given)


def _cp_comm_type(to: Translator, given: Given, flag: MegatronFlag) -> None:
    words = {"all_gather" if word.lower() == "allgather" else word.lower() for word in given.words}
    (only,) = words if len(words) == 1 else ("",)
    if only in ("a2a", "all_gather"):
        if list(given.words) == [only]:
            to.result.flags.append(given)
        else:
            to.emit(given, f"--cp-comm-type {only}", meaning="the same in all layers")
    elif words <= {"p2p", "a2a", "all_gather", "a2a+p2p"} and not _shares_samples(to):
        to.ignore(given, "without context parallelism nothing is exchanged")
    else:
        meaning = "context-parallel ranks exchange heads for positions (a2a), or gather keys and values (all_gather), in all layers alike"
        to.refuse(given, meaning, "--cp-comm-type a2a")


def _shares_samples(to: Translator) -> bool:
    """Returns whether any stage has context parallelism."""
    size = to.value("context-parallel-size", "ds-sequence-parallel-size")
    in_stages = "context_parallel_size" in " ".join(to.last["stages"].words).replace("-", "_") if "stages" in to.last else False
    return size not in (None, "1") or in_stages


def _sequence_parallel_size(to: Translator, given: Given, flag: MegatronFlag) -> None:
    own = to.last.get("context-parallel-size")
    if own is not None and own.source == given.source and own.words not in (given.words, ("None",)):
        to.refuse(given, f"together with --context-parallel-size {' '.join(own.words)}".rstrip(), "one of them, --context-parallel-size")
    else:
        to.emit(given, f"--context-parallel-size {' '.join(given.words)}", meaning=flag.text)


def _sharding(to: Translator, given: Given, flag: MegatronFlag) -> None:
    level = {"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}.get(given.words[0] if given.words else "")
    if level is None:
        to.refuse(given, "not a strategy of Megatron", "--zero-stage 0, 1, 2 or 3")
    else:
        to.emit(given, f"--zero-stage {level}", meaning=flag.text)


def _fsdp(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if "data-parallel-sharding-strategy" in to.last or "torch-fsdp2-no-reshard-after-forward" in to.last:
        to.ignore(given, "the strategy that is also given decides what ranks share")
    else:
        _zero(to, given, flag)


def _zero(to: Translator, given: Given, flag: MegatronFlag) -> None:
    others = ("zero-stage", "data-parallel-sharding-strategy", "use-torch-fsdp2", "use-custom-fsdp", "use-megatron-fsdp")
    stronger = [key for key in others if key in to.last and key != flag.key]
    if "zero-stage" in stronger or (flag.key == "use-distributed-optimizer" and stronger):
        to.ignore(given, f"--{MEGATRON_FLAGS[stronger[0]].name} decides what ranks share")
    else:
        to.emit(given, flag.here, meaning=flag.text)


def _no_load(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if "finetune" in to.last or "load" not in to.last:
        to.ignore(given, "optimizer and random numbers start again" if "finetune" in to.last else "nothing is loaded")
    else:
        to.refuse(given, "a resumed run continues with its optimizer and its random numbers", "--finetune to start again from the weights")


def _offload(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if "deepspeed-config" in to.last:
        to.ignore(given, flag.text)
    else:
        to.refuse(given, flag.text, flag.here)


def _mock_data(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if to.dry_run:
        to.ignore(given, "--dry-run needs no data")
    else:
        to.refuse(given, flag.text, "--data-path PREFIX of a dataset")


def _rampup(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if len(given.words) == 3 and given.words[0] == to.value("global-batch-size"):
        to.ignore(given, "the batch does not grow: it starts at --global-batch-size")
    else:
        to.refuse(given, flag.text, flag.here)


_OTHER_TOKENIZERS = ("bertwordpiecelowercase", "bertwordpiececase", "multimodaltokenizer", "nullmultimodaltokenizer", "sfttokenizer")
_position_names = _choices(
    {"rotary": "rope", "absolute": "learned_absolute"},
    {
        "relative": "there are no relative positions",
        "alibi": "there are no ALiBi positions",
        "mrope": "positions have one dimension",
        "yarn": "YaRN is --position-embedding-type rope with --rope-scaling yarn, its factor and original positions",
        "none": "a model without positions does not exist here",
    },
    "--position-embedding-type rope or learned_absolute",
)


def _positions(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if "use-rotary-position-embeddings" in to.last and given.words[:1] not in (("rope",), ("rotary",)):
        to.ignore(given, "Megatron takes rotary positions, because of --use-rotary-position-embeddings")
    else:
        _position_names(to, given, flag)


_FUNCTIONS: dict[str, Callable[[Translator, Given, MegatronFlag], None]] = {
    "train-iters": _tokens("train-tokens", steps=True),
    "train-samples": _tokens("train-tokens", steps=False),
    "lr-decay-iters": _tokens("lr-decay-tokens", steps=True),
    "lr-decay-samples": _tokens("lr-decay-tokens", steps=False),
    "lr-warmup-iters": _steps("lr-warmup-steps"),
    "lr-warmup-samples": _tokens("lr-warmup-tokens", steps=False),
    "lr-wsd-decay-iters": _steps("lr-wsd-decay-steps"),
    "lr-wsd-decay-samples": _tokens("lr-wsd-decay-tokens", steps=False),
    "eval-iters": _eval_iters,
    "lr-warmup-fraction": _warmup_fraction,
    "exit-duration-in-mins": _exit_duration,
    "exit-interval": _exit_interval,
    "profile": _profile,
    "group-query-attention": _group_query,
    "no-position-embedding": _no_positions,
    "rotary-seq-len-interpolation-factor": _interpolation,
    "use-rope-scaling": _rope_scaling,
    "qk-layernorm": _qk_norm,
    "glu-activation": _glu,
    "normalization": _choices({"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}, {}, ""),
    "position-embedding-type": _positions,
    "tokenizer-type": _choices(
        {
            "gptsentencepiecetokenizer": "SentencePieceTokenizer",
            "hftokenizer": "HuggingFaceTokenizer",
            "pretrainedfromhf": "HuggingFaceTokenizer",
        },
        dict.fromkeys(_OTHER_TOKENIZERS, "a tokenizer of models that do not exist here"),
        "the tokenizer of the data",
    ),
    **muon.FUNCTIONS,
    **experts.FUNCTIONS,
    "lr-wsd-decay-style": _choices({"minus_sqrt": "minus-sqrt"}, {}, ""),
    "split": _split,
    "sequence-parallel": _sequence_parallel,
    "cp-comm-type": _cp_comm_type,
    "ds-sequence-parallel-size": _sequence_parallel_size,
    "data-parallel-sharding-strategy": _sharding,
    "use-torch-fsdp2": _fsdp,
    "use-custom-fsdp": _fsdp,
    "use-megatron-fsdp": _fsdp,
    "use-distributed-optimizer": _zero,
    "no-load-optim": _no_load,
    "no-load-rng": _no_load,
    "cpu-optimizer": _offload,
    "optimizer-cpu-offload": _offload,
    "mock-data": _mock_data,
    "rampup-batch-size": _rampup,
}
