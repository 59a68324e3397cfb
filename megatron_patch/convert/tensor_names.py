"""Which tensor of a Hugging Face model is made of which of our parameters.

In: a shape. Out: a list of `Mapped`, each one tensor there and the parameters here whose rows it stacks. Llama, Qwen2 and Qwen3 have one
parameter a tensor; GPT-2 stacks queries, keys and values and keeps its matrices transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_patch.convert.architectures import architecture_of
from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.shape import ModelShape


@dataclass(frozen=True)
class Mapped:
    """One tensor of a Hugging Face model.

    Args:
        name: there.
        shape: there.
        parameters: (name, shape) here, stacked along the first dimension.
        rows: how many rows are stored there: the vocabulary's padding is left out.
        transposed: whether it is stored as [in, out].
    """

    name: str
    shape: tuple[int, ...]
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    rows: int
    transposed: bool = False

    def join(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The tensor there, from the parameters here."""
        parts = [read(name) for name, _ in self.parameters]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        tensor = tensor[: self.rows]
        return tensor.t() if self.transposed else tensor

    def split(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters here, from the tensor there; the vocabulary's padding becomes zeros."""
        tensor = tensor.t() if self.transposed else tensor
        start = 0
        for name, shape in self.parameters:
            part = tensor[start : start + shape[0]]
            start += shape[0]
            if part.shape[0] < shape[0]:
                part = torch.cat((part, part.new_zeros((shape[0] - part.shape[0], *shape[1:]))))
            yield name, part


def parameter_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Our parameters and their shapes, in the model's order, without memory for them."""
    with torch.device("meta"):
        model = GPTModel(shape)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


_LLAMA_PARTS = {
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
}
_GPT2_PARTS = {
    "attention_norm": "ln_1",
    "attention.query": "attn.c_attn",
    "attention.key": "attn.c_attn",
    "attention.value": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}
_LLAMA_ENDS = {"embedding.word": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
_GPT2_ENDS = {
    "embedding.word": "transformer.wte",
    "embedding.position": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}


def _name_there(name: str, gpt2: bool) -> str:
    module, _, kind = name.rpartition(".")
    if not module.startswith("blocks."):
        return f"{(_GPT2_ENDS if gpt2 else _LLAMA_ENDS)[module]}.{kind}"
    _, layer, part = module.split(".", 2)
    return f"transformer.h.{layer}.{_GPT2_PARTS[part]}.{kind}" if gpt2 else f"model.layers.{layer}.{_LLAMA_PARTS[part]}.{kind}"


def mapped_tensors(shape: ModelShape) -> list[Mapped]:
    """All tensors of a shape's Hugging Face model, in the order of our parameters.

    Raises:
        ConfigError: no Hugging Face architecture has this shape.
    """
    gpt2 = architecture_of(shape).model_type == "gpt2"
    parts: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, size in parameter_shapes(shape).items():
        parts.setdefault(_name_there(name, gpt2), []).append((name, size))
    return [_mapped(there, tuple(parameters), shape, gpt2) for there, parameters in parts.items()]


def _mapped(there: str, parameters: tuple[tuple[str, tuple[int, ...]], ...], shape: ModelShape, gpt2: bool) -> Mapped:
    first, size = parameters[0]
    vocabulary = first in ("embedding.word.weight", "head.weight")
    rows = shape.vocab_size if vocabulary else sum(part[0] for _, part in parameters)
    stored = (rows, *size[1:])
    transposed = gpt2 and len(size) == 2 and first.startswith("blocks.")
    return Mapped(there, stored[::-1] if transposed else stored, parameters, rows, transposed)


_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def is_buffer(name: str) -> bool:
    """Whether a tensor is a constant that old files carry and no weight."""
    return name.endswith(_BUFFERS)


def match_prefix(found: Mapping[str, object], mapped: list[Mapped]) -> dict[str, str]:
    """Name that a file uses -> the usual name: files of a bare model lack "model." or "transformer.", wrapped ones add "module."."""
    usual = {tensor.name for tensor in mapped}
    names = {}
    for name in found:
        plain = name.removeprefix("module.").removeprefix("_orig_mod.")
        names[name] = next((full for full in (plain, f"model.{plain}", f"transformer.{plain}") if full in usual), plain)
    return names
