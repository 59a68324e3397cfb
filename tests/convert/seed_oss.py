"""The example of a registered model family: Seed-OSS, which is Llama with biases of queries, keys and values, and heads of 128."""

from __future__ import annotations

import sys
from typing import Any

from megatron_patch.cli.command_line import run_tool
from megatron_patch.cli.convert_checkpoint import main
from megatron_patch.convert.architectures import ARCHITECTURES, LLAMA_LAYERS, Architecture
from megatron_patch.convert.config_json import read_llama, write_llama
from megatron_patch.convert.config_reader import ConfigReader
from megatron_patch.model.families import FAMILIES, Family
from megatron_patch.model.shape import ModelShape


def required(shape: ModelShape) -> dict[str, Any]:
    """The fields of a model that Seed-OSS computes: Llama's layers, and biases of queries, keys and values only."""
    return {**LLAMA_LAYERS, "qkv_bias": True, "attention_bias": False, "mlp_bias": False}


def read_config(config: ConfigReader) -> dict[str, Any]:
    """The fields of a published model; a bias of the output projection is refused."""
    config.require("attention_out_bias", False, (False,))
    config.require("attention_bias", True, (True,))
    config.require("mlp_bias", False, (False,))
    shape = read_llama(config, positions=524288, head_size=128)
    return {**shape, "num_query_groups": config.number("num_key_value_heads", 8), "qkv_bias": True, "attention_bias": False}


def write_config(shape: ModelShape) -> dict[str, Any]:
    """The keys of an exported model; the last one because transformers' default is an id of the published vocabulary."""
    return {**write_llama(shape), "attention_bias": True, "attention_out_bias": False, "mlp_bias": False, "pad_token_id": None}


def register_seed_oss() -> None:
    """Adds `--model-family seed_oss` and its conversion from and to Hugging Face."""
    FAMILIES["seed_oss"] = Family(norm_epsilon=1e-6, qkv_bias=True)
    ARCHITECTURES["SeedOssForCausalLM"] = Architecture("SeedOssForCausalLM", "seed_oss", "seed_oss", required, read_config, write_config)


if __name__ == "__main__":
    register_seed_oss()
    sys.exit(run_tool(main))
