"""Mixtures of experts from and to Hugging Face: every form of their weights, the bias of experts, every key, and what no class can hold."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_patch.convert.architectures import ARCHITECTURES, architecture_of, config_of, kept_keys, shape_of, with_kept_keys
from megatron_patch.convert.checkpoint_io import open_checkpoint
from megatron_patch.convert.flags import training_flags
from megatron_patch.convert.from_hugging_face import from_hugging_face
from megatron_patch.convert.to_hugging_face import to_hugging_face
from megatron_patch.convert.verify import float32_model, verify_export
from megatron_patch.engine.inference import load_model
from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.model.flops import parameter_count
from tests.config.test_resolve import RUN, resolve
from tests.convert.models import SHAPES, make_checkpoint, random_parameters
from tests.model.shapes import LLAMA, QWEN3

transformers = pytest.importorskip("transformers")
IDS = torch.randint(0, 53, (2, 32), generator=torch.Generator().manual_seed(3))
FAMILIES = {name: SHAPES[name] for name in ("qwen3_moe", "mixtral", "olmoe", "dots1")}
DOTS1 = FAMILIES["dots1"]


def made_by_transformers(shape):
    """Returns a model of transformers in bfloat16 with random weights and biases of experts, and a float32 copy."""
    architecture = architecture_of(shape)
    kind = getattr(transformers, architecture.name)
    torch.manual_seed(0)
    model = kind(kind.config_class.from_dict(config_of(architecture, shape, "bfloat16", None, 0))).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias"))):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    model = model.to(torch.bfloat16)
    single = kind(model.config).eval()
    single.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    return model, single


@pytest.mark.parametrize("fused", [False, True], ids=["each expert", "all experts"])
@pytest.mark.parametrize("name", FAMILIES)
def test_both_forms_of_experts_come_in_from_several_files_and_go_out_as_published(name, fused, tmp_path):
    model, single = made_by_transformers(FAMILIES[name])
    model.save_pretrained(str(tmp_path / "theirs"), save_original_format=not fused, max_shard_size="30KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    done = from_hugging_face(tmp_path / "theirs", tmp_path / "ckpt")
    loaded = load_model(str(done.folder)).model
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits(IDS[..., None]), single(IDS).logits, rtol=0.0, atol=2e-6)
    assert all(torch.equal(load, torch.full_like(load, 1 / len(load))) for key, load in loaded.named_buffers() if key.endswith("load"))
    result = to_hugging_face(open_checkpoint(str(done.folder)), tmp_path / "ours")
    assert result.dtype == "bf16"
    model.save_pretrained(str(tmp_path / "published"))
    theirs, ours = (load_file(str(tmp_path / part / "model.safetensors")) for part in ("published", "ours"))
    assert theirs.keys() == ours.keys() and not any("gate_up_proj" in key for key in ours)
    for key, value in theirs.items():
        assert torch.equal(value.float(), ours[key].float()), key
        assert ours[key].dtype == (torch.float32 if key.endswith("correction_bias") else torch.bfloat16)


def test_the_bias_of_experts_keeps_its_bits_in_16_bits(tmp_path):
    """It decides alone between experts whose scores are equal in 16 bits."""
    parameters = random_parameters(DOTS1)
    for name, value in parameters.items():
        if name.endswith("balance.bias"):
            value.copy_(torch.arange(6) * 2.0**-20 + 1.0)
    opened = open_checkpoint(str(make_checkpoint(tmp_path / "ckpt", DOTS1, parameters)))
    to_hugging_face(opened, tmp_path / "hf", dtype="bf16")
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    stored = load_file(str(tmp_path / "hf" / "model.safetensors"))
    assert torch.equal(stored[key], parameters["blocks.1.feed_forward.router.balance.bias"]) and len(stored[key].unique()) == 6
    assert verify_export(opened, tmp_path / "hf", IDS[:1], torch.bfloat16).difference <= 2e-6
    back = from_hugging_face(tmp_path / "hf", tmp_path / "back")
    again = to_hugging_face(open_checkpoint(str(back.folder)), tmp_path / "again")
    assert again.dtype == "bf16"
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()
    rounded = float32_model(opened, torch.bfloat16)
    assert torch.equal(rounded.blocks["1"].feed_forward.router.balance.bias, stored[key])


def test_a_wrong_bias_or_a_swapped_expert_does_not_pass_verification(tmp_path):
    opened = open_checkpoint(str(make_checkpoint(tmp_path / "ckpt", DOTS1)))
    to_hugging_face(opened, tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    whole = load_file(str(path))
    experts = [f"model.layers.2.mlp.experts.{number}.down_proj.weight" for number in (1, 4)]
    bias = "model.layers.2.mlp.gate.e_score_correction_bias"
    swapped = {experts[0]: whole[experts[1]].clone(), experts[1]: whole[experts[0]].clone()}
    for change in (swapped, {bias: whole[bias].flip(0).contiguous()}):
        save_file({**whole, **change}, str(path), metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="logits differ by"):
            verify_export(opened, tmp_path / "hf", IDS, torch.float32)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_exports_are_verified_whatever_the_width_of_an_expert(name, dtype, tmp_path):
    shape = FAMILIES[name]
    width = {"ffn_hidden_size": 10, "shared_ffn_hidden_size": 10 if shape.experts.shared_ffn_hidden_size else 0}
    shape = dataclasses.replace(shape, experts=dataclasses.replace(shape.experts, **width))
    opened = open_checkpoint(str(make_checkpoint(tmp_path / "ckpt", shape)))
    to_hugging_face(opened, tmp_path / "hf", dtype=dtype)
    result = verify_export(opened, tmp_path / "hf", IDS, torch.bfloat16 if dtype == "bf16" else torch.float32)
    assert result.difference <= 2e-6 and result.same_choice == 1.0


def test_sigmoid_without_a_bias_goes_out_with_a_bias_of_zeros(tmp_path):
    shape = dataclasses.replace(DOTS1, experts=dataclasses.replace(DOTS1.experts, bias=False))
    opened = open_checkpoint(str(make_checkpoint(tmp_path / "ckpt", shape)))
    to_hugging_face(opened, tmp_path / "hf")
    assert verify_export(opened, tmp_path / "hf", IDS, torch.float32).difference <= 2e-6
    tensors = load_file(str(tmp_path / "hf" / "model.safetensors"))
    biases = [tensor for name, tensor in tensors.items() if name.endswith("correction_bias")]
    assert len(biases) == 2 and not any(bool(bias.any()) for bias in biases)
    done = from_hugging_face(tmp_path / "hf", tmp_path / "like", shape=shape)
    assert done.shape == shape
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][2] = 0.1
    save_file(tensors, str(tmp_path / "hf" / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.gate.e_score_correction_bias is not zero"):
        from_hugging_face(tmp_path / "hf", tmp_path / "other", shape=shape)


def test_one_expert_is_in_memory_at_a_time(tmp_path):
    opened = open_checkpoint(str(make_checkpoint(tmp_path / "ckpt", FAMILIES["qwen3_moe"])))
    alive, sizes = weakref.WeakSet(), []

    def parameter(name, expert=None):
        tensor = opened.parameter(name, expert)
        assert torch.equal(tensor, opened.parameter(name) if expert is None else opened.parameter(name)[expert])
        alive.add(tensor)
        sizes.append((len(alive), tensor.numel()))
        return tensor

    to_hugging_face(dataclasses.replace(opened, parameter=parameter), tmp_path / "hf")
    assert max(count for count, _ in sizes) <= 2 and max(numel for _, numel in sizes) == 64 * 24  # the embedding


@pytest.mark.parametrize("drop", ["load", "bias", None])
def test_merged_weights_with_our_names_need_the_bias_and_not_the_load(drop, tmp_path):
    parameters = random_parameters(DOTS1)
    (tmp_path / "in").mkdir()
    kept = {f"module.{name}": value for name, value in parameters.items() if drop is None or not name.endswith(f"balance.{drop}")}
    torch.save(kept, tmp_path / "in" / "pytorch_model.bin")
    if drop == "bias":
        with pytest.raises(CheckpointError, match=r"blocks.1.feed_forward.router.balance.bias \(6,\) is missing"):
            from_hugging_face(tmp_path / "in", tmp_path / "ckpt", shape=DOTS1)
        return
    found = open_checkpoint(str(from_hugging_face(tmp_path / "in", tmp_path / "ckpt", shape=DOTS1).folder))
    for name, value in parameters.items():
        expected = torch.full_like(value, 1 / 6) if drop is not None and name.endswith(drop) else value
        assert torch.equal(found.parameter(name), expected), name


def test_a_missing_expert_is_named(tmp_path):
    to_hugging_face(open_checkpoint(str(make_checkpoint(tmp_path / "ckpt", FAMILIES["mixtral"]))), tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(str(path))
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    lost = tensors.pop(name)
    save_file(tensors, str(path))
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=rf"tensor {name} \(24, 20\) is missing"):
        from_hugging_face(tmp_path / "hf", tmp_path / "in")
    save_file({**tensors, name: lost, name.replace(".3.", ".4."): lost.clone()}, str(path))
    with pytest.raises(CheckpointError, match=r"unexpected tensor model.layers.1.block_sparse_moe.experts.4.w2.weight"):
        from_hugging_face(tmp_path / "hf", tmp_path / "in")


def expert_shape(**values):
    return dataclasses.replace(ExpertShape(4, 2, 20), **values)


UNKNOWN = {
    "softmax with a bias": ("qwen3_moe", QWEN3, {"bias": True}, "experts.bias False, not True"),
    "softmax with shared experts": ("qwen3_moe", QWEN3, {"shared_ffn_hidden_size": 40}, "experts.shared_ffn_hidden_size 0, not 40"),
    "scaled softmax": ("qwen3_moe", QWEN3, {"scaling": 2.5}, "experts.scaling 1.0, not 2.5"),
    "GeGLU": ("qwen3_moe", dataclasses.replace(QWEN3, activation="geglu"), {}, "activation swiglu, not geglu"),
    "windows in some blocks": ("qwen3_moe", dataclasses.replace(QWEN3, window=5, full_layers=(1,)), {}, "full_layers (), not (1,)"),
    "norms after": (
        "olmoe",
        dataclasses.replace(QWEN3, qk_norm_scope="all", norm_placement="post"),
        {},
        "norm_placement pre, not post",
    ),
    "weights of softmax without norms": ("mixtral", LLAMA, {"renormalized": False}, "experts.renormalized True, not False"),
    "dense blocks without norms": ("mixtral", LLAMA, {"dense_layers": (0,)}, "experts.dense_layers (), not (0,)"),
    "wide heads": ("olmoe", dataclasses.replace(QWEN3, qk_norm_scope="all", head_size=8), {}, "hidden_size 32, not 24"),
    "sigmoid alone": ("dots1", QWEN3, {"score": "sigmoid"}, "experts.shared_ffn_hidden_size 20, not 0"),
    "a part of an expert": (
        "dots1",
        QWEN3,
        {"score": "sigmoid", "shared_ffn_hidden_size": 35},
        "experts.shared_ffn_hidden_size 40, not 35",
    ),
    "sigmoid with a dense block in between": (
        "dots1",
        QWEN3,
        {"score": "sigmoid", "shared_ffn_hidden_size": 20, "dense_layers": (1,)},
        "experts.dense_layers (0,), not (1,)",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_shapes_that_no_class_can_hold_are_refused_by_name(name, tmp_path):
    family, shape, experts, words = UNKNOWN[name]
    shape = dataclasses.replace(shape, experts=expert_shape(**experts))
    opened = open_checkpoint(str(make_checkpoint(tmp_path / "ckpt", shape, options={"seq_length": 16, "model_family": family})))
    with pytest.raises(ConfigError) as refused:
        to_hugging_face(opened, tmp_path / "hf")
    nearest = next(architecture.name for architecture in ARCHITECTURES.values() if architecture.family == family)
    assert refused.value.what.endswith(f"{nearest} comes nearest and needs {words}") and not (tmp_path / "hf").exists()


PUBLISHED = {
    "Qwen3-30B-A3B": (
        {"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
         "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
         "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
         "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
         "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
         "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
         "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936},
        30_532_122_624,
        ExpertShape(128, 8, 768),
    ),
    "Mixtral 8x7B": (
        {"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
         "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
         "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
         "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
         "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
         "vocab_size": 32000},
        46_702_792_704,
        ExpertShape(8, 2, 14336),
    ),
    "OLMoE-1B-7B": (
        {"architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None, "eos_token_id": 50279,
         "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 1024, "max_position_embeddings": 4096,
         "model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
         "num_hidden_layers": 16, "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05,
         "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
         "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 50304},
        6_919_161_856,
        ExpertShape(64, 8, 1024, renormalized=False),
    ),
    "dots.llm1": (
        {"architectures": ["Dots1ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 151643,
         "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 10944,
         "max_position_embeddings": 32768, "model_type": "dots1", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
         "n_routed_experts": 128, "n_shared_experts": 2, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts_per_tok": 6,
         "num_hidden_layers": 62, "num_key_value_heads": 32, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000000,
         "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "sliding_window": None, "tie_word_embeddings": False, "topk_group": 1,
         "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 152064},
        None,
        ExpertShape(128, 6, 1408, 2816, score="sigmoid", scaling=2.5, bias=True, dense_layers=(0,)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations_of_public_models(name):
    """config.json as published gives the parameters of the published weights, and flags that train the same model."""
    config, parameters, experts = PUBLISHED[name]
    shape = shape_of(config, "config.json")
    assert shape.experts == experts
    counted = parameter_count(dataclasses.replace(shape, padded_vocab_size=shape.vocab_size)).total
    assert parameters is None or counted == parameters
    words = ["--seq-length", "16", "--global-batch-size", "4", "--train-tokens", "1024", "--dry-run"]
    family = ARCHITECTURES[config["architectures"][0]].family
    flags = training_flags(shape, family)
    assert flags[:2] == ["--model-family", family]
    assert dataclasses.replace(resolve(*flags, *words).shape, max_positions=shape.max_positions) == shape
    again = config_of(architecture_of(shape, family), shape, "bfloat16", None, None)
    kept = with_kept_keys(again, kept_keys({**config, "router_jitter_noise": 0.25}, shape.vocab_size))
    assert kept.get("router_aux_loss_coef") == config.get("router_aux_loss_coef")
    assert kept.get("router_jitter_noise") == (0.25 if name.startswith("Mixtral") else None)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("Qwen3-30B-A3B", {"norm_topk_prob": "absent", "head_dim": "absent"}, {"renormalized": False}),
        ("Qwen3-30B-A3B", {"decoder_sparse_step": 2, "num_hidden_layers": 5}, {"dense_layers": (0, 2, 4)}),
        ("Qwen3-30B-A3B", {"mlp_only_layers": [3, 0], "num_hidden_layers": 5}, {"dense_layers": (0, 3)}),
        (
            "Qwen3-30B-A3B",
            {"num_experts": "absent", "num_experts_per_tok": "absent", "moe_intermediate_size": "absent"},
            {"count": 128, "top_k": 8, "ffn_hidden_size": 768},
        ),
        ("Qwen3-30B-A3B", {"use_sliding_window": True, "sliding_window": 9}, {"count": 128}),
        ("Mixtral 8x7B", {"num_local_experts": "absent", "num_experts_per_tok": "absent", "sliding_window": 9}, {"count": 8, "top_k": 2}),
        (
            "OLMoE-1B-7B",
            {"num_experts": "absent", "norm_topk_prob": True, "num_key_value_heads": "absent"},
            {"count": 64, "renormalized": True},
        ),
        (
            "dots.llm1",
            {"first_k_dense_replace": "absent", "routed_scaling_factor": "absent", "norm_topk_prob": "absent"},
            {"dense_layers": (), "scaling": 1.0, "renormalized": False},
        ),
        ("dots.llm1", {"sliding_window": 9, "max_window_layers": 60, "first_k_dense_replace": 3}, {"dense_layers": (0, 1, 2)}),
    ],
)
def test_missing_keys_have_the_defaults_of_transformers(name, change, expected):
    """The same values are read from a configuration that transformers has completed, in its own newer words."""
    config = {key: value for key, value in {**PUBLISHED[name][0], **change}.items() if value != "absent"}
    completed = transformers.AutoConfig.for_model(**config).to_dict()
    shapes = [shape_of(values, "config.json") for values in (config, {**completed, "architectures": config["architectures"]})]
    assert shapes[0] == shapes[1]
    assert {key: getattr(shapes[0].experts, key) for key in expected} == expected
    window = 9 if change.get("sliding_window") else None
    assert shapes[0].window == window
    assert shapes[0].full_layers == (tuple(range(60)) if window and name == "dots.llm1" else ())


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        (
            "dots.llm1",
            {"n_group": 8, "topk_group": 4, "hidden_act": "gelu", "scoring_func": "softmax", "topk_method": "greedy", "moe_layer_freq": 2},
            ["n_group is 8", "topk_group is 4", "hidden_act is 'gelu'", "scoring_func is 'softmax'", "topk_method is 'greedy'",
             "moe_layer_freq is 2"],
        ),
        ("dots.llm1", {"n_shared_experts": None, "routed_scaling_factor": 0}, ["n_shared_experts is None", "routed_scaling_factor is 0"]),
        ("OLMoE-1B-7B", {"clip_qkv": 8.0, "norm_topk_prob": 1, "hidden_act": "gelu"}, ["clip_qkv is 8.0", "norm_topk_prob is 1", "hidden_act"]),
        (
            "Qwen3-30B-A3B",
            {"mlp_only_layers": ["0"], "num_experts": "8", "decoder_sparse_step": 0},
            ["mlp_only_layers is ['0']", "num_experts is '8'", "decoder_sparse_step is 0"],
        ),
        ("Qwen3-30B-A3B", {"num_experts_per_tok": 200}, ["--moe-router-topk 200 of --num-experts 128"]),
        ("Qwen3-30B-A3B", {"decoder_sparse_step": 100}, ["blocks without experts"]),
        ("Mixtral 8x7B", {"num_local_experts": 1}, ["--num-experts 1"]),
        ("Mixtral 8x7B", {"architectures": ["Qwen2MoeForCausalLM"]}, ["'Qwen2MoeForCausalLM' is not registered: its shared expert has a gate"]),
        ("dots.llm1", {"architectures": ["DeepseekV3ForCausalLM"]}, ["'DeepseekV3ForCausalLM' is not registered: its attention is multi-head"]),
    ],
)  # fmt: skip
def test_what_the_program_does_not_compute_is_named_at_once(name, change, named):
    with pytest.raises(CheckpointError) as refused:
        shape_of({**PUBLISHED[name][0], **change}, "config.json")
    assert refused.value.what.startswith("config.json: ") and all(refused.value.what.count(part) == 1 for part in named), refused.value


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_mixtures_needs_its_experts(family):
    with pytest.raises(ConfigError, match=f"--model-family {family} without --num-experts"):
        resolve(*RUN, "--model-family", family)
    shape = resolve(*RUN, "--model-family", family, "--num-experts", "4", "--moe-ffn-hidden-size", "8").shape
    assert (shape.qk_norm, shape.qk_norm_scope) == (FAMILIES[family].qk_norm, FAMILIES[family].qk_norm_scope)


def test_sigmoids_that_are_not_divided_have_no_flags():
    assert training_flags(dataclasses.replace(DOTS1, experts=dataclasses.replace(DOTS1.experts, renormalized=False)), "dots1") is None
