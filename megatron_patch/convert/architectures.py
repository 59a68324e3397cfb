"""Hugging Face architectures: which of them computes a `ModelShape`, and the conversion of config.json in both directions.

In: a shape, or a configuration as a dict. Out: the other. A value that one side does not support is refused with its key.

A further architecture is registered by its class name: `ARCHITECTURES["SeedOssForCausalLM"] = Architecture(...)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_patch.config.checks import check_model_size
from megatron_patch.convert.architecture import LLAMA_LAYERS, PLAIN, Architecture, any_windows, of_experts
from megatron_patch.convert.config_json import (
    read_gemma2,
    read_gemma3,
    read_gpt2,
    read_llama,
    read_mistral,
    read_olmo2,
    read_olmo3,
    read_smollm3,
    read_windows,
    write_gemma2,
    write_gemma3,
    write_gpt2,
    write_llama,
    write_olmo2,
    write_olmo3,
    write_smollm3,
    write_windows,
)
from megatron_patch.convert.config_reader import ConfigReader
from megatron_patch.convert.expert_architectures import DOTS1, MIXTRAL, OLMOE, QWEN3_MOE
from megatron_patch.convert.tensor_names import GEMMA_NAMES, GPT2_NAMES, OLMO2_NAMES
from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.model.shape import ModelShape, check_shape

SpecialIds = int | list[int] | None
"""A special token: one id, several ids that all serve as it, or none."""


LLAMA = Architecture(
    "LlamaForCausalLM",
    "llama",
    "llama",
    required=lambda shape: {**LLAMA_LAYERS, "attention_bias": shape.qkv_bias},
    read_config=lambda values: {**read_llama(values), "mlp_bias": values.flag("mlp_bias", False)},
    write_config=lambda shape: {**write_llama(shape), "attention_bias": shape.qkv_bias, "mlp_bias": shape.mlp_bias},
)
QWEN2 = Architecture(
    "Qwen2ForCausalLM",
    "qwen2",
    "llama",
    required=lambda shape: {**LLAMA_LAYERS, **any_windows(shape), "qkv_bias": True, "attention_bias": False, "mlp_bias": False},
    read_config=lambda values: {
        **read_llama(values, positions=32768, windows=True),
        **read_windows(values),
        "qkv_bias": True,
        "attention_bias": False,
    },
    write_config=lambda shape: {**write_llama(shape), **write_windows(shape)},
)
QWEN3 = Architecture(
    "Qwen3ForCausalLM",
    "qwen3",
    "qwen3",
    required=lambda shape: {
        **LLAMA_LAYERS,
        **any_windows(shape),
        "qk_norm": True,
        "attention_bias": shape.qkv_bias,
        "mlp_bias": False,
    },
    read_config=lambda values: {
        **read_llama(values, positions=32768, head_size=128, windows=True),
        **read_windows(values),
        "qk_norm": True,
    },
    write_config=lambda shape: {**write_llama(shape), **write_windows(shape), "attention_bias": shape.qkv_bias},
)
MISTRAL = Architecture(
    "MistralForCausalLM",
    "mistral",
    "mistral",
    required=lambda shape: {**LLAMA_LAYERS, "window": shape.window, "qkv_bias": False, "attention_bias": False, "mlp_bias": False},
    read_config=read_mistral,
    # Without the second key, transformers would set a window of 4096 positions.
    write_config=lambda shape: {**write_llama(shape), "sliding_window": shape.window},
)
SMOLLM3 = Architecture(
    "SmolLM3ForCausalLM",
    "smollm3",
    "smollm3",
    required=lambda shape: {
        **LLAMA_LAYERS,
        **any_windows(shape),
        "unrotated_layers": shape.unrotated_layers,
        "attention_bias": shape.qkv_bias,
    },
    read_config=read_smollm3,
    write_config=write_smollm3,
)
_OLMO2_LAYERS = {**LLAMA_LAYERS, "norm_placement": "post", "qk_norm": True, "qk_norm_scope": "all", "mlp_bias": False}
OLMO2 = Architecture(
    "Olmo2ForCausalLM",
    "olmo2",
    "olmo2",
    required=lambda shape: {**_OLMO2_LAYERS, "attention_bias": shape.qkv_bias},
    read_config=read_olmo2,
    write_config=write_olmo2,
    tensors=OLMO2_NAMES,
)
OLMO3 = Architecture(
    "Olmo3ForCausalLM",
    "olmo3",
    "olmo3",
    required=lambda shape: {
        **_OLMO2_LAYERS,
        **any_windows(shape),
        "windowed_rotary_base": shape.windowed_rotary_base,
        "attention_bias": shape.qkv_bias,
    },
    read_config=read_olmo3,
    write_config=write_olmo3,
    tensors=OLMO2_NAMES,
)


def _gemma_layers(shape: ModelShape) -> Mapping[str, Any]:
    """Returns what Gemma 2 and 3 require: fields and their values."""
    return {
        **LLAMA_LAYERS,
        **any_windows(shape),
        "norm_placement": "both",
        "zero_centered_norms": True,
        "activation": "geglu",
        "scaled_embeddings": True,
        "query_scalar": shape.query_scalar,
        "logit_softcap": shape.logit_softcap,
        "attention_bias": shape.qkv_bias,
        "mlp_bias": False,
        # transformers refuses others, although the head size is given apart.
        "hidden_size": shape.hidden_size // shape.num_attention_heads * shape.num_attention_heads,
    }


GEMMA2 = Architecture(
    "Gemma2ForCausalLM",
    "gemma2",
    "gemma2",
    required=lambda shape: {**_gemma_layers(shape), "attention_softcap": shape.attention_softcap},
    read_config=read_gemma2,
    write_config=write_gemma2,
    tensors=GEMMA_NAMES,
)
GEMMA3 = Architecture(
    "Gemma3ForCausalLM",
    "gemma3_text",
    "gemma3",
    required=lambda shape: {**_gemma_layers(shape), "qk_norm": True, "windowed_rotary_base": shape.windowed_rotary_base},
    read_config=read_gemma3,
    write_config=write_gemma3,
    tensors=GEMMA_NAMES,
)
GPT2 = Architecture(
    "GPT2LMHeadModel",
    "gpt2",
    "gpt2",
    required=lambda shape: {
        "normalization": "LayerNorm",
        "activation": "gelu",
        "position_embedding": "learned",
        **PLAIN,
        "qk_norm": False,
        "window": None,
        "qkv_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "num_query_groups": shape.num_attention_heads,
        "hidden_size": shape.num_attention_heads * shape.head_size,
    },
    read_config=read_gpt2,
    write_config=write_gpt2,
    tensors=GPT2_NAMES,
)
_BUILT_IN = (LLAMA, QWEN2, QWEN3, GPT2, MISTRAL, SMOLLM3, OLMO2, OLMO3, GEMMA2, GEMMA3, QWEN3_MOE, MIXTRAL, OLMOE, DOTS1)
ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in _BUILT_IN}
"""Class name -> architecture. Open to further entries."""


def architecture_of(shape: ModelShape, family: str | None = None) -> Architecture:
    """Returns the registered architecture that computes what a shape computes.

    Args:
        shape: the model's shape.
        family: the model's family, which decides where several architectures compute the shape, or come equally near; None: the first.

    Raises:
        ConfigError: no architecture does; the error names the nearest one and the fields that differ.
    """
    differences = {name: _differences(architecture, shape) for name, architecture in ARCHITECTURES.items()}
    fitting = [ARCHITECTURES[name] for name, different in differences.items() if not different]
    if fitting:
        return next((architecture for architecture in fitting if architecture.family == family), fitting[0])

    def distance(name: str) -> tuple[bool, int, bool]:
        return _without_experts(differences[name]), len(differences[name]), ARCHITECTURES[name].family != family

    nearest = min(differences, key=distance)
    raise ConfigError(
        f"no registered Hugging Face architecture computes this model; {nearest} comes nearest and needs {', '.join(differences[nearest])}",
        "the shapes of " + ", ".join(ARCHITECTURES),
        "register an architecture in megatron_patch.convert.architectures.ARCHITECTURES, or evaluate and generate without an export",
    )


def _without_experts(differences: list[str]) -> bool:
    """Whether an architecture has no experts, but the shape has some."""
    return any(text.startswith("experts None") for text in differences)


def _differences(architecture: Architecture, shape: ModelShape) -> list[str]:
    """The fields in which a shape differs from what an architecture requires."""
    found = []
    for name, needed in architecture.required(shape).items():
        part, _, field = name.partition(".")
        value = of_experts(shape, field) if field else getattr(shape, part)
        if value != needed:
            found.append(f"{name} {needed}, not {value}")
    return found


def config_of(architecture: Architecture, shape: ModelShape, dtype: str, bos_id: SpecialIds, eos_id: SpecialIds) -> dict[str, Any]:
    """Returns the config.json of a shape, with the keys that both old and new versions of transformers read.

    Args:
        architecture: the architecture, as `architecture_of` returns it.
        shape: the model's shape.
        dtype: torch's name of the weights' dtype.
        bos_id: id of the token that begins a text, if there is one.
        eos_id: id of the token that ends a text, if there is one.
    """
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": shape.vocab_size,
        "initializer_range": shape.init_std,
        "tie_word_embeddings": shape.tie_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
        "use_cache": True,
        **architecture.write_config(shape),
    }


def special_ids(config: Mapping[str, Any], vocab_size: int) -> dict[str, SpecialIds]:
    """Returns `bos_token_id` and `eos_token_id` of a configuration, without those that are not token ids of the model."""

    def is_id(value: Any) -> bool:
        return type(value) is int and 0 <= value < vocab_size

    found = {key: config.get(key) for key in ("bos_token_id", "eos_token_id")}
    return {key: ids for key, ids in found.items() if is_id(ids) or (isinstance(ids, list) and ids and all(map(is_id, ids)))}


_DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")
_ROUTERS = ("router_aux_loss_coef", "router_jitter_noise")


def kept_keys(config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Returns the keys of a configuration that no shape has and an export writes again.

    They are `pad_token_id` and what transformers trains with: shares of dropout, and a router's auxiliary loss and noise.
    """
    kept: dict[str, Any] = {}
    padding = config.get("pad_token_id")
    if type(padding) is int and 0 <= padding < vocab_size:
        kept["pad_token_id"] = padding
    shares = {key: config[key] for key in (*_DROPOUTS, *_ROUTERS) if type(config.get(key)) in (int, float) and 0 <= config[key] < 1}
    return kept | {key: value for key, value in shares.items() if value != 0 or key in _ROUTERS}


