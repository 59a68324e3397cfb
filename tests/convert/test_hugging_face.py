"""Export to Hugging Face and import: the logits of transformers for every family, bit-identical round trips, and every error."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_patch.convert import from_hugging_face as from_hugging_face_module
from megatron_patch.convert.architectures import architecture_of, config_of, shape_of
from megatron_patch.convert.checkpoint_io import open_checkpoint
from megatron_patch.convert.flags import training_flags
from megatron_patch.convert.from_hugging_face import from_hugging_face
from megatron_patch.convert.to_hugging_face import to_hugging_face
from megatron_patch.convert.verify import float32_model, verify_export
from megatron_patch.engine.inference import load_model
from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.model.families import family_of_shape
from tests.config.test_resolve import ROOT, resolve
from tests.convert.models import SHAPES, make_checkpoint, make_tokenizer, random_parameters
from tests.model.shapes import GPT2, LLAMA, QWEN3
from tests.tools.test_tools import tool

transformers = pytest.importorskip("transformers")
IDS = torch.randint(0, 53, (2, 32), generator=torch.Generator().manual_seed(3))


def export(tmp_path, shape, name="hf", **options):
    checkpoint = make_checkpoint(tmp_path / f"ckpt-{name}", shape)
    to_hugging_face(open_checkpoint(str(checkpoint)), tmp_path / name, **options)
    return checkpoint, tmp_path / name


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_the_same_logits(name, tmp_path):
    """Within 1e-5 in float32. All parameters are random, so that each one matters."""
    checkpoint, folder = export(tmp_path, SHAPES[name])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    assert theirs.dtype == torch.float32 and type(theirs).__name__ == architecture_of(SHAPES[name]).name
    with torch.no_grad():
        expected = theirs(IDS).logits
        found = load_model(str(checkpoint)).model.logits(IDS[..., None])
    assert found.shape == expected.shape == (2, 32, 53)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)
    assert float(expected.std()) > 0.05


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_round_trip_keeps_every_bit(name, dtype, tmp_path):
    _, first = export(tmp_path, SHAPES[name], dtype=dtype)
    done = from_hugging_face(first, tmp_path / "back", divisible_by=64)
    assert dataclasses.replace(done.shape, init_std=0.2) == SHAPES[name]
    to_hugging_face(open_checkpoint(str(done.folder)), tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (first, tmp_path / "again"))
    assert before == after


@pytest.mark.parametrize("name", SHAPES)
def test_what_transformers_saves_comes_in_and_goes_out_bit_for_bit(name, tmp_path):
    """The model is made by transformers, with its newest form of config.json."""
    config = config_of(architecture_of(SHAPES[name]), SHAPES[name], "float32", None, 0)
    kind = getattr(transformers, architecture_of(SHAPES[name]).name)
    torch.manual_seed(0)
    model = kind(kind.config_class.from_dict(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(str(tmp_path / "theirs"))
    done = from_hugging_face(tmp_path / "theirs", tmp_path / "ckpt")
    with torch.no_grad():
        expected, found = model(IDS).logits, load_model(str(tmp_path / "ckpt")).model.logits(IDS[..., None])
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)
    to_hugging_face(open_checkpoint(str(done.folder)), tmp_path / "ours")
    theirs, ours = (load_file(str(tmp_path / part / "model.safetensors")) for part in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for tensor, value in theirs.items():
        assert torch.equal(value, ours[tensor]) and value.dtype == ours[tensor].dtype, tensor


def test_shards_are_cut_by_size_and_resumed_by_checksum(tmp_path):
    """An export is interrupted after two files, and one is damaged: the other is kept, and the result equals an uninterrupted export."""
    checkpoint, whole = export(tmp_path, LLAMA)
    opened = open_checkpoint(str(checkpoint))
    reads = []

    def failing(name):
        reads.append(name)
        if len(reads) > 12:
            raise KeyboardInterrupt
        return opened.parameter(name)

    limit = 8_000
    with pytest.raises(KeyboardInterrupt):
        to_hugging_face(dataclasses.replace(opened, parameter=failing), tmp_path / "parts", max_shard_size=limit)
    partial = tmp_path / "parts.partial"
    assert not (tmp_path / "parts").exists()
    finished = sorted(json.loads((partial / "progress.json").read_text())["done"])
    assert len(finished) >= 2
    damaged = bytearray((partial / finished[0]).read_bytes())
    damaged[-1] ^= 1
    (partial / finished[0]).write_bytes(damaged)
    done = to_hugging_face(opened, tmp_path / "parts", max_shard_size=limit)
    assert list(done.kept) == finished[1:] and not partial.exists()
    assert all((tmp_path / "parts" / name).stat().st_size < limit + 2000 for name in done.files) and len(done.files) > 3
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    joined = {}
    for name in done.files:
        tensors = load_file(str(tmp_path / "parts" / name))
        assert all(index["weight_map"][tensor] == name for tensor in tensors)
        joined.update(tensors)
    expected = load_file(str(whole / "model.safetensors"))
    assert joined.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(joined[name], expected[name]) for name in expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "parts"))
    assert torch.equal(theirs.state_dict()["lm_head.weight"], expected["lm_head.weight"])
    assert from_hugging_face(tmp_path / "parts", tmp_path / "in").tensors == len(expected)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """Or all parameters that one tensor stacks: GPT-2's queries, keys and values."""
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "ckpt", GPT2)))
    alive, most = weakref.WeakSet(), 0

    def parameter(name):
        nonlocal most
        tensor = checkpoint.parameter(name)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    to_hugging_face(dataclasses.replace(checkpoint, parameter=parameter), tmp_path / "hf", max_shard_size=10**9)
    assert most <= 4


