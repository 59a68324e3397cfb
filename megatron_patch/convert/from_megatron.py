"""Imports a checkpoint in Megatron-LM's classic layout, iter_N/mp_rank_00/model_optim_rng.pt, with the module names of any version.

In: the folder of a checkpoint of one tensor- and pipeline-parallel rank. Out: a checkpoint with only weights. The file is opened with
`weights_only`. The few classes that such files contain in addition to tensors (arguments, enumerations, random states) are replaced by
inert stand-ins; any other class ends the import.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_patch.config.checks import check_model_size
from megatron_patch.config.layer_patterns import marked_blocks, window_positions
from megatron_patch.convert.checkpoint_io import UNFINISHED, check_output, groups_by_size, imported_options, write_weights
from megatron_patch.convert.config_json import check_layers
from megatron_patch.convert.config_reader import ConfigReader
from megatron_patch.convert.from_hugging_face import FILE_BYTES, ImportResult
from megatron_patch.convert.megatron_experts import each_expert, experts_of_arguments
from megatron_patch.convert.tensor_names import is_load, parameter_shapes
from megatron_patch.convert.weight_files import is_there, load_torch_file
from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.model.families import family_of_shape
from megatron_patch.model.precision import precision_of
from megatron_patch.model.shape import ModelShape, check_shape
from megatron_patch.model.sharding import is_expert_parameter
from megatron_patch.utils.files import read_small, reason

_LONGEST_TRACKER = 1000
FILE = "model_optim_rng.pt"


class _Inert:
    """A stand-in for objects that the import does not need; it accepts any state and ignores it."""

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_STAND_INS: list[Any] = [
    argparse.Namespace,
    *(
        (_Inert, name)
        for name in (
            "megatron.core.enums.ModelType",
            "megatron.model.enums.ModelType",
            "megatron.core.transformer.enums.AttnBackend",
            "numpy.core.multiarray._reconstruct",
            "numpy._core.multiarray._reconstruct",
            "numpy.ndarray",
            "numpy.dtype",
            "_io.BytesIO",
        )
    ),
]

_RENAMES = (
    (r"^(module\.)+", ""),
    (r"^language_model\.", ""),
    (r"^(encoder|transformer)\.", "decoder."),
    (r"\.attention\.", ".self_attention."),
    (r"\.self_attention\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.post_attention_(layernorm|norm)\.", ".pre_mlp_layernorm."),
    (r"^decoder\.final_norm\.", "decoder.final_layernorm."),
    # Transformer Engine fuses a norm with the projection after it.
    (r"\.self_attention\.linear_qkv\.layer_norm_(weight|bias)$", r".input_layernorm.\1"),
    (r"\.mlp\.linear_fc1\.layer_norm_(weight|bias)$", r".pre_mlp_layernorm.\1"),
    # Its grouped layers have a tensor for each expert, too.
    (r"\.mlp\.experts\.(linear_fc[12])\.weight(\d+)$", r".mlp.experts.local_experts.\2.\1.weight"),
)
_IGNORED = ("._extra_state", "rotary_pos_emb.inv_freq", "router.local_tokens_per_expert")
_BLOCK_MODULES = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attention.linear_qkv",
    "attention.key": "self_attention.linear_qkv",
    "attention.value": "self_attention.linear_qkv",
    "attention.output": "self_attention.linear_proj",
    "attention.query_norm": "self_attention.q_layernorm",
    "attention.key_norm": "self_attention.k_layernorm",
    "feed_forward_norm": "pre_mlp_layernorm",
    "feed_forward.gate": "mlp.linear_fc1",
    "feed_forward.up": "mlp.linear_fc1",
    "feed_forward.down": "mlp.linear_fc2",
    "feed_forward.router": "mlp.router",
    "feed_forward.experts.gate": "mlp.experts.local_experts.{}.linear_fc1",
    "feed_forward.experts.up": "mlp.experts.local_experts.{}.linear_fc1",
    "feed_forward.experts.down": "mlp.experts.local_experts.{}.linear_fc2",
    "feed_forward.shared.gate": "mlp.shared_experts.linear_fc1",
    "feed_forward.shared.up": "mlp.shared_experts.linear_fc1",
    "feed_forward.shared.down": "mlp.shared_experts.linear_fc2",
}
_OUTER_NAMES = {
    "embedding.word.weight": "embedding.word_embeddings.weight",
    "embedding.position.weight": "embedding.position_embeddings.weight",
    "head.weight": "output_layer.weight",
    "final_norm.weight": "decoder.final_layernorm.weight",
    "final_norm.bias": "decoder.final_layernorm.bias",
}


def find_file(source: Path) -> Path:
    """Returns the file of a classic checkpoint.

    Args:
        source: the folder of a run, of an iteration, or of the rank.

    Raises:
        CheckpointError: there is no such file, or there are several ranks.
    """
    tracker = source / "latest_checkpointed_iteration.txt"
    if is_there(tracker):
        try:
            text = read_small(tracker, _LONGEST_TRACKER).decode(errors="replace").strip()
        except OSError as error:
            raise CheckpointError(
                f"cannot read {tracker}: {reason(error)}", "a readable file", "give the folder of an iteration"
            ) from error
        if not re.fullmatch("release|[0-9]{1,12}", text):
            raise CheckpointError(
                f"{tracker} contains {text[:40]!r}",
                "release, or the number of an iteration",
                "correct it, or give the folder of an iteration",
            )
        source = source / ("release" if text == "release" else f"iter_{int(text):07d}")
    if is_there(source / FILE):
        return source / FILE
    ranks = sorted(path.name for path in source.glob("mp_rank_*"))
    if len(ranks) > 1:
        raise CheckpointError(
            f"{source} has {len(ranks)} model-parallel ranks ({ranks[0]} to {ranks[-1]})",
            "only mp_rank_00: tensor- and pipeline-parallel size 1",
            "merge the ranks with Megatron-LM's tools/checkpoint/convert.py first",
        )
    if ranks == ["mp_rank_00"] and is_there(source / ranks[0] / FILE):
        return source / ranks[0] / FILE
    what = f"{source} is a distributed checkpoint" if list(source.glob("*.distcp")) else f"{source} has no mp_rank_00/{FILE}"
    raise CheckpointError(what, "the classic layout (--ckpt-format torch)", "convert the checkpoint with Megatron-LM's tools first")


def shape_of_arguments(arguments: Mapping[str, Any], where: str) -> ModelShape:
    """Returns the model's shape, from the arguments that Megatron-LM stores in a checkpoint.

    Args:
        arguments: the arguments by name.
        where: the file, for messages.

    Raises:
        CheckpointError: an argument is missing, or has a value that the model does not support.
    """

    def need(name: str) -> Any:
        if arguments.get(name) is None:
            raise CheckpointError(f"{where}: the argument {name} is missing", "a checkpoint that Megatron-LM saved", "check the path")
        return arguments[name]

    def allow(name: str, *values: Any) -> None:
        value = arguments.get(name, values[0])
        if value not in values:
            allowed = " or ".join(map(repr, values))
            raise CheckpointError(
                f"{where}: {name} is {repr(value)[:80]}, which megatron_patch does not implement", allowed, "import another model"
            )

    swiglu, norm = bool(arguments.get("swiglu")), arguments.get("normalization", "LayerNorm")
    learned = need("position_embedding_type") == "learned_absolute"
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        allow(name, 1)
    allow("position_embedding_type", "rope", "learned_absolute")
    allow("normalization", "LayerNorm", "RMSNorm")
    for name in ("multi_latent_attention", "squared_relu", "apply_layernorm_1p", "apply_residual_connection_post_layernorm"):
        allow(name, None, False)
    allow("rotary_interleaved", False)
    allow("rotary_percent", 1.0)
    values = ConfigReader(arguments, where, "import a checkpoint that Megatron-LM saved")

    def count(name: str) -> int:
        need(name)
        return values.number(name)

    heads, bias = count("num_attention_heads"), bool(arguments.get("add_bias_linear", True))
    # Megatron computes the tanh form of GELU where it is fused with its bias or with --openai-gelu, and the exact form otherwise.
    if not swiglu and not arguments.get("openai_gelu") and not (arguments.get("bias_gelu_fusion") and bias):
        raise CheckpointError(
            f"{where}: the model uses the exact GELU (bias_gelu_fusion is off)", "the tanh form of GELU, or SwiGLU", "import another model"
        )
    epsilon = "layernorm_epsilon" if arguments.get("norm_epsilon") is None else "norm_epsilon"
    padded = count("padded_vocab_size")
    vocab = arguments.get("vocab_size")
    shape = ModelShape(
        num_layers=count("num_layers"),
        hidden_size=count("hidden_size"),
        num_attention_heads=heads,
        num_query_groups=count("num_query_groups") if arguments.get("group_query_attention") else heads,
        head_size=count("kv_channels"),
        ffn_hidden_size=count("ffn_hidden_size"),
        vocab_size=vocab if type(vocab) is int and 1 <= vocab <= padded else padded,
        padded_vocab_size=padded,
        max_positions=count("max_position_embeddings"),
        normalization=norm,
        norm_epsilon=values.real(epsilon, 1e-5),
        activation="swiglu" if swiglu else "gelu",
        position_embedding="learned" if learned else "rope",
        rotary_base=values.real("rotary_base", 10000.0) if arguments.get("rotary_base") else 10000.0,
        qk_norm=bool(arguments.get("qk_layernorm")),
        attention_bias=bias,
        qkv_bias=bias or bool(arguments.get("add_qkv_bias")),
        mlp_bias=bias,
        tie_embeddings=not arguments.get("untie_embeddings_and_output_weights"),
        **({} if learned else _scaling(arguments, values)),
        **_layers(arguments, where, count("num_layers"), learned),
        experts=experts_of_arguments(arguments, where, count("num_layers"), count("ffn_hidden_size")),
    )
    if shape.qk_norm and norm != "RMSNorm":
        raise CheckpointError(
            f"{where}: qk_layernorm with LayerNorm, which megatron_patch does not implement", "RMSNorm", "import another model"
        )
    try:
        check_model_size(shape)
        check_shape(shape)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error.what}", error.allowed, "import a checkpoint that Megatron-LM saved") from error
    return shape


def _layers(arguments: Mapping[str, Any], where: str, layers: int, learned: bool) -> dict[str, Any]:
    """Returns the window, and the blocks without a window and without rotation, in the form that Megatron's parser has given them.

    Raises:
        CheckpointError: Megatron's parser gives no such values.
    """
    check_layers(ConfigReader(arguments, where), layers, "num_layers")

    def text_of(value: Any) -> str:
        return f"[{','.join(map(str, value))}]" if isinstance(value, (list, tuple)) else str(value)

    try:
        given = arguments.get("window_size")
        window = None
        if given is not None and not (isinstance(given, (list, tuple)) and len(given) == 2 and given[0] == -1):
            # A causal mask has no right side, whether it is limited to 0 or not limited.
            causal = isinstance(given, (list, tuple)) and len(given) == 2 and given[1] == -1
            window = window_positions(f"{given[0]},0" if causal else text_of(given).strip("[]"))
        skip, no_rope = arguments.get("window_attn_skip_freq"), arguments.get("no_rope_freq")
        full = () if window is None or skip is None else marked_blocks(text_of(skip), layers, "window_attn_skip_freq", 0)
        unrotated = () if not no_rope or learned else marked_blocks(text_of(no_rope), layers, "no_rope_freq", 1)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error.what}", error.allowed, "import a checkpoint that Megatron-LM saved") from error
    found: dict[str, Any] = {"unrotated_layers": unrotated}
    return found if window is None or len(full) == layers else {**found, "window": window, "full_layers": full}


def _scaling(arguments: Mapping[str, Any], values: ConfigReader) -> dict[str, Any]:
    if arguments.get("use_rope_scaling"):
        factor = values.real("rope_scaling_factor", 8.0) if arguments.get("rope_scaling_factor") else 8.0
        return {"rotary_scaling": "llama3", "rotary_factor": factor}
    name = "rotary_seq_len_interpolation_factor"
    return {"rotary_scaling": "linear", "rotary_factor": values.real(name, 1.0)} if arguments.get(name) not in (None, 0, 1) else {}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}.")
        elif isinstance(value, torch.Tensor) and not name.endswith(_IGNORED):
            yield name, value


def _core_name(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _megatron_name(name: str) -> str:
    """Returns the name of Megatron's tensor that contains one of our parameters."""
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    _, layer, part = name.split(".", 2)
    if part == "feed_forward.router.balance.bias":
        return f"decoder.layers.{layer}.mlp.router.expert_bias"
    module, _, kind = part.rpartition(".")
    return f"decoder.layers.{layer}.{_BLOCK_MODULES[module]}.{kind}"