def with_kept_keys(config: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an export's configuration with the keys that `kept_keys` has kept; but for the padding, only those of its architecture."""
    # Read from a file that may come from elsewhere.
    kept = kept_keys(kept, config["vocab_size"])
    return {**config, **{key: value for key, value in kept.items() if key == "pad_token_id" or key in config}}


_OTHERS = {
    **dict.fromkeys(("Qwen2MoeForCausalLM", "Qwen3NextForCausalLM"), "its shared expert has a gate, which the program does not have"),
    **dict.fromkeys(
        ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "KimiK2ForCausalLM"),
        "its attention is multi-head latent attention, which the program does not have",
    ),
    "Glm4MoeForCausalLM": "it rotates a part of each head, and the program all of it",
    "GptOssForCausalLM": "its experts have biases and its attention has sinks, which the program does not have",
}
"""Architectures with experts that cannot be registered, and why."""


def architecture_named(config: Mapping[str, Any], where: str) -> Architecture:
    """Returns the architecture that a config.json names, by its class or else by its `model_type`.

    Args:
        config: the config.json.
        where: the file, for messages.

    Raises:
        CheckpointError: it is not registered.
    """
    names = config.get("architectures") or []
    found = ARCHITECTURES.get(names[0]) if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else None
    if found is None and not names:
        found = next((known for known in ARCHITECTURES.values() if known.model_type == config.get("model_type")), None)
    if found is None:
        shown = ", ".join(map(str, names)) if isinstance(names, list) and names else names or config.get("model_type")
        reason = _OTHERS.get(str(shown))
        raise CheckpointError(
            f"{where}: the architecture {str(shown)[:80]!r} is not registered" + (f": {reason}" if reason else ""),
            ", ".join(ARCHITECTURES),
            "convert a model of one of these, or register its architecture in megatron_patch.convert.architectures.ARCHITECTURES",
        )
    return found