def test_other_settings_do_not_go_on_from_an_unfinished_export(tmp_path):
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "ckpt", LLAMA)))

    def failing(name):
        if name.startswith("blocks.1"):
            raise KeyboardInterrupt
        return checkpoint.parameter(name)

    with pytest.raises(KeyboardInterrupt):
        to_hugging_face(dataclasses.replace(checkpoint, parameter=failing), tmp_path / "hf", max_shard_size=16_000)
    done = to_hugging_face(checkpoint, tmp_path / "hf", max_shard_size=16_000, dtype="bf16")
    assert done.kept == ()
    assert {tensor.dtype for name in done.files for tensor in load_file(str(tmp_path / "hf" / name)).values()} == {torch.bfloat16}


def test_nothing_is_written_over(tmp_path):
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "ckpt", LLAMA)))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        to_hugging_face(checkpoint, tmp_path / "hf")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not an unfinished export"):
        to_hugging_face(checkpoint, tmp_path / "other")
    assert (tmp_path / "other.partial" / "mine.txt").read_text() == "mine"


def test_the_tokenizer_comes_along_both_ways(tmp_path):
    shape = dataclasses.replace(LLAMA, vocab_size=280, padded_vocab_size=384)
    tokenizer = make_tokenizer(tmp_path / "tokenizer", 280)
    info = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tokenizer), "eod_id": 0}
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "ckpt", shape, data_metadata=info)))
    done = to_hugging_face(checkpoint, tmp_path / "hf")
    assert done.tokenizer == ("tokenizer.json", "tokenizer_config.json")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    assert theirs.decode(theirs("the cat sat")["input_ids"]) == "the cat sat" and theirs.eos_token_id == 0
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == {"eos_token_id": 0}
    back = from_hugging_face(tmp_path / "hf", tmp_path / "back")
    assert open_checkpoint(str(back.folder)).data_metadata["tokenizer_model"] == str(tmp_path / "back" / "tokenizer")


def test_verify_compares_the_tokenizers_too(tmp_path):
    """A SentencePiece model that drops spaces is read by transformers as if it kept them; a tokenizer.json is the same there."""
    import sentencepiece

    (tmp_path / "t.txt").write_text("the cat sat on the mat\nthe dog sat on the log\n" * 30)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "t.txt"),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=285,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    shape = dataclasses.replace(LLAMA, vocab_size=285, padded_vocab_size=384)
    path = make_checkpoint(
        tmp_path / "ckpt", shape, data_metadata={"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "moved/away"}
    )
    words = ("to-hf", "--load", path, "--verify", "--output")
    assert (
        "neither the run's data nor its tokenizer is on this machine" in tool("convert_checkpoint", *words, tmp_path / "x", code=2)
        and not (tmp_path / "x").exists()
    )
    json_folder = make_tokenizer(tmp_path / "json", 280)
    for name, kind, model, differs in (
        ("one", "HuggingFaceTokenizer", json_folder, False),
        ("two", "SentencePieceTokenizer", tmp_path / "sp.model", True),
    ):
        result = json.loads(
            tool("convert_checkpoint", *words, tmp_path / name, "--tokenizer-type", kind, "--tokenizer-model", model).splitlines()[-1]
        )
        assert result["tokenizer"] and result["verified"]["difference"] <= 1e-5 and result["verified"]["tokens"] == 32
        assert bool(result["tokenizer_differs_on"]) is differs


def test_an_export_without_its_tokenizer_is_whole_but_for_it(tmp_path):
    info = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path / "moved"), "eod_id": 7}
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "ckpt", LLAMA, data_metadata=info)))
    assert to_hugging_face(checkpoint, tmp_path / "hf").tokenizer == ()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 7


