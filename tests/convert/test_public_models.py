"""Folders like those of public models: every key of their config.json, tiny sizes, 16-bit weights made by transformers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_patch.convert.architectures import shape_of
from megatron_patch.convert.checkpoint_io import open_checkpoint
from megatron_patch.convert.from_hugging_face import from_hugging_face
from megatron_patch.convert.to_hugging_face import to_hugging_face
from megatron_patch.engine.inference import load_model
from megatron_patch.errors import CheckpointError

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 131}
COMMON = {"hidden_act": "silu", "initializer_range": 0.02, "use_cache": True, "bos_token_id": 128, **SMALL}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
SLIDING = {"max_window_layers": 28, "sliding_window": 32768, "use_sliding_window": False}
CONFIGS = {
    "Llama 3.1": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": [129, 130],
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_key_value_heads": 2, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": SCALING, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0",
    },
    "Llama 3.2": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 129, "head_dim": 8,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_key_value_heads": 2, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": {**SCALING, "factor": 32.0}, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "Llama 2": {
        "architectures": ["LlamaForCausalLM"], "eos_token_id": 2, "max_position_embeddings": 4096, "model_type": "llama",
        "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
        "torch_dtype": "float16",
    },
    "Qwen2.5": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "eos_token_id": 128, "max_position_embeddings": 32768,
        "model_type": "qwen2", "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "use_mrope": False, **SLIDING,
    },
    "Qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 130, "head_dim": 16,
        "max_position_embeddings": 40960, "model_type": "qwen3", "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", **SLIDING, "sliding_window": None,
    },
    "Mistral 7B v0.1": {
        "architectures": ["MistralForCausalLM"], "eos_token_id": 2, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 16, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "Mistral 7B v0.3": {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.1, "eos_token_id": 2, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "pad_token_id": 7,
    },
    "Qwen2.5 with windows": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "eos_token_id": 128, "max_position_embeddings": 32768,
        "model_type": "qwen2", "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "pad_token_id": 3,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "SmolLM3": {
        "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 12,
        "layer_types": ["full_attention"] * 5, "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False,
        "model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0, 1], "num_hidden_layers": 5,
        "num_key_value_heads": 2, "pad_token_id": 4, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 5000000.0, "sliding_window": None, "torch_dtype": "bfloat16", "use_sliding_window": False,
    },
    "OLMo 2": {
        "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 57,
        "max_position_embeddings": 4096, "model_type": "olmo2", "num_key_value_heads": 4, "pad_token_id": 77, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": False,
    },
    "Olmo 3": {
        "architectures": ["Olmo3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 57,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "max_position_embeddings": 65536, "model_type": "olmo3",
        "num_hidden_layers": 4, "num_key_value_heads": 4, "pad_token_id": 77, "rms_norm_eps": 1e-06, "rope_theta": 500000,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
            "original_max_position_embeddings": 8192, "rope_type": "yarn",
        },
        "sliding_window": 16, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
    "Gemma 2": {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": 50.0,
        "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 16,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
        "model_type": "gemma2", "num_key_value_heads": 2, "pad_token_id": 0, "query_pre_attn_scalar": 16, "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "sliding_window": 16, "torch_dtype": "bfloat16",
    },
    "Gemma 3": {
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None,
        "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 16,
        "hidden_act": "absent", "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32768, "model_type": "gemma3_text",
        "num_hidden_layers": 3, "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 24, "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "rope_theta": 1000000,
        "sliding_window": 16, "sliding_window_pattern": 3, "torch_dtype": "bfloat16",
    },
    "Llama with YaRN": {
        "architectures": ["LlamaForCausalLM"], "attention_dropout": 0.05, "eos_token_id": 2, "max_position_embeddings": 131072,
        "model_type": "llama", "num_key_value_heads": 4, "pad_token_id": 0, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
        "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.5},
        "torch_dtype": "bfloat16",
    },
    "GPT-2": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 130, "embd_pdrop": 0.1,
        "eos_token_id": 130, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 2,
        "n_positions": 64, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True, "task_specific_params": {"text-generation": {"do_sample": True}},
    },
}  # fmt: skip
IDS = torch.randint(0, 131, (2, 48), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", ["as published", "as transformers saves it"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_public_model_comes_in_and_goes_out_as_it_was(name, form, tmp_path):
    config = {key: value for key, value in {**COMMON, **CONFIGS[name]}.items() if value != "absent"}
    source = tmp_path / "public"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    made = transformers.AutoConfig.from_pretrained(str(source))
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    dtype = torch.float16 if config.get("torch_dtype") == "float16" else torch.bfloat16
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
            parameter.copy_(parameter.to(dtype))
    if form == "as published":
        tied = made.tie_word_embeddings
        tensors = {key: value.to(dtype).clone() for key, value in model.state_dict().items() if not (tied and key == "lm_head.weight")}
        save_file(tensors, str(source / "model.safetensors"), metadata={"format": "pt"})
        # Another layout of the same weights, as some publishers add it to the usual one.
        save_file({"layers.0.wq": torch.ones(2)}, str(source / "consolidated.safetensors"))
    else:
        model.save_pretrained(str(source))
        assert "rope_theta" not in json.loads((source / "config.json").read_text())
    done = from_hugging_face(source, tmp_path / "ckpt")
    with torch.no_grad():
        torch.testing.assert_close(load_model(str(done.folder)).model.logits(IDS[..., None]), model(IDS).logits, rtol=0.0, atol=1e-5)
    to_hugging_face(open_checkpoint(str(done.folder)), tmp_path / "hf")
    before, after = (load_file(str(folder / "model.safetensors")) for folder in (source, tmp_path / "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) and value.dtype == after[key].dtype for key, value in before.items())
    found = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (found["bos_token_id"], found["eos_token_id"]) == (config["bos_token_id"], config["eos_token_id"])
    kept = [key for key in ("pad_token_id", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop") if key in config]
    assert {key: found[key] for key in kept} == {key: config[key] for key in kept}
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"]


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("Mistral 7B v0.1", {"sliding_window": "absent"}, {"window": 4096, "full_layers": ()}),
        ("Qwen2.5 with windows", {"sliding_window": "absent"}, {"window": 4096, "full_layers": (0,)}),
        ("Qwen2.5 with windows", {"max_window_layers": "absent"}, {"window": None, "full_layers": ()}),
        ("Qwen2.5 with windows", {"max_window_layers": 0}, {"window": 16, "full_layers": ()}),
        ("Qwen2.5 with windows", {"sliding_window": None}, {"window": None, "full_layers": ()}),
        ("Qwen2.5 with windows", {"layer_types": ["sliding_attention", "full_attention"]}, {"window": 16, "full_layers": (1,)}),
        ("SmolLM3", {"no_rope_layers": "absent"}, {"unrotated_layers": (3,), "window": None}),
        ("SmolLM3", {"no_rope_layers": "absent", "no_rope_layer_interval": 2}, {"unrotated_layers": (1, 3)}),
        ("SmolLM3", {"rope_theta": "absent"}, {"rotary_base": 2e6}),
        ("SmolLM3", {"use_sliding_window": True, "sliding_window": 9, "layer_types": "absent"}, {"window": 9, "full_layers": (0, 1, 2, 4)}),
        ("OLMo 2", {"rms_norm_eps": "absent", "num_key_value_heads": "absent"}, {"norm_epsilon": 1e-5, "num_query_groups": 4}),
        ("Olmo 3", {}, {"window": 16, "full_layers": (3,), "rotary_base": 5e5, "windowed_rotary_base": 5e5, "rotary_scaling": "yarn"}),
        ("Olmo 3", {"layer_types": "absent", "num_hidden_layers": 9, "sliding_window": "absent"}, {"window": 4096, "full_layers": (3, 7)}),
        ("Olmo 3", {"rope_scaling": None}, {"windowed_rotary_base": None, "rotary_base": 5e5}),
        ("Olmo 3", {"rope_scaling": "absent", "rope_theta": "absent"}, {"windowed_rotary_base": None, "rotary_base": 5e5}),
        ("Gemma 2", {}, {"window": 16, "full_layers": (1,), "query_scalar": None, "tie_embeddings": True, "attention_softcap": 50.0}),
        (
            "Gemma 2",
            {"head_dim": "absent", "num_key_value_heads": "absent"},
            {"head_size": 256, "num_query_groups": 4, "query_scalar": 16.0},
        ),
        (
            "Gemma 2",
            {
                "attn_logit_softcapping": "absent",
                "final_logit_softcapping": None,
                "query_pre_attn_scalar": "absent",
                "sliding_window": "absent",
            },
            {"attention_softcap": 50.0, "logit_softcap": None, "query_scalar": 256.0, "window": 4096},
        ),
        ("Gemma 3", {"num_hidden_layers": 12, "sliding_window_pattern": "absent"}, {"full_layers": (5, 11), "logit_softcap": None}),
        (
            "Gemma 3",
            {"rope_theta": "absent", "rope_local_base_freq": "absent", "rope_scaling": "absent"},
            {"rotary_base": 1e6, "windowed_rotary_base": 1e4, "rotary_scaling": "none"},
        ),
        ("Llama with YaRN", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, {"rotary_original_positions": 131072}),
        ("Llama with YaRN", {}, {"rotary_attention_factor": (0.1 * math.log(32) + 1) / (0.05 * math.log(32) + 1)}),
    ],
)
def test_missing_keys_have_the_defaults_of_transformers(name, change, expected, tmp_path):
    """The same values are read from a configuration that transformers has completed."""
    config = {key: value for key, value in ({**COMMON, **CONFIGS[name], **change}).items() if value != "absent"}
    completed = transformers.AutoConfig.for_model(**config).to_dict()
    for values in (config, {**completed, "architectures": config["architectures"]}):
        shape = shape_of(values, "config.json")
        assert {key: getattr(shape, key) for key in expected} == expected


def test_what_public_models_compute_and_the_program_does_not_is_named(tmp_path):
    phi = {**COMMON, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "sliding_window": 4096, "rope_theta": 10000.0}
    for config, words in (
        (phi, "Phi3ForCausalLM"),
        ({**COMMON, **CONFIGS["Gemma 3"], "attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({**COMMON, **CONFIGS["Gemma 3"], "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({**COMMON, **CONFIGS["Gemma 2"], "hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ({**COMMON, **CONFIGS["Gemma 2"], "sliding_window": None}, "sliding_window is None, but layers have a window"),
        (
            {**COMMON, **CONFIGS["Olmo 3"], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_parameters is {'rope_type'",
        ),
        ({**COMMON, **CONFIGS["Olmo 3"], "rope_theta": 1e4}, "rope_theta is 10000.0"),
        ({**COMMON, "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}, "Gemma3ForConditionalGeneration"),
        ({**COMMON, **CONFIGS["Llama 2"], "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=words):
            from_hugging_face(tmp_path, tmp_path / "ckpt")
