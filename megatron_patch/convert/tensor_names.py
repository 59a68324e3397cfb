"""The mapping between our parameters and the tensors of a Hugging Face model.

In: a shape, and the names of its architecture's tensors. Out: a list of `MappedTensor`: one Hugging Face tensor each, with the parameters
that it stacks. Architectures with Llama's names have one parameter for each tensor; GPT-2 stacks queries, keys and
values, and stores the matrices of its blocks transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.shape import ModelShape

TensorShape = tuple[int, ...]


@dataclass(frozen=True)
class TensorNames:
    """The names of an architecture's tensors.

    Args:
        modules: our module outside of the blocks -> Hugging Face module.
        block: prefix of the names in a block, with {} for the block's number from 0.
        block_modules: our module in a block -> Hugging Face module; modules with the same target are stacked, in our order.
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
        return f"{self.block.format(number)}.{self.block_modules[part]}.{kind}"


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
        parameters: (name, shape) of our parameters, which it stacks along the first dimension.
        rows: its number of rows before transposition; it does not include the padding of the vocabulary.
        transposed: whether it is stored as [inputs, outputs].
    """

    name: str
    shape: TensorShape
    parameters: tuple[tuple[str, TensorShape], ...]
    rows: int
    transposed: bool = False

    def join(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Returns the Hugging Face tensor, from our parameters, which `read` returns by name."""
        parts = [read(name) for name, _ in self.parameters]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        tensor = tensor[: self.rows]
        return tensor.t() if self.transposed else tensor

    def split(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, parameter) of our parameters, from the Hugging Face tensor; padding rows of the vocabulary are zeros."""
        tensor = tensor.t() if self.transposed else tensor
        start = 0
        for name, shape in self.parameters:
            part = tensor[start : start + shape[0]]
            start += shape[0]
            if part.shape[0] < shape[0]:
                part = torch.cat((part, part.new_zeros((shape[0] - part.shape[0], *shape[1:]))))
            yield name, part


def parameter_shapes(model_shape: ModelShape) -> dict[str, TensorShape]:
    """Returns name -> shape of our parameters, in the model's order, without allocating them."""
    with torch.device("meta"):
        model = GPTModel(model_shape)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def mapped_tensors(model_shape: ModelShape, names: TensorNames) -> list[MappedTensor]:
    """Returns all tensors of the Hugging Face model, in the order of our parameters."""
    parts: dict[str, list[tuple[str, TensorShape]]] = {}
    for name, shape in parameter_shapes(model_shape).items():
        parts.setdefault(names.name_of(name), []).append((name, shape))
    return [_mapped(name, tuple(parameters), model_shape, names.transposed) for name, parameters in parts.items()]


def _mapped(name: str, parameters: tuple[tuple[str, TensorShape], ...], model_shape: ModelShape, transposed: bool) -> MappedTensor:
    first, shape = parameters[0]
    vocabulary = first in ("embedding.word.weight", "head.weight")
    rows = model_shape.vocab_size if vocabulary else sum(part[0] for _, part in parameters)
    stored = (rows, *shape[1:])
    transposed = transposed and len(shape) == 2 and first.startswith("blocks.")
    return MappedTensor(name, stored[::-1] if transposed else stored, parameters, rows, transposed)


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