def _stored_shape(name: str, size: tuple[int, ...], shape: ModelShape) -> tuple[int, ...]:
    size = size[1:] if is_expert_parameter(name) else size
    if ".attention.query." in name or ".attention.key." in name or ".attention.value." in name:
        return ((shape.num_attention_heads + 2 * shape.num_query_groups) * shape.head_size, *size[1:])
    if shape.activation == "swiglu" and name.endswith((".gate.weight", ".gate.bias", ".up.weight", ".up.bias")):
        return (2 * size[0], *size[1:])
    return size


def _stored_names(name: str, size: tuple[int, ...]) -> list[str]:
    """Returns the names of Megatron's tensors that contain one of our parameters: one, or one for each expert."""
    stored = _megatron_name(name)
    return [stored.format(expert) for expert in range(size[0])] if is_expert_parameter(name) else [stored]


def _parameter_from(name: str, stored: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """Returns one of our parameters from Megatron's tensor, which interleaves queries, keys and values by group, and stacks gate and up."""
    kind = name.rsplit(".", 2)[-2]
    if ".attention." in name and kind in ("query", "key", "value"):
        groups = stored.unflatten(0, (shape.num_query_groups, -1, shape.head_size))
        part = {"query": groups[:, :-2], "key": groups[:, -2:-1], "value": groups[:, -1:]}[kind]
        return part.flatten(0, 2)
    if shape.activation == "swiglu" and kind in ("gate", "up"):
        return stored.chunk(2)[0 if kind == "gate" else 1]
    return stored


def from_megatron(source: Path, output: Path) -> ImportResult:
    """Imports a classic Megatron-LM checkpoint of one model-parallel rank.

    Args:
        source: the run's folder, or one of its iterations.
        output: a new or empty folder.

    Raises:
        CheckpointError: another layout; a model that megatron_patch does not implement; a tensor that is missing, unexpected or of another
            shape; an output folder that is not empty.
    """
    check_output(output, UNFINISHED)
    file = find_file(source)
    state = load_torch_file(file, _STAND_INS)
    arguments = state.get("args") if isinstance(state, dict) else None
    if not isinstance(arguments, argparse.Namespace) or not isinstance(state.get("model"), Mapping):
        raise CheckpointError(f"{file} does not contain args and model", "a checkpoint that Megatron-LM saved", "check the path")
    version = state.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < 3:
        raise CheckpointError(f"{file}: checkpoint_version is {version!r}", "at least 3.0", "load and save it with a newer Megatron-LM")
    shape = shape_of_arguments(vars(arguments), str(file))
    found = each_expert({_core_name(name): tensor for name, tensor in _flatten(state["model"])}, shape, str(file))
    del state
    family = family_of_shape(shape)
    parameters = parameter_shapes(shape)
    _check(str(file), shape, parameters, found)
    groups = groups_by_size([int(torch.Size(size).numel()) * 4 for size in parameters.values()], FILE_BYTES)
    names = list(parameters)
    precision = precision_of(found[_OUTER_NAMES["embedding.word.weight"]].dtype)

    def read(name: str) -> torch.Tensor:
        size = parameters[name]
        if is_load(name):
            return torch.full(size, 1.0 / size[0])
        parts = [_parameter_from(name, found[stored], shape) for stored in _stored_names(name, size)]
        return torch.stack(parts) if is_expert_parameter(name) else parts[0]

    folder = write_weights(
        output,
        shape,
        [[names[number] for number in group] for group in groups],
        ((name, read(name)) for name in names),
        precision,
        imported_options(shape, family),
        imported_from=str(source),
    )
    return ImportResult(folder, shape, family, len(found), None)


def _check(where: str, shape: ModelShape, parameters: Mapping[str, tuple[int, ...]], found: Mapping[str, torch.Tensor]) -> None:
    expected = {
        stored: _stored_shape(name, size, shape)
        for name, size in parameters.items()
        if not is_load(name)
        for stored in _stored_names(name, size)
    }
    for name, size in expected.items():
        if name not in found:
            raise CheckpointError(
                f"{where}: tensor {name} {size} is missing",
                "all tensors of the model that its arguments describe",
                "copy the checkpoint again",
            )
        if tuple(found[name].shape) != size:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {tuple(found[name].shape)}",
                f"{size}, by its arguments",
                "use arguments and weights of one checkpoint",
            )
    for name, tensor in found.items():
        if name not in expected:
            raise CheckpointError(
                f"{where}: unexpected tensor {name} {tuple(tensor.shape)}",
                "the tensors of the model that its arguments describe",
                "import a plain GPT model",
            )
