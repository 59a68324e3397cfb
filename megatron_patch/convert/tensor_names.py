"""The mapping between our parameters and the tensors of a Hugging Face model.

In: a shape, and the names of its architecture's tensors. Out: a list of `MappedTensor`: one Hugging Face tensor each, with the parameters
that it stacks. Architectures with Llama's names have one parameter for each tensor; GPT-2 stacks queries, keys and
values, and stores the matrices of its blocks transposed. Experts are one parameter here, [experts, outputs, inputs], and on disk a tensor
for each expert, or one for all that stacks gate and up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.shape import ModelShape
from megatron_patch.model.sharding import is_expert_parameter

TensorShape = tuple[int, ...]


class ReadParameter(Protocol):
    """Reads one of our parameters."""

    def __call__(self, name: str, expert: int | None = None, /) -> torch.Tensor:
        """Returns a parameter by name, float32, on the CPU; with `expert` only this index of its first dimension."""
        ...


@dataclass(frozen=True)
class TensorNames:
    """The names of an architecture's tensors.

    Args:
        modules: our module outside of the blocks -> Hugging Face module.
        block: prefix of the names in a block, with {} for the block's number from 0.
        block_modules: our module in a block -> Hugging Face module, or our parameter -> Hugging Face tensor. Those with the same target are
            stacked, in our order. A target with {} has a tensor for each expert, numbered from 0.
        transposed: whether the matrices of the blocks are stored as [inputs, outputs].
    """

    modules: Mapping[str, str]
    block: str
    block_modules: Mapping[str, str]
    transposed: bool = False

    def name_of(self, parameter: str) -> str:
        """Returns the name of the Hugging Face tensor that contains one of our parameters."""
        module, _, kind = parameter.rpartition(".")
        if not module.startswith("blocks."):
            return f"{self.modules[module]}.{kind}"
        _, number, part = module.split(".", 2)
        block, whole = self.block.format(number), self.block_modules.get(f"{part}.{kind}")
        return f"{block}.{whole}" if whole is not None else f"{block}.{self.block_modules[part]}.{kind}"


LLAMA_NAMES = TensorNames(
    {"embedding.word": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"},
    "model.layers.{}",
    {
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.up": "mlp.up_proj",
        "feed_forward.down": "mlp.down_proj",
    },
)
OLMO2_NAMES = TensorNames(
    LLAMA_NAMES.modules,
    LLAMA_NAMES.block,
    {
        **{ours: theirs for ours, theirs in LLAMA_NAMES.block_modules.items() if ours not in ("attention_norm", "feed_forward_norm")},
        "attention_output_norm": "post_attention_layernorm",
        "feed_forward_output_norm": "post_feedforward_layernorm",
    },
)
GEMMA_NAMES = TensorNames(
    LLAMA_NAMES.modules,
    LLAMA_NAMES.block,
    {
        **LLAMA_NAMES.block_modules,
        "attention_output_norm": "post_attention_layernorm",
        "feed_forward_norm": "pre_feedforward_layernorm",
        "feed_forward_output_norm": "post_feedforward_layernorm",
    },
)
_ROUTED = {
    **LLAMA_NAMES.block_modules,
    "feed_forward.router": "mlp.gate",
    "feed_forward.router.balance.bias": "mlp.gate.e_score_correction_bias",
    **{f"feed_forward.shared.{part}": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")},
}
EXPERT_NAMES = TensorNames(
    LLAMA_NAMES.modules,
    LLAMA_NAMES.block,
    {**_ROUTED, **{f"feed_forward.experts.{part}": f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")}},
)
"""Qwen3-MoE, OLMoE and Dots1: a tensor for each expert, as published models have them and transformers and vLLM read them."""
FUSED_EXPERT_NAMES = TensorNames(
    LLAMA_NAMES.modules,
    LLAMA_NAMES.block,
    {
        **_ROUTED,
        "feed_forward.experts.gate.weight": "mlp.experts.gate_up_proj",
        "feed_forward.experts.up.weight": "mlp.experts.gate_up_proj",
        "feed_forward.experts.down.weight": "mlp.experts.down_proj",
    },
)
"""The modules of transformers 5, which it writes with `save_original_format=False`: a tensor for all experts."""
MIXTRAL_NAMES = TensorNames(
    LLAMA_NAMES.modules,
    LLAMA_NAMES.block,
    {
        **LLAMA_NAMES.block_modules,
        "feed_forward.router": "block_sparse_moe.gate",
        "feed_forward.experts.gate": "block_sparse_moe.experts.{}.w1",
        "feed_forward.experts.down": "block_sparse_moe.experts.{}.w2",
        "feed_forward.experts.up": "block_sparse_moe.experts.{}.w3",
    },
)
GPT2_NAMES = TensorNames(
    {
        "embedding.word": "transformer.wte",
        "embedding.position": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    "transformer.h.{}",
    {
        "attention_norm": "ln_1",
        "attention.query": "attn.c_attn",
        "attention.key": "attn.c_attn",
        "attention.value": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    },
    transposed=True,
)


@dataclass(frozen=True)
class MappedTensor:
    """One tensor of a Hugging Face model.

    Args:
        name: its name.
        shape: its shape.
        parameters: (name, shape) of our parameters, which it stacks; none: it is zero.
        rows: its number of rows before transposition; it does not include the padding of the vocabulary.
        transposed: whether it is stored as [inputs, outputs].
        dim: the dimension along which the parameters are stacked.
        expert: index of the parameter's first dimension that this tensor is; None: it is all of the parameter.
        float32: whether it is float32 in a model of any dtype.
    """

    name: str
    shape: TensorShape
    parameters: tuple[tuple[str, TensorShape], ...]
    rows: int
    transposed: bool = False
    dim: int = 0
    expert: int | None = None
    float32: bool = False

    def join(self, read: ReadParameter) -> torch.Tensor:
        """Returns the Hugging Face tensor, from our parameters, which `read` returns by name."""
        if not self.parameters:
            return torch.zeros(self.shape)
        parts = [read(name) if self.expert is None else read(name, self.expert) for name, _ in self.parameters]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)
        tensor = tensor[: self.rows]
        return tensor.t() if self.transposed else tensor

    def split(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, parameter) of our parameters, from the Hugging Face tensor; padding rows of the vocabulary are zeros.

        Of a tensor of one expert, the parameter is that of this expert.
        """
        tensor = tensor.t() if self.transposed else tensor
        start = 0
        for name, shape in self.parameters:
            shape = shape if self.expert is None else shape[1:]
            part = tensor[start : start + shape[0]] if self.dim == 0 else tensor.narrow(self.dim, start, shape[self.dim])
            start += shape[self.dim]
            if part.shape[0] < shape[0]:
                part = torch.cat((part, part.new_zeros((shape[0] - part.shape[0], *shape[1:]))))
            yield name, part


