"""Imports from other sources: Megatron-Core's model as the reference, older names, DeepSpeed's merged weights, and errors."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from megatron_patch.convert.checkpoint_io import open_checkpoint
from megatron_patch.convert.from_hugging_face import from_hugging_face
from megatron_patch.convert.from_megatron import find_file, from_megatron, shape_of_arguments
from megatron_patch.convert.to_hugging_face import to_hugging_face
from megatron_patch.engine.inference import load_model
from megatron_patch.errors import CheckpointError
from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.model.gpt import GPTModel
from tests.config.test_resolve import resolve
from tests.convert.models import make_checkpoint, random_parameters
from tests.distributed.ranks import free_port
from tests.distributed.runs import ROOT
from tests.model.shapes import GPT2, LLAMA, QWEN3
from tests.tools.test_tools import tool


@pytest.fixture(scope="module")
def megatron(tmp_path_factory):
    """Writes classic checkpoints of Megatron-Core's models, and their logits."""
    pytest.importorskip("megatron.core")
    folder = tmp_path_factory.mktemp("megatron")
    words = [sys.executable, str(Path(__file__).parent / "megatron_oracle.py"), str(folder), str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("kind", ["llama", "scaled", "gpt", "experts", "shared", "pre-softmax"])
def test_megatron_computes_the_same_logits(kind, megatron, tmp_path):
    from_megatron(megatron / kind, tmp_path / "ckpt")
    expected = torch.load(megatron / f"{kind}.pt")
    with torch.no_grad():
        found = load_model(str(tmp_path / "ckpt")).model.logits(expected["ids"][..., None])
    torch.testing.assert_close(found, expected["logits"], rtol=0.0, atol=1e-5)
    assert float(expected["logits"].std()) > 0.1


def test_the_tool_imports_and_prints_flags_that_make_the_shape(megatron, tmp_path):
    result = json.loads(
        tool("convert_checkpoint", "from-megatron", "--input", megatron / "scaled", "--output", tmp_path / "ckpt").splitlines()[-1]
    )
    words = ["--seq-length", "16", "--global-batch-size", "4", "--train-tokens", "1024", "--dry-run"]
    shape = resolve(*result["flags"], *words).shape
    assert dataclasses.replace(shape, max_positions=32) == open_checkpoint(str(tmp_path / "ckpt")).shape
    assert shape.rotary_scaling == "linear" and shape.qk_norm and shape.qkv_bias and shape.tie_embeddings


def read(folder):
    file = find_file(folder)
    return torch.load(file, weights_only=False), file


def older_names(state):
    """The names of Megatron-LM before Megatron-Core, as nested dicts."""
    encoder = {}
    tree = {"embedding": {}, "encoder": encoder}
    for name, tensor in state["model"].items():
        name = name.replace("self_attention.linear_qkv", "self_attention.query_key_value").replace("linear_proj", "dense")
        name = (
            name.replace("linear_fc1", "dense_h_to_4h")
            .replace("linear_fc2", "dense_4h_to_h")
            .replace("pre_mlp_layernorm", "post_attention_norm")
        )
        name = name.replace("input_layernorm", "input_norm").replace("final_layernorm", "final_norm")
        if name.startswith("decoder."):
            encoder[name.removeprefix("decoder.")] = tensor
        elif name.startswith("embedding.word_embeddings."):
            tree["embedding"]["word_embeddings"] = {"weight": tensor}
        elif name == "output_layer.weight":
            tree["output_layer"] = {"weight": tensor}
    state["model"] = {"language_model": tree}


def engine_names(state):
    """The names of Transformer Engine, whose norms are fused with the projections after them."""
    names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_", "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    for name in list(state["model"]):
        for old, new in names.items():
            if old in name:
                state["model"][name.replace(old, new)] = state["model"].pop(name)


def weights_of_experts(state):
    """Removes what is not a weight of an expert, and returns the names of the weights."""
    names = [name for name in state["model"] if ".local_experts." in name]
    for name in [name for name in names if not name.endswith(".weight")]:
        del state["model"][name]
    return [name for name in names if name.endswith(".weight")]


def engine_experts(state):
    """The names of Transformer Engine's grouped layers."""
    for name in weights_of_experts(state):
        module, _, rest = name.partition(".local_experts.")
        expert, layer, _ = rest.split(".")
        state["model"][f"{module}.{layer}.weight{expert}"] = state["model"].pop(name)


def grouped_experts(state):
    """The two matrices of all experts of Megatron-Core's GroupedMLP, which its grouped product reads as [experts, inputs, outputs]."""
    modules = {name.partition(".local_experts.")[0] for name in weights_of_experts(state)}
    for number, layer in enumerate(("linear_fc1", "linear_fc2"), start=1):
        for module in modules:
            parts = torch.stack([state["model"].pop(f"{module}.local_experts.{expert}.{layer}.weight").t() for expert in range(4)])
            size = (parts.shape[1], -1) if number == 1 else (-1, parts.shape[2])
            state["model"][f"{module}.weight{number}"] = parts.reshape(size)


@pytest.mark.parametrize("form", [engine_experts, grouped_experts])
def test_other_forms_of_the_same_experts_give_the_same_model(form, megatron, tmp_path):
    from_megatron(megatron / "shared", tmp_path / "one")
    state, _ = read(megatron / "shared")
    form(state)
    assert not any(".local_experts." in name for name in state["model"])
    (tmp_path / "in" / "mp_rank_00").mkdir(parents=True)
    torch.save(state, tmp_path / "in" / "mp_rank_00" / "model_optim_rng.pt")
    from_megatron(tmp_path / "in", tmp_path / "two")
    one, two = (load_model(str(tmp_path / name)).model.state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    experts = ExpertShape(4, 3, 20, 12, score="sigmoid", scaling=2.5, bias=True, dense_layers=(0,))
    assert open_checkpoint(str(tmp_path / "two")).shape.experts == experts
    assert bool(one["blocks.1.feed_forward.router.balance.bias"].any())
    assert torch.equal(one["blocks.1.feed_forward.router.balance.load"], torch.full((4,), 0.25))
    if form is grouped_experts:
        name = "decoder.layers.1.mlp.experts.weight2"
        state["model"][name] = state["model"][name][1:]
        torch.save(state, tmp_path / "in" / "mp_rank_00" / "model_optim_rng.pt")
        with pytest.raises(CheckpointError, match=rf"(?s)tensor {name} has shape \(79, 24\).*4 experts of 20 x 24"):
            from_megatron(tmp_path / "in", tmp_path / "three")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"expert_model_parallel_size": 2}, "expert_model_parallel_size is 2"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "moe_router_load_balancing_type is 'sinkhorn'"),
        ({"moe_router_load_balancing_type": ["aux_loss", "sinkhorn"]}, "moe_router_load_balancing_type is 'sinkhorn'"),
        ({"moe_router_num_groups": 4}, "moe_router_num_groups is 4"),
        ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor is 1.0"),
        ({"moe_apply_probs_on_input": True}, "moe_apply_probs_on_input is True"),
        ({"moe_shared_expert_gate": True}, "moe_shared_expert_gate is True"),
        ({"moe_layer_freq": [1, 1, 1]}, "--moe-layer-freq"),
        ({"moe_router_topk": 5}, "--moe-router-topk 5 of --num-experts 4"),
        ({"add_bias_linear": True}, "--num-experts with GELU or with biases"),
    ],
)
def test_experts_of_megatron_that_the_program_does_not_have_are_named(arguments, words, megatron):
    state, _ = read(megatron / "shared")
    with pytest.raises(CheckpointError) as refused:
        shape_of_arguments({**vars(state["args"]), **arguments}, "checkpoint")
    assert words in refused.value.what and refused.value.what.startswith("checkpoint: ")