def shape_of(config: Mapping[str, Any], where: str, divisible_by: int = 128) -> ModelShape:
    """Returns the shape of a Hugging Face model.

    Args:
        config: its config.json.
        where: the file, for messages.
        divisible_by: the embedding's rows are padded to a multiple of this.

    Raises:
        CheckpointError: an unknown architecture, missing keys, or values that the model does not support; the error has all of them.
    """
    architecture = architecture_named(config, where)
    if config.get("quantization_config"):
        raise CheckpointError(f"{where}: the model is quantized", "weights in float32, bfloat16 or float16", "convert the original weights")
    found: list[CheckpointError] = []
    values = ConfigReader(config, where, found=found)
    vocab = values.number("vocab_size")
    init_std = values.real("initializer_range", 0.02)
    try:
        fields = architecture.read_config(values)
    except CheckpointError as error:
        raise _together([*found, error], where) from error
    if found:
        raise _together(found, where)
    shape = ModelShape(
        vocab_size=vocab,
        padded_vocab_size=-(-vocab // divisible_by) * divisible_by,
        init_std=init_std if init_std > 0 else 0.02,
        **fields,
    )
    try:
        check_model_size(shape)
        check_shape(shape)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error.what}", error.allowed, "use the model's original config.json") from error
    return shape


def _together(errors: list[CheckpointError], where: str) -> CheckpointError:
    """Returns one error for all that was found in a file; some keys are read more than once."""
    different = list({error.what: error for error in errors}.values())
    if len(different) == 1:
        return different[0]
    lines = [f"- {error.what.removeprefix(f'{where}: ')}; allowed: {error.allowed}" for error in different]
    doing = list(dict.fromkeys(error.do for error in different if error.do))
    return CheckpointError(
        "\n  ".join([f"{where}: {len(different)} values cannot be used", *lines]), "the values above", "; or ".join(doing)
    )