def test_an_import_that_was_interrupted_is_made_again_and_a_whole_one_is_not_touched(tmp_path, monkeypatch):
    _, folder = export(tmp_path, dataclasses.replace(LLAMA, vocab_size=280, padded_vocab_size=384))
    make_tokenizer(folder, 280)
    monkeypatch.setattr(from_hugging_face_module, "_parameters", lambda *args: iter([]))
    with pytest.raises((StopIteration, RuntimeError)):
        from_hugging_face(folder, tmp_path / "in")
    monkeypatch.undo()
    assert not list((tmp_path / "in").glob("step-*")), "what is not whole is not there"
    done = from_hugging_face(folder, tmp_path / "in")
    assert open_checkpoint(str(tmp_path / "in")).found.folder == done.folder
    with pytest.raises(CheckpointError, match="exists"):
        from_hugging_face(folder, tmp_path / "in")


def test_values_that_float16_cannot_hold_are_refused_by_name(tmp_path):
    parameters = random_parameters(LLAMA)
    parameters["blocks.1.feed_forward.down.weight"][3, 3] = 1e5
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "ckpt", LLAMA, parameters)))
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.down_proj.weight has values up to 1e\+05"):
        to_hugging_face(checkpoint, tmp_path / "hf", dtype="fp16")
    assert not (tmp_path / "hf").exists()
    assert to_hugging_face(checkpoint, tmp_path / "hf", dtype="bf16").dtype == "bf16"


@pytest.mark.parametrize("name", SHAPES)
def test_the_flags_that_an_import_prints_make_the_shape(name):
    flags = training_flags(SHAPES[name], family_of_shape(SHAPES[name]))
    words = ["--seq-length", "16", "--global-batch-size", "4", "--train-tokens", "1024", "--dry-run", "--init-method-std", "0.2"]
    made = resolve(*flags, *words).shape
    assert dataclasses.replace(made, max_positions=32) == SHAPES[name]
    assert training_flags(dataclasses.replace(LLAMA, attention_bias=True, qkv_bias=True), "llama") is None


@pytest.mark.parametrize(
    "shape",
    [
        dataclasses.replace(GPT2, position_embedding="rope"),
        dataclasses.replace(GPT2, attention_bias=False, qkv_bias=False, mlp_bias=False),
        dataclasses.replace(LLAMA, activation="gelu", qk_norm=True),
    ],
)
def test_the_flags_of_a_shape_that_no_family_has_name_the_differences(shape):
    """Megatron-LM can train such a model, which an import then brings here."""
    words = ["--seq-length", "16", "--global-batch-size", "4", "--train-tokens", "1024", "--dry-run", "--init-method-std", "0.2"]
    made = resolve(*training_flags(shape, family_of_shape(shape)), *words).shape
    assert dataclasses.replace(made, max_positions=32) == shape


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation": "gelu"}, "LlamaForCausalLM comes nearest and needs activation swiglu, not gelu"),
        ({"normalization": "LayerNorm"}, "LlamaForCausalLM comes nearest and needs normalization RMSNorm, not LayerNorm"),
        ({"attention_bias": True}, "LlamaForCausalLM comes nearest and needs attention_bias False, not True"),
        (
            {"qk_norm": True, "qkv_bias": True, "attention_bias": True, "mlp_bias": True},
            "LlamaForCausalLM comes nearest and needs qk_norm False",
        ),
    ],
)
def test_shapes_that_nobody_else_has_are_refused_before_anything_is_written(change, words, tmp_path):
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "ckpt", dataclasses.replace(LLAMA, **change))))
    with pytest.raises(ConfigError, match=words):
        to_hugging_face(checkpoint, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config.update(values)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def edit_mistral(folder, **values):
    edit_config(folder, architectures=["MistralForCausalLM"], model_type="mistral", **values)


def edit_qwen2(folder, **values):
    edit_config(folder, **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": True, **values})


def edit_weights(folder, change):
    tensors = load_file(str(folder / "model.safetensors"))
    change(tensors)
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "model.safetensors.index.json").unlink()


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])


