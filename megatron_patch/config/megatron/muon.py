"""Megatron's flags for Muon and for the learning rate of embeddings: what Megatron has by default, and where its update differs.

In: the translator and a flag, or the flags and options of a run. Out: rows and flags in the translator's result; sentences for the user.
Megatron's mathematics is that of NVIDIA's Emerging-Optimizers (`OrthogonalizedOptimizer.step`, `newton_schulz`), which is the one here.
Its defaults are those of `megatron/training/arguments.py` and `megatron/core/optimizer/optimizer_config.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from megatron_patch.config.megatron.flags import MegatronFlag
from megatron_patch.config.megatron.translator import Given, Translator
from megatron_patch.config.options import ScheduleOptions

NAMES = ("muon", "dist_muon")
"""What Megatron's --optimizer calls it; in dist_muon data-parallel ranks share the optimizer's state."""
DEFAULTS = (
    ("muon-momentum", "0.9"),
    ("no-muon-nesterov", ""),
    ("muon-extra-scale-factor", "1.0"),
    ("muon-coefficient-type", "quintic"),
)
"""Megatron's defaults that are others here: flag -> value."""
OTHER_NAMES = {"muon-nesterov": ("muon-use-nesterov",)}
"""Flag -> other names that Megatron has, or had, for it."""
_SHARED = (
    "zero-stage",
    "use-distributed-optimizer",
    "data-parallel-sharding-strategy",
    "use-torch-fsdp2",
    "use-custom-fsdp",
    "use-megatron-fsdp",
)


def optimizer(to: Translator, given: Given, flag: MegatronFlag) -> None:
    """Translates --optimizer."""
    name = given.words[0].lower() if given.words else ""
    if name == "adam":
        to.emit(given, "--optimizer adamw", meaning="another name for the same")
    elif name == "dist_muon":
        zero = [] if any(key in to.last for key in _SHARED) else ["--zero-stage 1"]
        to.emit(given, "--optimizer muon", *zero, meaning="Muon whose state data-parallel ranks share")
    else:
        to.result.flags.append(given)


def _unused(to: Translator, given: Given) -> bool:
    """Whether the run has another optimizer, which is then noted."""
    if to.value("optimizer") in NAMES:
        return False
    to.ignore(given, "read only with --optimizer muon")
    return True


def _own(to: Translator, given: Given, flag: MegatronFlag) -> None:
    """Takes over a flag that is the same here, or drops it where Megatron would not read it: this program refuses it with AdamW."""
    name = to.value("optimizer")
    if name in ("adam", "sgd") or (name is None and any(key not in to.ours for key in to.last)):
        to.ignore(given, "read only with --optimizer muon")
    elif flag.here and flag.key not in to.ours:
        to.emit(given, flag.here, meaning=flag.text)
    elif flag.key == "muon-coefficient-type" and name in NAMES and given.words[:1] not in (("simple",), ("quintic",), ("polar_express",)):
        to.refuse(given, "there are no such coefficients", "--muon-coefficient-type simple, quintic or polar_express")
    else:
        to.result.flags.append(given)


