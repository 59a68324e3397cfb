"""Adds to a command line of Megatron those of Megatron's defaults that are others here, so that a migrated run means the same.

In: the flags as given. Out: the flags with defaults before them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_patch.cli.migrate_deepspeed import DEEPSPEEDS_JSON
from megatron_patch.config.megatron import muon
from megatron_patch.config.megatron.translator import Given

MEGATRONS_DEFAULT = "Megatron's default"
"""The source of flags that are added."""
_SAME_FLAG = {
    "normalization": ("model-family",),
    "position-embedding-type": ("use-rotary-position-embeddings", "model-family"),
    "norm-epsilon": ("layernorm-epsilon", "model-family"),
    "swiglu": ("glu-activation", "model-family"),
    "disable-bias-linear": ("model-family",),
    "untie-embeddings-and-output-weights": ("model-family",),
    "eval-tokens": ("eval-iters",),
    **muon.OTHER_NAMES,
}


def with_defaults(given: Sequence[Given], absent: set[str], ranks: int | None) -> list[Given]:
    """Returns flags with Megatron's defaults before them, without a number of query groups whose switch is missing.

    Megatron-LM, which alone has --num-query-groups, reads it only together with --group-query-attention.

    Args:
        given: the flags as given.
        absent: names of flags whose values are not known; they get no default.
        ranks: number of ranks, from which the global batch follows if it is not given; None: not known.
    """
    values = {flag.key: flag.words[0] if flag.words else "" for flag in given}
    present = {*values, *absent}
    defaults: list[tuple[str, str]] = [("model-family", _family(values))]
    gated = "swiglu" in values or values.get("glu-activation") == "swiglu"
    defaults += [
        ("normalization", "LayerNorm"),
        ("swiglu" if gated else "no-swiglu", ""),
        ("position-embedding-type", "learned_absolute"),
        ("norm-epsilon", "1e-05"),
        ("no-disable-bias-linear", ""),
        ("no-untie-embeddings-and-output-weights", ""),
        ("attention-dropout", "0.1"),
        ("hidden-dropout", "0.1"),
        ("weight-decay", "0.01"),
        ("adam-beta2", "0.999"),
        ("lr-decay-style", "linear"),
        ("log-interval", "100"),
        ("eval-interval", "1000"),
        ("eval-iters", "100"),
    ]
    # DeepSpeed's Muon has other defaults, which come with its section.
    defaults += muon.defaults({flag.key: flag.words[0] if flag.words else "" for flag in given if flag.source != DEEPSPEEDS_JSON})
    if values.get("lr-decay-style") == "WSD":
        defaults.append(("lr-wsd-decay-style", "exponential"))
    if gated and "hidden-size" in values and values["hidden-size"].isdigit():
        # BigScience's fork, whose flag is --glu-activation, keeps four times the hidden size.
        width = int(4 * int(values["hidden-size"]) * 2 / 3 / 64) * 64 if "swiglu" in values else 4 * int(values["hidden-size"])
        defaults.append(("ffn-hidden-size", str(width)))
    if "micro-batch-size" in values and ranks is not None and (data := _data_parallel_size(values, ranks)):
        defaults.append(("global-batch-size", str(int(values["micro-batch-size"]) * data)))
    added = [
        Given(key, (value,) if value else (), MEGATRONS_DEFAULT)
        for key, value in defaults
        if not present & {key, (name := key.removeprefix("no-")), *_SAME_FLAG.get(name, ())}
        and not (key.startswith("eval") and values.get("eval-iters") == "0")
    ]
    return [*added, *(flag for flag in given if flag.key != "num-query-groups" or "group-query-attention" in values)]


def _family(values: dict[str, str]) -> str:
    """Returns the family that is nearest to what the script means."""
    rotary = "use-rotary-position-embeddings" in values or values.get("position-embedding-type") in ("rope", "rotary")
    gated = "swiglu" in values or values.get("glu-activation") == "swiglu"
    rms = values.get("normalization", "").lower() == "rmsnorm"
    if not rotary and not gated and not rms:
        return "gpt2"
    return "qwen3" if rms and gated and rotary and "qk-layernorm" in values else "llama"


def _data_parallel_size(values: dict[str, str], ranks: int) -> int | None:
    """Returns the number of data-parallel ranks, or None if a size is not a number."""
    names = ("tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size", "ds-sequence-parallel-size")
    sizes = [values.get(key, "1") for key in names]
    if not all(size.isdigit() and int(size) for size in sizes) or not values["micro-batch-size"].isdigit():
        return None
    return max(1, ranks // math.prod(int(size) for size in sizes))
