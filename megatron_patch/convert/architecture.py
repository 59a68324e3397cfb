"""What an architecture of transformers is here: its name, the shapes that it computes, its config.json and the names of its tensors.

In: nothing. Out: `Architecture`, and the requirements that many of them share. `architectures` has those that are built in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_patch.convert.config_reader import ConfigReader
from megatron_patch.convert.tensor_names import LLAMA_NAMES, TensorNames
from megatron_patch.model.shape import ModelShape


@dataclass(frozen=True)
class Architecture:
    """A class of models in transformers.

    Args:
        name: the class with the language model head, as config.json has it under `architectures`.
        model_type: its `model_type` in config.json.
        family: the preset of `--model-family` for models of this architecture. Where several architectures compute the same shape, a
            checkpoint is exported as the architecture of its family.
        required: shape -> the fields of `ModelShape` that decide whether the architecture computes this shape, each with the value that it
            must have; a value may depend on the shape's other fields. "experts.score" is the field `score` of its experts.
        read_config: config.json -> fields of `ModelShape`, without vocab_size, padded_vocab_size and init_std.
        write_config: shape -> keys of config.json, in addition to those that all architectures have.
        tensors: the names of its tensors.
        also_reads: names that its tensors have in other files, which an import understands, too.
        biased: whether its routers always have a bias of experts; without it, an export has one of zeros.
    """

    name: str
    model_type: str
    family: str
    required: Callable[[ModelShape], Mapping[str, Any]]
    read_config: Callable[[ConfigReader], Mapping[str, Any]]
    write_config: Callable[[ModelShape], Mapping[str, Any]]
    tensors: TensorNames = LLAMA_NAMES
    also_reads: tuple[TensorNames, ...] = ()
    biased: bool = False


PLAIN: Mapping[str, Any] = {
    "norm_placement": "pre",
    "zero_centered_norms": False,
    "query_scalar": None,
    "attention_softcap": None,
    "logit_softcap": None,
    "scaled_embeddings": False,
    "experts": None,
}
"""The requirements of an architecture without what only some have: fields of `ModelShape` and their values."""
LLAMA_LAYERS: Mapping[str, Any] = {
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "position_embedding": "rope",
    **PLAIN,
    "qk_norm": False,
    "qk_norm_scope": "head",
    "window": None,
    "full_layers": (),
    "unrotated_layers": (),
    "windowed_rotary_base": None,
}
"""The kinds of layers of Llama and of the architectures that follow it: fields of `ModelShape` and their values."""


def any_windows(shape: ModelShape) -> Mapping[str, Any]:
    """Returns the requirements of an architecture that has windows in any layers: none."""
    return {"window": shape.window, "full_layers": shape.full_layers}


def of_experts(shape: ModelShape, field: str) -> Any:
    """Returns a field of a shape's experts, or None without experts, where another requirement is not met."""
    return None if shape.experts is None else getattr(shape.experts, field)