def _split_qkv(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if not _unused(to, given):
        to.refuse(given, flag.text)


def _tensor_parallel_mode(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if _unused(to, given):
        return
    if given.words[:1] == ("blockwise",) and to.value("tensor-model-parallel-size", "model-parallel-size") not in (None, "1"):
        to.refuse(
            given,
            "Megatron's default, which orthogonalizes the part of each tensor-parallel rank alone, so that the update depends on the "
            "layout; here every matrix is orthogonalized as a whole",
            "--muon-tp-mode duplicated, which is what happens here",
        )
    else:
        to.ignore(given, "every matrix is orthogonalized as a whole, under every layout")


def _precision(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if _unused(to, given):
        return
    if given.words[:1] != ("medium",) and ("bf16" in to.last or "fp16" in to.last):
        to.refuse(given, "with --bf16 and --fp16 matrices are orthogonalized in bfloat16", "--muon-fp32-matmul-prec medium")
    else:
        to.ignore(given, "matrices are orthogonalized in bfloat16 with --bf16 and --fp16, else in float32")


def _scalar_optimizer(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if _unused(to, given):
        return
    if flag.is_harmless(list(given.words)):
        to.ignore(given, flag.text)
    else:
        to.refuse(given, flag.text, "--muon-scalar-optimizer adam")


def _decoupled_min_lr(to: Translator, given: Given, flag: MegatronFlag) -> None:
    lr, least, rate, own = (_float(to.value(key)) for key in ("lr", "min-lr", "decoupled-lr", "decoupled-min-lr"))
    if rate is None:
        return to.ignore(given, "read only with --decoupled-lr")
    if lr is None or own is None:
        why = "--lr is missing, or one of both values is not a number, so that they cannot be compared"
        return to.refuse(given, why, "--lr, --min-lr and --decoupled-lr")
    here = (least or 0.0) * rate / lr if lr else 0.0
    if abs(own - here) <= 1e-3 * max(own, here):
        return to.ignore(given, "--min-lr x --decoupled-lr / --lr, as here")
    return to.refuse(
        given,
        "--decoupled-lr scales the whole schedule of embeddings and head, so that their lowest rate is "
        f"--min-lr x --decoupled-lr / --lr = {here:g}",
        f"--decoupled-min-lr {here:g}",
    )


def _float(word: str | None) -> float | None:
    try:
        return float(word) if word is not None else None
    except ValueError:
        return None


_OWN = "muon-momentum muon-nesterov muon-use-nesterov muon-scale-mode muon-num-ns-steps muon-extra-scale-factor muon-coefficient-type"
FUNCTIONS = {
    **dict.fromkeys(_OWN.split(), _own),
    "optimizer": optimizer,
    "muon-no-split-qkv": _split_qkv,
    "muon-tp-mode": _tensor_parallel_mode,
    "muon-fp32-matmul-prec": _precision,
    "muon-scalar-optimizer": _scalar_optimizer,
    "decoupled-min-lr": _decoupled_min_lr,
}
"""Flag -> function that translates it."""


def defaults(values: Mapping[str, str]) -> list[tuple[str, str]]:
    """Returns the flags and values that Megatron would have by default for what this module translates.

    Args:
        values: the flags of a command line -> their first value.
    """
    result: list[tuple[str, str]] = []
    if values.get("optimizer") in NAMES:
        result += DEFAULTS
        if values.get("tensor-model-parallel-size", values.get("model-parallel-size", "1")) != "1":
            result.append(("muon-tp-mode", "blockwise"))
    if "decoupled-lr" in values:
        result.append(("decoupled-min-lr", values.get("min-lr", "0.0")))
    return result


def different_defaults(given: Collection[str], schedule: ScheduleOptions) -> list[str]:
    """Returns what this program has for flags that were not given, with Megatron's value, such as "momentum 0.95 instead of 0.9 (…)"."""
    result, rate, least = [], schedule.decoupled_lr, schedule.min_lr
    if rate is not None and "decoupled-min-lr" not in given and least > 0 and schedule.lr > 0 and rate != schedule.lr:
        result.append(f"{least * rate / schedule.lr:g} instead of {least:g} as the lowest rate of word embeddings and head")
    if schedule.optimizer != "muon":
        return result
    here = (
        f"Muon's momentum {schedule.muon_momentum:g} instead of 0.9",
        "Nesterov's momentum instead of the momentum alone" if schedule.muon_nesterov else "",
        f"a factor of Muon's update of {schedule.muon_extra_scale_factor:g} instead of 1",
        f"{schedule.muon_coefficient_type} coefficients instead of quintic",
    )
    for text, (flag, value) in zip(here, DEFAULTS, strict=True):
        name = flag.removeprefix("no-")
        if text and not {name, flag, *OTHER_NAMES.get(name, ())} & set(given):
            result.append(f"{text} (--{f'{flag} {value}'.rstrip()})")
    return result


def other_updates(swiglu: bool, learned_positions: bool) -> list[str]:
    """Returns where Muon's update of a model is another one than Megatron's, whatever the flags are.

    Args:
        swiglu: whether the feed-forward layers have a gate.
        learned_positions: whether positions have weights.
    """
    result: list[str] = []
    if swiglu:
        result.append(
            "Muon orthogonalizes the gate and the up projection of SwiGLU each by itself; Megatron orthogonalizes both as one matrix"
        )
    if learned_positions:
        result.append("AdamW steps the learned positions, as it does all embeddings; Megatron's Muon steps them")
    return result
