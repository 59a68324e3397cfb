"""Megatron-Core itself, on a CPU: `python megatron_oracle.py FOLDER` writes checkpoints of the classic layout and their models' logits.

A program of its own, as Megatron's CPU path needs some of its CUDA calls replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

import torch

KINDS = {
    "llama": {
        "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "position_embedding_type": "rope", "group_query_attention": True,
        "untie_embeddings_and_output_weights": True, "qk_layernorm": False, "ffn_hidden_size": 40,
    },
    "scaled": {
        "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "position_embedding_type": "rope", "group_query_attention": True,
        "untie_embeddings_and_output_weights": False, "qk_layernorm": True, "ffn_hidden_size": 40, "rotary_seq_len_interpolation_factor": 4,
        "add_qkv_bias": True,
    },
    "gpt": {
        "normalization": "LayerNorm", "swiglu": False, "add_bias_linear": True, "position_embedding_type": "learned_absolute",
        "group_query_attention": False, "untie_embeddings_and_output_weights": False, "qk_layernorm": False, "ffn_hidden_size": 96,
    },
    "experts": {
        "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "position_embedding_type": "rope", "group_query_attention": True,
        "untie_embeddings_and_output_weights": True, "qk_layernorm": True, "ffn_hidden_size": 40, "num_experts": 4,
        "moe_ffn_hidden_size": 20, "moe_router_topk": 2,
    },
    "shared": {
        "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "position_embedding_type": "rope", "group_query_attention": True,
        "untie_embeddings_and_output_weights": True, "qk_layernorm": False, "ffn_hidden_size": 40, "num_experts": 4,
        "moe_ffn_hidden_size": 20, "moe_router_topk": 3, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 12, "moe_router_topk_scaling_factor": 2.5, "moe_layer_freq": [0, 1],
        "moe_router_load_balancing_type": "none",
    },
    "pre-softmax": {
        "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "position_embedding_type": "rope", "group_query_attention": True,
        "untie_embeddings_and_output_weights": True, "qk_layernorm": False, "ffn_hidden_size": 40, "num_experts": 4,
        "moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_layer_freq": 2,
    },
}  # fmt: skip
COMMON = {
    "num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 6, "max_position_embeddings": 32,
    "layernorm_epsilon": 1e-5, "norm_epsilon": 1e-5, "rotary_base": 500, "rotary_percent": 1.0, "vocab_size": 53, "padded_vocab_size": 64,
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "bias_gelu_fusion": True, "add_qkv_bias": False,
    "params_dtype": torch.float32, "rotary_seq_len_interpolation_factor": None,
}  # fmt: skip


def build(values):
    import torch.nn.functional as F
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=values["num_layers"], hidden_size=values["hidden_size"], num_attention_heads=values["num_attention_heads"],
        num_query_groups=values["num_query_groups"] if values["group_query_attention"] else values["num_attention_heads"],
        kv_channels=values["kv_channels"], ffn_hidden_size=values["ffn_hidden_size"], normalization=values["normalization"],
        gated_linear_unit=values["swiglu"], activation_func=F.silu if values["swiglu"] else F.gelu, add_bias_linear=values["add_bias_linear"],
        add_qkv_bias=values["add_qkv_bias"], qk_layernorm=values["qk_layernorm"], layernorm_epsilon=values["layernorm_epsilon"],
        bias_activation_fusion=not values["swiglu"], hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True,
        masked_softmax_fusion=False, apply_rope_fusion=False, **_experts(values),
    )  # fmt: skip
    if config.num_moe_experts is not None:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=values["normalization"])
    else:
        spec = get_gpt_layer_local_spec(normalization=values["normalization"], qk_layernorm=values["qk_layernorm"])
    return GPTModel(
        config, spec, vocab_size=values["padded_vocab_size"], max_sequence_length=values["max_position_embeddings"], parallel_output=False,
        position_embedding_type=values["position_embedding_type"], rotary_base=values["rotary_base"],
        seq_len_interpolation_factor=values["rotary_seq_len_interpolation_factor"],
        share_embeddings_and_output_weights=not values["untie_embeddings_and_output_weights"],
    )  # fmt: skip


def _experts(values):
    """Returns the options of experts; Megatron keeps the number under another name."""
    if "num_experts" not in values:
        return {}
    given = {name: value for name, value in values.items() if name.startswith("moe_")}
    return {"num_moe_experts": values["num_experts"], "moe_token_dispatcher_type": "allgather", "moe_router_dtype": "fp32", **given}


def main(folder: Path) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
    torch.distributed.init_process_group("gloo")
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # it is not defined without Transformer Engine
    torch.cuda.current_device = lambda: "cpu"
    CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    parallel_state.initialize_model_parallel()
    ids = torch.randint(0, 53, (2, 16), generator=torch.Generator().manual_seed(3))
    positions, mask = torch.arange(16)[None].expand(2, -1), torch.ones(1, 1, 16, 16).triu(1).bool()
    for kind, changes in KINDS.items():
        values = {**COMMON, **changes}
        torch.manual_seed(0)
        model = build(values).eval()
        with torch.no_grad():
            biases = (buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias"))
            for parameter in (*model.parameters(), *biases):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            logits = model(ids, positions, mask)[..., :53]
        state = {
            "args": argparse.Namespace(**values, model_type=ModelType.encoder_or_decoder),
            "checkpoint_version": 3.0,
            "iteration": 1000,
            "model": model.state_dict(),
            "rng_state": [{"np_rng_state": __import__("numpy").random.get_state(), "random_rng_state": (3, (1, 2), None)}],
        }
        target = folder / kind / "iter_0001000" / "mp_rank_00"
        target.mkdir(parents=True)
        torch.save(state, target / "model_optim_rng.pt")
        (folder / kind / "latest_checkpointed_iteration.txt").write_text("1000")
        torch.save({"ids": ids, "logits": logits}, folder / f"{kind}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
