"""The example of a registered model family: Mistral without sliding windows."""

from __future__ import annotations

import sys
from typing import Any

from megatron_patch.cli.command_line import run_tool
from megatron_patch.cli.convert_checkpoint import main
from megatron_patch.convert.architectures import ARCHITECTURES, LLAMA_LAYERS, Architecture
from megatron_patch.convert.config_json import ConfigReader, read_llama, write_llama
from megatron_patch.model.families import FAMILIES, Family
from megatron_patch.model.shape import ModelShape


def required(shape: ModelShape) -> dict[str, Any]:
    """The fields of a model that Mistral computes: Llama's layers, and no biases."""
    return {**LLAMA_LAYERS, "qkv_bias": False, "attention_bias": False, "mlp_bias": False}


def read_config(config: ConfigReader) -> dict[str, Any]:
    """The fields of a published model; a model with a sliding window is refused."""
    config.require("sliding_window", 4096, (None,))
    return {**read_llama(config, positions=131072), "num_query_groups": config.number("num_key_value_heads", 8)}


def write_config(shape: ModelShape) -> dict[str, Any]:
    """The keys of an exported model; without the second one, transformers would set a window of 4096 positions."""
    return {**write_llama(shape), "sliding_window": None}


def register_mistral() -> None:
    """Adds `--model-family mistral` and its conversion from and to Hugging Face."""
    FAMILIES["mistral"] = Family(norm_epsilon=1e-5)
    ARCHITECTURES["MistralForCausalLM"] = Architecture("MistralForCausalLM", "mistral", "mistral", required, read_config, write_config)


if __name__ == "__main__":
    register_mistral()
    sys.exit(run_tool(main))
