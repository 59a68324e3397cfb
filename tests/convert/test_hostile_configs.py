"""A config.json from elsewhere may contain anything: it gives a shape, or a refusal in three parts that names the file."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest

from megatron_patch.convert.architectures import architecture_of, config_of, kept_keys, shape_of, special_ids
from megatron_patch.convert.flags import training_flags
from megatron_patch.convert.from_hugging_face import read_config
from megatron_patch.convert.from_megatron import shape_of_arguments
from megatron_patch.errors import CheckpointError
from megatron_patch.model.flops import parameter_count
from tests.convert.models import SHAPES as EXPERTS
from tests.model.shapes import FAMILIES, GEMMA2, GEMMA3, YARN
from tests.tools.test_tools import tool

HOSTILE = [
    *(None, True, False, "", "x", "1", [], [1], [[]], {}, {"a": []}, 0, -1, 1, 3, 1.5, 10**6, 10**12, 2**63, 10**400, -(10**400)),
    *(1e300, -1e300, 1e-300, float("nan"), float("inf"), -float("inf"), "x" * 100_000, ["x" * 100_000], [10**400]),
]


def paths(value, prefix=()):
    """Returns the paths of all values in nested dictionaries."""
    return [
        path for key, part in value.items() for path in [(*prefix, key), *(paths(part, (*prefix, key)) if isinstance(part, dict) else [])]
    ]


SHAPES = {
    **FAMILIES,
    "mistral": dataclasses.replace(YARN, window=9),
    "qwen2": dataclasses.replace(YARN, window=9, full_layers=(1,), qkv_bias=True),
    "olmo3": dataclasses.replace(
        YARN, norm_placement="post", qk_norm=True, qk_norm_scope="all", window=9, full_layers=(1,), windowed_rotary_base=500.0
    ),
    "gemma2": dataclasses.replace(GEMMA2, window=9, full_layers=(1,), query_scalar=9.0),
    "gemma3": dataclasses.replace(GEMMA3, window=9, full_layers=(1,), windowed_rotary_base=500.0),
    "smollm3": dataclasses.replace(YARN, window=9, full_layers=(1,), unrotated_layers=(0,)),
    **{family: EXPERTS[family] for family in ("qwen3_moe", "mixtral", "olmoe", "dots1")},
}


def written(family):
    """Returns a config.json with every key that the reader knows, as transformers writes it."""
    shape = SHAPES[family]
    architecture = architecture_of(shape)
    config = config_of(architecture, shape, "float32", 1, [2, 3])
    config |= {
        "use_sliding_window": False,
        **config,
        "head_dim": shape.head_size,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
    }
    config |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
    if family in ("mistral", "qwen2", "smollm3"):
        config["rope_scaling"] |= {"mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": None, "truncate": True}
    elif "rope_parameters" not in config and architecture.name != "GPT2LMHeadModel":
        config["rope_parameters"] = {**scaling, "original_max_position_embeddings": 8192, "partial_rotary_factor": 1.0}
    return config


@pytest.mark.parametrize("family", SHAPES)
def test_any_value_of_any_key_gives_a_shape_or_a_refusal_in_three_parts(family):
    config = written(family)
    shape_of(config, "config.json")
    refusals = []
    for path in paths(config):
        for value in HOSTILE:
            changed = copy.deepcopy(config)
            part = changed
            for key in path[:-1]:
                part = part[key]
            part[path[-1]] = value
            try:
                shape = shape_of(changed, "config.json")
                special_ids(changed, shape.vocab_size)
                json.dumps(kept_keys(changed, shape.vocab_size))
                assert parameter_count(shape).total > 0
                training_flags(shape, family)
            except CheckpointError as error:
                refusals.append((path, error))
    assert all(str(error).startswith("config.json: ") and error.allowed and error.do and len(str(error)) < 700 for _, error in refusals)
    assert {path for path, _ in refusals} >= {path for path in paths(config) if path[-1] in ("vocab_size", "n_layer", "num_hidden_layers")}


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("hidden_size", 10**400, "hidden_size is 1000"),
        ("num_hidden_layers", 10**8, "num_layers 100000000"),
        ("rope_theta", float("nan"), "rope_theta is nan"),
        ("rms_norm_eps", float("inf"), "rms_norm_eps is inf"),
        ("rms_norm_eps", 10**400, "rms_norm_eps is 1000"),
        ("rms_norm_eps", -1e-6, "--norm-epsilon -1e-06"),
        ("tie_word_embeddings", "false", "tie_word_embeddings is 'false'"),
        ("architectures", [["LlamaForCausalLM"]], "is not registered"),
        ("architectures", ["A", "B"], "the architecture 'A, B' is not registered"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_refusal_names_the_key(key, value, what):
    config = {name: part for name, part in written("llama").items() if name != "rope_parameters"}
    with pytest.raises(CheckpointError, match=what):
        shape_of({**config, key: value}, "config.json")


def test_caps_and_scalars_that_are_not_above_zero_are_named_by_their_keys():
    wrong = {"query_pre_attn_scalar": 0, "attn_logit_softcapping": -1, "final_logit_softcapping": 0.0}
    with pytest.raises(CheckpointError) as refused:
        shape_of({**written("gemma2"), **wrong}, "config.json")
    assert all(f"{key} is {value}; allowed: a number above 0" in refused.value.what for key, value in wrong.items())


def test_all_values_that_cannot_be_used_are_named_at_once():
    """Also those of nested objects; what follows from a wrong number of layers is not."""
    wrong = {"num_hidden_layers": "2", "hidden_act": "relu", "rms_norm_eps": None, "attention_bias": 1, "max_position_embeddings": -1}
    rope = {"rope_type": "dynamic", "rope_theta": "x", "partial_rotary_factor": 0.5}
    with pytest.raises(CheckpointError) as refused:
        shape_of({**written("qwen2"), **wrong, "layer_types": ["x"] * 9, "rope_parameters": rope}, "config.json")
    what = refused.value.what
    assert what.startswith("config.json: 8 values cannot be used\n  - ") and "layer_types" not in what
    named = (
        "hidden_act is 'relu'",
        "num_hidden_layers is '2'",
        "rms_norm_eps is None",
        "attention_bias is 1",
        "max_position_embeddings is -1",
    )
    for part in (*named, "rope_type is 'dynamic'", "rope_theta is 'x'", "partial_rotary_factor is 0.5"):
        assert what.count(part) == 1, part
    assert refused.value.do == "convert another model; or use the model's original config.json"


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "[1]", "1e999", '{"a": 1' + "0" * 5000 + "}", "\udcff"], ids=lambda text: text[:10]
)
def test_what_is_no_configuration_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CheckpointError, match="config.json (cannot be read|contains a JSON)") as refused:
        read_config(tmp_path / "config.json")
    assert refused.value.allowed and refused.value.do


MEGATRON = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "group_query_attention": True,
    "kv_channels": 8,
    "ffn_hidden_size": 64,
    "padded_vocab_size": 64,
    "vocab_size": 60,
    "max_position_embeddings": 32,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "add_bias_linear": False,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "rotary_seq_len_interpolation_factor": None,
    "layernorm_epsilon": 1e-5,
    "tensor_model_parallel_size": 1,
    "rotary_percent": 1.0,
    "window_size": (127, 0),
    "window_attn_skip_freq": [1, 0],
    "no_rope_freq": 2,
    "num_experts": None,
    "qk_layernorm": False,
}


def test_any_argument_of_megatron_gives_a_shape_or_a_refusal_in_three_parts():
    refusals = []
    experts = {
        "num_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 16,
        "moe_layer_freq": [0, 1],
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": False,
        "moe_router_topk_scaling_factor": 2.0,
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 8,
        "moe_router_load_balancing_type": "none",
    }
    for base in (MEGATRON, {**MEGATRON, "use_rope_scaling": True}, {**MEGATRON, "norm_epsilon": None}, {**MEGATRON, **experts}):
        shape_of_arguments(base, "model.pt")
        for name in base:
            for value in HOSTILE:
                try:
                    assert parameter_count(shape_of_arguments({**base, name: value}, "model.pt")).total > 0
                except CheckpointError as error:
                    refusals.append(error)
    assert all(str(error).startswith("model.pt: ") and error.allowed and error.do and len(str(error)) < 700 for error in refusals)


def test_the_tool_refuses_before_it_writes(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps({**written("llama"), "num_attention_heads": 10**400}))
    printed = tool("convert_checkpoint", "from-hf", "--input", tmp_path / "in", "--output", tmp_path / "out", code=4)
    assert "num_attention_heads is 1000" in printed and "What to do" in printed
    assert "Traceback" not in printed and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (None, (), ())),
        ({"window_size": (127, 0)}, (128, (), ())),
        ({"window_size": [127, -1], "window_attn_skip_freq": 2}, (128, (1,), ())),
        ({"window_size": (-1, 0)}, (None, (), ())),
        ({"window_size": (7, 0), "window_attn_skip_freq": [0, 1], "no_rope_freq": [1, 0]}, (8, (0,), (0,))),
        ({"window_size": (7, 0), "window_attn_skip_freq": 1, "no_rope_freq": 2}, (None, (), (1,))),
        ({"window_attn_skip_freq": 2, "no_rope_freq": 0}, (None, (), ())),
    ],
)
def test_windows_and_blocks_without_rotation_of_megatron(arguments, expected):
    """In the form in which Megatron's parser stores them: a pair, and a number or a list."""
    plain = {**MEGATRON, "num_layers": 2, "window_size": None, "window_attn_skip_freq": None, "no_rope_freq": None}
    shape = shape_of_arguments({**plain, **arguments}, "checkpoint")
    assert (shape.window, shape.full_layers, shape.unrotated_layers) == expected