_LOAD, _BIAS = ".router.balance.load", ".router.balance.bias"


def is_load(name: str) -> bool:
    """Whether a name is that of the load of a router's experts: state of training, which no other program has."""
    return name.endswith(_LOAD)


def is_state(name: str) -> bool:
    """Whether a name is that of the state of a router's balance, float32 in a model of any dtype: the load, or the bias of experts."""
    return name.endswith((_LOAD, _BIAS))


def parameter_shapes(model_shape: ModelShape) -> dict[str, TensorShape]:
    """Returns name -> shape of our parameters and of the state of the balance of experts, in the model's order, without allocating them."""
    with torch.device("meta"):
        model = GPTModel(model_shape)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def mapped_tensors(model_shape: ModelShape, names: TensorNames, biased: bool = False) -> list[MappedTensor]:
    """Returns all tensors of the Hugging Face model, in the order of our parameters; the tensors of the experts of one parameter in a row.

    Args:
        model_shape: the model's shape.
        names: the names of its architecture's tensors.
        biased: whether the architecture's routers always have a bias of experts; those of a shape without it are zero.
    """
    parts: dict[str, list[tuple[str, TensorShape]]] = {}
    for name, shape in parameter_shapes(model_shape).items():
        if not is_load(name):
            parts.setdefault(names.name_of(name), []).append((name, shape))
        elif biased and model_shape.experts is not None and not model_shape.experts.bias:
            parts[names.name_of(name.removesuffix(_LOAD) + _BIAS)] = []
    return [tensor for name, parameters in parts.items() for tensor in _mapped(name, tuple(parameters), model_shape, names.transposed)]


def _mapped(name: str, parameters: tuple[tuple[str, TensorShape], ...], model_shape: ModelShape, transposed: bool) -> list[MappedTensor]:
    if not parameters:
        assert model_shape.experts is not None
        return [MappedTensor(name, (model_shape.experts.count,), (), model_shape.experts.count, float32=True)]
    first, shape = parameters[0]
    if is_expert_parameter(first):
        if "{}" in name:
            return [MappedTensor(name.format(expert), shape[1:], parameters, shape[1], expert=expert) for expert in range(shape[0])]
        outputs = sum(part[1] for _, part in parameters)
        return [MappedTensor(name, (shape[0], outputs, shape[2]), parameters, shape[0], dim=1)]
    vocabulary = first in ("embedding.word.weight", "head.weight")
    rows = model_shape.vocab_size if vocabulary else sum(part[0] for _, part in parameters)
    stored = (rows, *shape[1:])
    transposed = transposed and len(shape) == 2 and first.startswith("blocks.")
    return [MappedTensor(name, stored[::-1] if transposed else stored, parameters, rows, transposed, float32=is_state(first))]


_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def is_buffer(name: str) -> bool:
    """Whether a tensor is a constant that files of older versions contain, not a weight."""
    return name.endswith(_BUFFERS)


def match_prefix(found: Mapping[str, object], mapped: list[MappedTensor]) -> dict[str, str]:
    """Maps names in a file to the names in `mapped`, adding or removing prefixes.

    Files of a bare model lack its prefix ("model."). Files of a wrapped model add "module." or "_orig_mod.".
    """
    usual = {tensor.name for tensor in mapped}
    prefixes = sorted({name.partition(".")[0] for name in usual})
    names = {}
    for name in found:
        plain = name.removeprefix("module.").removeprefix("_orig_mod.")
        names[name] = next((full for full in (plain, *(f"{prefix}.{plain}" for prefix in prefixes)) if full in usual), plain)
    return names