def test_a_single_sigmoid_is_not_divided_by_itself(megatron):
    state, _ = read(megatron / "shared")
    several = ["seq_aux_loss", "global_aux_loss"]
    shape = shape_of_arguments({**vars(state["args"]), "moe_router_topk": 1, "moe_router_load_balancing_type": several}, "checkpoint")
    assert shape.experts is not None and not shape.experts.renormalized


@pytest.mark.parametrize("rename", [older_names, engine_names])
def test_other_names_of_the_same_modules_give_the_same_model(rename, megatron, tmp_path):
    from_megatron(megatron / "llama", tmp_path / "one")
    state, _ = read(megatron / "llama")
    rename(state)
    (tmp_path / "in" / "mp_rank_00").mkdir(parents=True)
    torch.save(state, tmp_path / "in" / "mp_rank_00" / "model_optim_rng.pt")
    from_megatron(tmp_path / "in", tmp_path / "two")
    one, two = (load_model(str(tmp_path / name)).model.state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def drop(name):
    return lambda state: state["model"].pop(name)


RAN = Path(tempfile.gettempdir()) / f"an-import-ran-code-{os.getpid()}"


class Evil:
    """Would run a command when it is unpickled."""

    def __reduce__(self):
        return (os.system, (f"touch {RAN}",))


QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
REFUSED = {
    "missing": (drop(QKV), [f"tensor {QKV} (48, 24) is missing"]),
    "unexpected": (lambda s: s["model"].update({"decoder.extra": torch.ones(2)}), ["unexpected tensor decoder.extra (2,)"]),
    "shape": (lambda s: s["model"].update({QKV: torch.ones(72, 24)}), [f"{QKV} has shape (72, 24)", "(48, 24)"]),
    "experts": (lambda s: setattr(s["args"], "num_experts", 8), ["tensor decoder.layers.0.mlp.router.weight (8, 24) is missing"]),
    "tensor parallel": (lambda s: setattr(s["args"], "tensor_model_parallel_size", 2), ["tensor_model_parallel_size is 2"]),
    "no arguments": (lambda s: s.pop("args"), ["does not contain args and model"]),
    "missing argument": (lambda s: delattr(s["args"], "kv_channels"), ["the argument kv_channels is missing"]),
    "version": (lambda s: s.update(checkpoint_version=1.0), ["checkpoint_version is 1.0"]),
    "interleaved": (lambda s: setattr(s["args"], "rotary_interleaved", True), ["rotary_interleaved is True"]),
    "code": (lambda s: s.update(extra=Evil()), ["contains more than tensors", "system"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name_before_anything_is_written(name, megatron, tmp_path):
    change, words = REFUSED[name]
    state, _ = read(megatron / "llama")
    change(state)
    (tmp_path / "in" / "mp_rank_00").mkdir(parents=True)
    torch.save(state, tmp_path / "in" / "mp_rank_00" / "model_optim_rng.pt")
    with pytest.raises(CheckpointError) as caught:
        from_megatron(tmp_path / "in", tmp_path / "ckpt")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "ckpt").exists() and not RAN.exists()


def test_layouts_of_several_ranks_are_refused(tmp_path):
    for rank in ("mp_rank_00", "mp_rank_01"):
        (tmp_path / "many" / rank).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="2 model-parallel ranks"):
        from_megatron(tmp_path / "many", tmp_path / "ckpt")
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "__0_0.distcp").touch()
    with pytest.raises(CheckpointError, match="distributed checkpoint"):
        from_megatron(tmp_path / "dist", tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="no mp_rank_00"):
        from_megatron(tmp_path, tmp_path / "ckpt")


@pytest.mark.parametrize("shape", [LLAMA, GPT2, QWEN3], ids=["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("padded", [True, False])
def test_merged_weights_under_our_own_names_come_in(shape, padded, tmp_path):
    """Weights as zero_to_fp32.py writes them: one mapping with our names, here also with the wrapper's prefix, and without padding."""
    parameters = random_parameters(shape)
    model = GPTModel(shape)
    assert sorted(model.state_dict()) == sorted(parameters)
    rows = shape.padded_vocab_size if padded else shape.vocab_size
    state = {
        f"module.{name}": value[:rows] if name in ("embedding.word.weight", "head.weight") else value for name, value in parameters.items()
    }
    (tmp_path / "in").mkdir()
    torch.save(state, tmp_path / "in" / "pytorch_model.bin")
    like = open_checkpoint(str(make_checkpoint(tmp_path / "like", shape)))
    done = from_hugging_face(tmp_path / "in", tmp_path / "ckpt", shape=like.shape)
    found = open_checkpoint(str(done.folder))
    for name, value in parameters.items():
        mine = found.parameter(name)
        assert torch.equal(mine[:53], value[:53]) if mine.shape[0] == 64 else torch.equal(mine, value), name


def test_merged_weights_with_hugging_face_names_come_in_from_several_files(tmp_path):
    """A model of transformers that DeepSpeed trained, merged by zero_to_fp32.py into shards with an index."""
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "like", QWEN3)))
    to_hugging_face(checkpoint, tmp_path / "hf")
    transformers = pytest.importorskip("transformers")
    state = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "hf")).state_dict()
    (tmp_path / "in").mkdir()
    parts = [dict(list(state.items())[i::2]) for i in range(2)]
    weight_map = {}
    for number, part in enumerate(parts):
        file = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        torch.save(part, tmp_path / "in" / file)
        weight_map.update(dict.fromkeys(part, file))
    (tmp_path / "in" / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="--config"):
        from_hugging_face(tmp_path / "in", tmp_path / "ckpt")
    done = from_hugging_face(tmp_path / "in", tmp_path / "ckpt", config=tmp_path / "hf" / "config.json", divisible_by=64)
    found = open_checkpoint(str(done.folder))
    for name, value in random_parameters(QWEN3).items():
        assert torch.equal(found.parameter(name)[:53], value[:53]), name


def test_a_file_that_would_run_code_is_not_opened(tmp_path):
    (tmp_path / "in").mkdir()
    with (tmp_path / "in" / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"embedding.word.weight": Evil()}, file)
    with pytest.raises(CheckpointError, match="contains more than tensors"):
        from_hugging_face(tmp_path / "in", tmp_path / "ckpt", shape=LLAMA)
    assert not RAN.exists()
    torch.save({"embedding.word.weight": torch.ones(2), "args": argparse.Namespace()}, tmp_path / "in" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="contains more than tensors"):
        from_hugging_face(tmp_path / "in", tmp_path / "ckpt", shape=LLAMA)
    (tmp_path / "in" / "pytorch_model.bin").write_bytes(b"PK\x03\x04 not whole")
    with pytest.raises(CheckpointError, match=r"cannot read|contains more"):
        from_hugging_face(tmp_path / "in", tmp_path / "ckpt", shape=LLAMA)
    assert not (tmp_path / "ckpt").exists()