def shrink(folder):
    """A header whose tensor is larger than its data, in a file that is long enough."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header[K]["shape"] = [24, 24]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def to_float8(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)


K = "model.layers.1.self_attn.k_proj.weight"
BROKEN = {
    "architecture": (lambda f: edit_config(f, architectures=["MambaForCausalLM"]), ["MambaForCausalLM", "LlamaForCausalLM"]),
    "no architecture": (lambda f: edit_config(f, architectures=None, model_type="t5"), ["'t5'"]),
    "missing key": (lambda f: edit_config(f, intermediate_size="absent"), ["intermediate_size"]),
    "activation": (lambda f: edit_config(f, hidden_act="relu"), ["hidden_act is 'relu'", "'silu'"]),
    "rope": (lambda f: edit_config(f, rope_scaling={"rope_type": "longrope", "factor": 4.0}), ["rope_type is 'longrope'", "'llama3'"]),
    "yarn": (lambda f: edit_config(f, rope_scaling={"rope_type": "yarn", "factor": 4.0, "truncate": False}), ["truncate is False"]),
    "yarn betas": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "yarn", "factor": 4.0, "beta_fast": 1.0, "beta_slow": 2.0}),
        ["config.json", "--rope-beta-fast 1.0, --rope-beta-slow 2.0"],
    ),
    "window of llama": (lambda f: edit_config(f, use_sliding_window=True), ["config.json: use_sliding_window is True"]),
    "window": (lambda f: edit_mistral(f, sliding_window=0), ["config.json: sliding_window is 0", "a whole number from 1"]),
    "kinds of mistral": (
        lambda f: edit_mistral(f, sliding_window=4, layer_types=["full_attention", "sliding_attention"]),
        ["config.json: layer_types is ['full_attention', 'sliding_attention']", "'sliding_attention' for each of 2 layers"],
    ),
    "kinds": (
        lambda f: edit_qwen2(f, layer_types=["chunked_attention", "full_attention"]),
        ["config.json: layer_types is ['chunked_attention'", "'full_attention' or 'sliding_attention' for each of 2 layers"],
    ),
    "kinds without a window": (
        lambda f: edit_qwen2(f, use_sliding_window=False, layer_types=["sliding_attention"] * 2),
        ["config.json: layer_types is ['sliding_attention', 'sliding_attention']"],
    ),
    "max_window_layers": (lambda f: edit_qwen2(f, max_window_layers=-1), ["config.json: max_window_layers is -1", "from 0"]),
    "layers without rotation": (
        lambda f: edit_config(f, architectures=["SmolLM3ForCausalLM"], no_rope_layers=[1]),
        ["config.json: no_rope_layers is [1]", "a list with 1 or 0 for each of 2 layers"],
    ),
    "rope key": (lambda f: edit_config(f, rope_scaling={"rope_type": "llama3", "factor": 4.0}), ["original_max_position_embeddings"]),
    "quantized": (lambda f: edit_config(f, quantization_config={"bits": 4}), ["quantized"]),
    "missing": (lambda f: edit_weights(f, lambda t: t.pop(K)), [f"tensor {K} (12, 24) is missing"]),
    "unexpected": (lambda f: edit_weights(f, lambda t: t.update({"extra.weight": torch.ones(3)})), ["unexpected tensor extra.weight (3,)"]),
    "shape": (lambda f: edit_weights(f, lambda t: t.update({K: torch.ones(24, 24)})), [K, "has shape (24, 24)", "(12, 24)"]),
    "vocabulary": (lambda f: edit_config(f, vocab_size=54), ["model.embed_tokens.weight has shape (53, 24)", "(54, 24)"]),
    "heads": (lambda f: edit_config(f, num_key_value_heads=4), ["k_proj.weight has shape (12, 24)", "(24, 24)"]),
    "truncated": (truncate, ["is truncated: tensor", "ends at byte"]),
    "bytes": (shrink, [f"tensor {K} of shape (24, 24) and dtype F32 has 1,152 bytes", "2,304"]),
    "header": (lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 999999) + b"{}"), ["ends inside of its header"]),
    "no json": (lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"xy"), ["is not a safetensors file"]),
    "dtype": (lambda f: edit_weights(f, to_float8), ["lm_head.weight has dtype F8_E4M3"]),
    "shard": (lambda f: (f / "model.safetensors").unlink(), ["names model.safetensors, which is not in the folder"]),
    "config": (lambda f: (f / "config.json").unlink(), ["config.json cannot be read"]),
}


@pytest.fixture(scope="module")
def valid_export(tmp_path_factory):
    return export(tmp_path_factory.mktemp("valid"), LLAMA)[1]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_end_with_the_tensor_or_key_before_anything_is_written(name, valid_export, tmp_path):
    break_it, words = BROKEN[name]
    shutil.copytree(valid_export, tmp_path / "hf")
    break_it(tmp_path / "hf")
    with pytest.raises(CheckpointError) as caught:
        from_hugging_face(tmp_path / "hf", tmp_path / "ckpt")
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert not (tmp_path / "ckpt").exists()


def test_names_without_prefix_buffers_and_a_second_copy_of_a_tied_head_are_understood(tmp_path):
    _, folder = export(tmp_path, GPT2)
    expected = random_parameters(GPT2)

    def older(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    edit_weights(folder, older)
    done = from_hugging_face(folder, tmp_path / "back")
    weights = open_checkpoint(str(done.folder))
    for name, value in expected.items():
        rows = 53 if name == "embedding.word.weight" else value.shape[0]
        assert torch.equal(weights.parameter(name)[:rows], value[:rows]), name
    edit = load_file(str(folder / "model.safetensors"))
    edit["lm_head.weight"][3, 3] += 1
    save_file(edit, str(folder / "model.safetensors"))
    with pytest.raises(CheckpointError, match="lm_head.weight differs from transformer.wte.weight"):
        from_hugging_face(folder, tmp_path / "other")


def test_verify_finds_a_single_wrong_weight(tmp_path):
    checkpoint, folder = export(tmp_path, QWEN3, dtype="bf16")
    opened = open_checkpoint(str(checkpoint))
    result = verify_export(opened, folder, IDS[:1], torch.bfloat16)
    assert result.difference <= 1e-5 and result.same_choice == 1.0 and result.tokens == 32
    assert not torch.equal(float32_model(opened, torch.bfloat16).head.weight, float32_model(opened, torch.float32).head.weight)
    tensors = load_file(str(folder / "model.safetensors"))
    tensors["model.layers.1.self_attn.q_norm.weight"][2] += 0.5
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="logits differ by"):
        verify_export(opened, folder, IDS[:1], torch.bfloat16)


def test_configurations_of_public_models():
    """config.json of three public models as published (the keys that a shape depends on)."""
    llama = shape_of(
        {"architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
         "max_position_embeddings": 131072, "tie_word_embeddings": True, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
         "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}}, "x")  # fmt: skip
    assert (llama.rotary_scaling, llama.rotary_factor, llama.rotary_base, llama.tie_embeddings) == ("llama3", 32.0, 500000.0, True)
    qwen = shape_of(
        {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
         "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-06, "rope_theta": 1000000,
         "rope_scaling": None, "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True, "attention_bias": False}, "x")  # fmt: skip
    assert (qwen.head_size, qwen.qk_norm, qwen.rotary_base, qwen.qkv_bias) == (128, True, 1e6, False)
    gpt2 = shape_of(
        {"architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
         "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05}, "x")  # fmt: skip
    assert (gpt2.ffn_hidden_size, gpt2.tie_embeddings, gpt2.padded_vocab_size) == (3072, True, 50304)


def test_the_two_lines_of_the_documentation_serve_an_export(tmp_path, capsys):
    """Runs the documented lines on an export whose tokenizer was a single tokenizer.json."""
    shape = dataclasses.replace(LLAMA, vocab_size=280, padded_vocab_size=384, max_positions=128)
    tokenizer = make_tokenizer(tmp_path / "tokenizer", 280)
    (tokenizer / "tokenizer_config.json").unlink()
    info = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tokenizer / "tokenizer.json")}
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "ckpt", shape, data_metadata=info)))
    to_hugging_face(checkpoint, tmp_path / "hf")
    text = (ROOT / "docs" / "operations.md").read_text()
    lines = text.split("In transformers:\n\n```\n")[1].split("```")[0]
    names = {name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "AutoTokenizer")}
    exec(lines, {"DIR": str(tmp_path / "hf"), **names})
    assert capsys.readouterr().out.startswith("Once upon") and len(lines.strip().splitlines()) == 2
