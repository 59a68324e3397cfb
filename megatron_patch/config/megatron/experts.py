"""The flags of Megatron's mixture of experts whose translation depends on other flags, a function for each.

In: the translator, a flag as it was given, and its record in the table. Out: rows and flags in the translator's result. In Megatron's
words, a coefficient that is not given is 0: no auxiliary loss. In this program's own words, which have no flag that only Megatron has, it
is this program's default.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_patch.config.megatron.expert_flags import EXPERTS
from megatron_patch.config.megatron.flags import BIGSCIENCE, DS, LM, Kind, MegatronFlag
from megatron_patch.config.megatron.translator import MEGATRON_FLAGS, Given, Translator

_TYPE, _COEFFICIENT = "moe-router-load-balancing-type", "moe-aux-loss-coeff"
_GLOBAL = f"--{_TYPE} global_aux_loss"
_BY_MICRO_BATCH = "this loss is that of each micro-batch, so that results would depend on the micro-batch size"


def has_experts(to: Translator) -> bool:
    """Returns whether the flags ask for experts."""
    return to.value("num-experts") not in (None, "1")


def _in_megatrons_words(to: Translator) -> bool:
    return any(key in MEGATRON_FLAGS and key not in to.ours for key in to.last)


def _is_zero(value: str | None) -> bool:
    """Returns whether a coefficient is 0, as where it is not given."""
    try:
        return value is None or float(value) == 0
    except ValueError:
        return False


def _num_experts(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if given.words == ("1",):
        return to.ignore(given, "a single expert is an ordinary feed-forward layer")
    others = [MEGATRON_FLAGS[key] for key in to.last if key in MEGATRON_FLAGS and key not in to.ours]
    of_megatron_lm = any(key.startswith("moe-") and key in MEGATRON_FLAGS and MEGATRON_FLAGS[key].source == LM for key in to.last)
    if len(given.words) > 1 or (not of_megatron_lm and any(other.source in (DS, BIGSCIENCE) for other in others)):
        reason = "Megatron-DeepSpeed's experts have a capacity and drop tokens, and those here do not"
        return to.refuse(given, reason, "--num-experts N with --moe-router-topk K, as in Megatron-LM", True)
    to.result.flags.append(given)
    if others and _TYPE not in to.last and _is_zero(to.value(_COEFFICIENT)):
        to.emit(given, f"--{_TYPE} none", meaning="Megatron's default coefficient of the auxiliary loss is 0")
    return None


def _balancing(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if not has_experts(to) and _in_megatrons_words(to):
        return to.ignore(given, "there are no experts")
    words, coefficient = [word.lower() for word in given.words], to.value(_COEFFICIENT)
    known = {"aux_loss", "seq_aux_loss", "global_aux_loss"}
    if len(words) > 1 and {*words} <= known:
        return to.refuse(given, "one loss balances the load", _GLOBAL, True)
    word = words[0] if words else ""
    if word in ("aux_loss", "seq_aux_loss") and _is_zero(coefficient):
        return to.emit(given, f"--{_TYPE} none", meaning="a coefficient of 0 is no loss")
    if word in ("aux_loss", "seq_aux_loss"):
        return to.refuse(given, _BY_MICRO_BATCH, _GLOBAL, True)
    if word == "sinkhorn":
        return to.refuse(given, "experts are chosen by score alone, not by Sinkhorn's assignment of a micro-batch", _GLOBAL, True)
    to.result.flags.append(given)
    if word == "global_aux_loss" and coefficient is None and _in_megatrons_words(to):
        to.emit(given, f"--{_COEFFICIENT} 0", meaning="Megatron's default coefficient is 0")
    return None


def _coefficient(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if not has_experts(to) and _in_megatrons_words(to):
        return to.ignore(given, "there are no experts")
    if len(given.words) > 1:
        return to.refuse(given, "one loss balances the load", f"{_GLOBAL} with one coefficient", True)
    if not _is_zero(" ".join(given.words)):
        if _TYPE not in to.last and _in_megatrons_words(to):
            return to.refuse(given, f"Megatron's default type is aux_loss: {_BY_MICRO_BATCH}", f"{_GLOBAL}, too", True)
    elif (to.value(_TYPE) or "aux_loss").lower() in ("aux_loss", "seq_aux_loss"):
        return to.ignore(given, "0 is no loss")
    to.result.flags.append(given)
    return None


def _score(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if given.words == ("sigmoid",) and to.value("moe-router-topk") == "1" and _in_megatrons_words(to):
        reason = "with --moe-router-topk 1 Megatron weighs an expert by its sigmoid, and here its weight would be 1"
        return to.refuse(given, reason, "--moe-router-topk 2, or softmax with --moe-router-pre-softmax", True)
    return _same(to, given, flag)


def _same(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if has_experts(to) or not _in_megatrons_words(to):
        to.result.flags.append(given)
    else:
        to.ignore(given, "there are no experts")


def _refused(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if flag.is_harmless(list(given.words)):
        to.ignore(given, f"{flag.text}; this value changes nothing")
    elif has_experts(to):
        to.refuse(given, flag.text, flag.here)
    else:
        to.ignore(given, "there are no experts")


def _of_deepspeed(to: Translator, given: Given, flag: MegatronFlag) -> None:
    if has_experts(to):
        to.refuse(given, flag.text, "", True)
    else:
        to.ignore(given, f"{flag.text}, which is off")


FUNCTIONS: dict[str, Callable[[Translator, Given, MegatronFlag], None]] = {
    **{flag.key: _same for flag in EXPERTS if flag.kind is Kind.SAME},
    **{flag.key: _refused for flag in EXPERTS if flag.kind is Kind.REFUSED},
    **{flag.key: _of_deepspeed for flag in EXPERTS if flag.kind is Kind.DETAIL},
    "num-experts": _num_experts,
    _TYPE: _balancing,
    _COEFFICIENT: _coefficient,
    "moe-router-score-function": _score,
}
