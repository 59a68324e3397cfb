"""Lists the stages of a run: those of its recipe, or the entries of `stages:`.

In: stage options. Out: `StageSpec`s, each of them checked; `plan_builder` turns them into a plan. A recipe is a short way to write a list:

- patch-train (arXiv 2407.12665): patches for λ = 2/3 of the tokens, then single tokens; each step has the same number of tokens;
  learning rate and optimizer restart at the switch.
- token-superposition (arXiv 2605.06546): patches for r = 0.3 of the compute, then single tokens; each step has the same number of
  positions; one warm-up-stable-decay schedule over the run; the optimizer is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from megatron_patch.config.checks import check_count, check_text
from megatron_patch.config.option_types import flag_of
from megatron_patch.config.options import StageOptions
from megatron_patch.config.yaml_files import RepeatedKeys, load_yaml
from megatron_patch.data.dataset_paths import check_word
from megatron_patch.data.same_dataset import named_twice
from megatron_patch.errors import ConfigError
from megatron_patch.stages import POSITION_WEIGHTS, LrPolicy, LrStyle, OptimizerPolicy, Side, WsdDecayStyle
from megatron_patch.utils.console import shortened
from megatron_patch.utils.findings import Findings
from megatron_patch.utils.registry import lookup, suggestion
from megatron_patch.utils.units import parse_count

AmountKind = Literal["tokens", "token_share", "compute_share", "step_share", "steps"]
AMOUNTS = get_args(AmountKind)


@dataclass(frozen=True)
class StageSpec:
    """A stage as described: an entry of `stages:`, or what a recipe returns. A value of None is taken from the run's options.

    At most one amount is given: `tokens`, `token_share` (of --train-tokens), `compute_share` (of the run's positions), `step_share`
    (of the run's steps) or `steps`. One stage without an amount takes the rest.

    Raises:
        ConfigError: a word is not one of those allowed.
    """

    name: str | None = None
    patch_size: int = 1
    tokens: int | None = None
    token_share: float | None = None
    compute_share: float | None = None
    step_share: float | None = None
    steps: int | None = None
    sample: Literal["constant-positions", "constant-tokens"] | None = None
    batch: Literal["constant-tokens", "constant-positions"] | None = None
    micro_batch_size: int | None = None
    context_parallel_size: int | None = None
    moe_aux_loss_coeff: float | None = None
    moe_z_loss_coeff: float | None = None
    moe_router_bias_update_rate: float | None = None
    side: Side = "both"
    position_weights: str | tuple[float, ...] | None = None
    anneal_share: float | None = None
    lr_policy: LrPolicy | None = None
    lr: float | None = None
    min_lr: float | None = None
    lr_warmup_tokens: int | None = None
    lr_warmup_steps: int | None = None
    lr_decay_style: LrStyle | None = None
    lr_decay_tokens: int | None = None
    lr_decay_steps: int | None = None
    lr_wsd_decay_tokens: int | None = None
    lr_wsd_decay_steps: int | None = None
    lr_wsd_decay_style: WsdDecayStyle | None = None
    optimizer: OptimizerPolicy | None = None
    data_path: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for key, choices in _CHOICES.items():
            value = getattr(self, key)
            if value is not None and value not in choices:
                raise ConfigError(f"stage {self.name!r}: {key} is {value!r}"[:300], ", ".join(choices), f"choose another {key}")
        for in_tokens, in_steps in _TWO_UNITS:
            if getattr(self, in_tokens) is not None and getattr(self, in_steps) is not None:
                raise _two_units(f"stage {self.name!r}", in_tokens, in_steps)


def _two_units(where: str, in_tokens: str, in_steps: str) -> ConfigError:
    return ConfigError(f"{where}: {in_tokens} together with {in_steps}", "one of them", f"remove {in_tokens} or {in_steps}")


_CHOICES: dict[str, tuple[str, ...]] = {
    "sample": ("constant-positions", "constant-tokens"),
    "batch": ("constant-tokens", "constant-positions"),
    "side": get_args(Side),
    "lr_policy": get_args(LrPolicy),
    "lr_decay_style": get_args(LrStyle),
    "lr_wsd_decay_style": get_args(WsdDecayStyle),
    "optimizer": get_args(OptimizerPolicy),
}
_TWO_UNITS = (
    ("lr_warmup_tokens", "lr_warmup_steps"),
    ("lr_decay_tokens", "lr_decay_steps"),
    ("lr_wsd_decay_tokens", "lr_wsd_decay_steps"),
)
"""Keys that give one length in two units."""
COUNTS = {"patch_size", "tokens", "steps", "micro_batch_size", "context_parallel_size", *(key for keys in _TWO_UNITS for key in keys)}
SCHEDULE_KEYS = (
    "lr",
    "min_lr",
    "lr_warmup_tokens",
    "lr_warmup_steps",
    "lr_decay_style",
    "lr_decay_tokens",
    "lr_decay_steps",
    "lr_wsd_decay_tokens",
    "lr_wsd_decay_steps",
    "lr_wsd_decay_style",
)
BALANCE_KEYS = {
    "moe_aux_loss_coeff": "aux_loss_coeff",
    "moe_z_loss_coeff": "z_loss_coeff",
    "moe_router_bias_update_rate": "bias_update_rate",
}
"""The keys of the balance of experts, and their fields of `ExpertBalance`."""
_NUMBERS = {"token_share", "compute_share", "step_share", "anneal_share", "lr", "min_lr", *BALANCE_KEYS}


def parse_blend(words: Sequence[str], flag: str = "--data-path") -> tuple[tuple[str, float], ...]:
    """Returns a blend as (prefix, weight), with weights that sum to 1.

    Args:
        words: only prefixes, or a weight before each prefix.
        flag: name of the option in errors.

    Raises:
        ConfigError: a weight without a prefix, a weight that is not above zero, or a dataset that is named twice, in any spelling.
        DataError: an address is refused, see `check_address`.
    """
    if not words:
        return ()
    given = f"{flag} {shortened(' '.join(words))}"
    mixed = ConfigError(
        f"{given}: not every prefix has a weight",
        "only prefixes, or a weight before every prefix: 0.7 web 0.3 code",
        "give every prefix a weight, or none",
    )
    if not has_weights(words):
        pairs = [(word, 1.0) for word in words]
        if any(_weight(word) is not None for word in words):
            raise mixed
    else:
        weights = [_weight(word) for word in words[::2]]
        if len(words) % 2 or None in weights:
            raise mixed
        pairs = list(zip(words[1::2], cast("list[float]", weights), strict=True))
        if any(_weight(prefix) is not None for prefix, _ in pairs):
            raise mixed
    for prefix, _ in pairs:
        check_word(prefix)
    total = sum(weight for _, weight in pairs)
    if not all(weight > 0 for _, weight in pairs) or not math.isfinite(total):
        raise ConfigError(
            f"{given}: a weight is not above 0, or not finite",
            "finite weights above 0",
            "correct the weight; remove a corpus instead of giving it no weight",
        )
    if (same := named_twice([prefix for prefix, _ in pairs])) is not None:
        raise ConfigError(
            f"{flag} names a dataset twice: {' and '.join(same)}",
            "each dataset once",
            "give it once, with the sum of its weights; write a pattern in quotes",
        )
    return tuple((prefix, weight / total) for prefix, weight in pairs)


def has_weights(words: Sequence[str]) -> bool:
    """Returns whether a blend, as `parse_blend` takes it, begins with a weight."""
    return bool(words) and _weight(words[0]) is not None


def _weight(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def parse_epoch_limits(words: Sequence[str], corpora: Sequence[str]) -> dict[str, float]:
    """Reads --max-epochs: NUMBER limits all corpora, PREFIX=NUMBER limits one of them and overrides NUMBER.

    Args:
        words: the values of the flag.
        corpora: the prefixes of all corpora that the run reads.

    Returns:
        The limit of each corpus that has one, in epochs.

    Raises:
        ConfigError: a limit is not a number above zero, all corpora are limited twice, or the run does not read a corpus.
    """
    limits: dict[str, float] = {}
    for word in sorted(words, key=lambda word: "=" in word):
        name, _, number = word.rpartition("=")
        try:
            limit = float(number)
        except ValueError:
            limit = 0.0
        if not limit > 0 or (not name and limits):
            raise ConfigError(
                f"--max-epochs {' '.join(words)}", "one number above 0 for all corpora, PREFIX=NUMBER for one", "correct --max-epochs"
            )
        if name and name not in corpora:
            raise ConfigError(
                f"--max-epochs {word}: the run does not read {name}",
                f"the run's corpora: {', '.join(corpora) or 'none'}",
                suggestion(name, corpora) or "remove it",
            )
        limits |= {name: limit} if name else dict.fromkeys(corpora, limit)
    return limits


_MOST_STAGES = 200
_EXAMPLE = "[{patch_size: 4, token_share: 0.667}, {patch_size: 1}]"


def parse_stages(text: str) -> tuple[StageSpec, ...]:
    """Reads the `stages:` list from YAML or JSON text.

    Raises:
        ConfigError: the text is not a list of mappings, a key is unknown, or a value has the wrong type.
    """
    try:
        entries = load_yaml(text)
    except RepeatedKeys as error:
        raise ConfigError(f"stages: {error}", "each key once in a stage", "remove the other ones") from error
    except ValueError as error:
        raise ConfigError(f"stages: not valid YAML: {error}", _EXAMPLE, "correct the list") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError("stages: is not a list of mappings", _EXAMPLE, "write one mapping for each stage")
    if len(entries) > _MOST_STAGES:
        raise ConfigError(f"stages: has {len(entries):,} entries", f"up to {_MOST_STAGES}", "merge stages")
    findings = Findings("in stages", "stages: ")
    specs = tuple(_read_entry(entry, number, findings) for number, entry in enumerate(entries, start=1))
    findings.raise_all()
    return specs


def _read_entry(entry: Mapping[str, Any], number: int, findings: Findings) -> StageSpec:
    """Returns the entry with this number (from 1) of `stages:`; what is wrong with it is added to the findings, and left out."""
    known = [f.name for f in dataclasses.fields(StageSpec)]
    values: dict[str, Any] = {}
    seen: set[str] = set()
    for key, value in entry.items():
        name = str(key).replace("-", "_")
        where = f"stages: entry {number}: {name}"
        if name in seen:
            findings.add(f"{where} is given twice, with a dash and with an underscore", "each key once", "remove one of them")
        elif name not in known:
            findings.add(f"{where} is not a known key", ", ".join(known), suggestion(name, known) or "remove it")
        elif value is not None:
            found = findings.attempt(functools.partial(_read_value, name, value, where), None)
            values |= {} if found is None else {name: found}
        seen.add(name)
    for in_tokens, in_steps in _TWO_UNITS:
        if in_tokens in values and in_steps in values:
            findings.errors.append(_two_units(f"stages: entry {number}", in_tokens, in_steps))
            del values[in_steps]
    return StageSpec(**values)


def _read_value(name: str, value: Any, where: str) -> Any:
    """Returns the value of a key of an entry, checked."""
    if name in COUNTS:
        try:
            value = parse_count(value)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.what}", error.allowed, error.do) from error
        check_count(name, value, where)
    elif name in _NUMBERS:
        value = _number(value, where)
        if name in BALANCE_KEYS and value < 0.0:
            raise ConfigError(f"{where} is {value:g}", "numbers from 0", f"correct {name}, or remove it")
    elif name in _CHOICES and value not in _CHOICES[name]:
        raise ConfigError(f"{where} is {value!r}"[:300], ", ".join(_CHOICES[name]), "choose one of these words")
    elif name == "position_weights" and isinstance(value, list):
        value = tuple(_number(weight, where) for weight in value)
    elif name in ("name", "position_weights") and not isinstance(value, str):
        allowed = "a text" if name == "name" else f"{', '.join(POSITION_WEIGHTS)}, or a list of numbers"
        raise ConfigError(f"{where} is {value!r}"[:300], allowed, f"correct {name}")
    elif name == "name":
        check_text([value], f"{where}: ")
    elif name == "data_path":
        words = value if isinstance(value, list) else str(value).split()
        if isinstance(value, dict) or not words or any(isinstance(word, (list, dict)) for word in words):
            raise ConfigError(
                f"{where} is {value!r}"[:300], "a prefix, or a list of weights and prefixes: [0.7, web, 0.3, code]", "correct data_path"
            )
        value = tuple(str(word) for word in words)
        check_text(value, f"{where}: ")
    return value


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ConfigError(f"{where} is {value!r}"[:300], "a number", "write a number, as 0.5 or 1e-3")
    return number


def recipe_name(options: StageOptions) -> str | None:
    """Returns the name of the recipe: the one given, else patch-train for patches and token-level without them; None with `stages:`."""
    if options.stages is not None:
        return None
    return options.recipe or ("patch-train" if (options.patch_size or 1) > 1 else "token-level")


def stage_specs(options: StageOptions) -> tuple[StageSpec, ...]:
    """Returns the stages that the options describe: the entries of `stages:`, or what the recipe makes of the other options.

    Raises:
        ConfigError: an unknown recipe, options that contradict the recipe or the list, or a bad list.
    """
    name = recipe_name(options)
    if name is None:
        return _listed_stages(options)
    specs = lookup(RECIPES, name, "--recipe")(options)
    if not specs:
        raise ConfigError(f"--recipe {name} returns no stages", "at least one stage", "correct the recipe")
    return specs


def _listed_stages(options: StageOptions) -> tuple[StageSpec, ...]:
    if options.recipe or options.patch_size not in (None, 1) or _given_shares(options):
        raise ConfigError(
            "stages: together with --recipe, --patch-size or a patch share",
            "a recipe or a list of stages",
            "write the patch sizes and amounts into the list",
        )
    assert options.stages is not None
    return parse_stages(options.stages)


def _given_shares(options: StageOptions) -> dict[str, float]:
    """Returns the share of patches by the name of the option that gives it; empty where the recipe decides.

    Raises:
        ConfigError: both shares are given, or one is not between 0 and 1.
    """
    shares = {"patch_fraction": options.patch_fraction, "patch_compute_share": options.patch_compute_share}
    given = {name: value for name, value in shares.items() if value is not None}
    if len(given) > 1:
        raise ConfigError("--patch-fraction together with --patch-compute-share", "one of them", "remove one of the two")
    for name, share in given.items():
        if not 0.0 < share < 1.0:
            raise ConfigError(f"{flag_of(name)} {share}", "a share between 0 and 1", "give 0.667, for example")
    return given


def _patch_stage(options: StageOptions, recipe: str, default_amount: Mapping[str, float]) -> StageSpec:
    """Returns the first stage of a recipe of two: patches of --patch-size for the given share of the run, else the default."""
    if options.patch_size is None or options.patch_size < 2:
        raise ConfigError(
            f"--recipe {recipe} with --patch-size {options.patch_size or 1}",
            "a patch size of at least 2",
            "give --patch-size 4, for example",
        )
    given = _given_shares(options)
    amount: dict[str, Any] = dict(default_amount)
    if "patch_fraction" in given:
        amount = {"token_share": given["patch_fraction"]}
    elif "patch_compute_share" in given:
        amount = {"compute_share": given["patch_compute_share"]}
    return StageSpec(name="patch", patch_size=options.patch_size, anneal_share=options.anneal_share, **amount)


def _patch_train(options: StageOptions) -> tuple[StageSpec, ...]:
    patch = _patch_stage(options, "patch-train", {"token_share": 2 / 3})
    return patch, StageSpec(name="token", lr_policy="restart", optimizer="reset")


def _token_superposition(options: StageOptions) -> tuple[StageSpec, ...]:
    patch = _patch_stage(options, "token-superposition", {"compute_share": 0.3})
    token = StageSpec(name="token", lr_policy="continue", optimizer="keep")
    return tuple(dataclasses.replace(stage, batch="constant-positions", lr_decay_style="WSD") for stage in (patch, token))


def _token_level(options: StageOptions) -> tuple[StageSpec, ...]:
    if options.patch_size not in (None, 1) or _given_shares(options):
        raise ConfigError("--recipe token-level with a patch size or a patch share", "--patch-size 1 and no share", "remove one of them")
    return (StageSpec(name="token"),)


RECIPES: dict[str, Callable[[StageOptions], tuple[StageSpec, ...]]] = {
    "patch-train": _patch_train,
    "token-superposition": _token_superposition,
    "token-level": _token_level,
}
"""The recipes of --recipe by name: from the options of a run to its stages.

Your own script may add recipes. --batch and --lr-decay-style override what a recipe sets. For every recipe but token-level,
`resolve` sets --patch-size by the size of the model before the recipe is called, if it is not given."""
