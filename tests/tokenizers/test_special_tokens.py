"""Which token ends a document and which begins it, against transformers' reading of the same files."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest

from megatron_patch.data.dataset_metadata import read_metadata
from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.errors import DataError
from megatron_patch.preprocess.encode import EncodeSettings, load_checked_tokenizer
from megatron_patch.preprocess.pipeline import preprocess
from megatron_patch.tokenizers.base import encode, load_from_metadata, load_tokenizer, token_text
from tests.tokenizers.tokenizer_json import added, byte_level_json, write


def load(folder, **options):
    return load_tokenizer("HuggingFaceTokenizer", str(folder), **options)


def test_ordinary_vocabulary_is_never_chosen(tmp_path):
    """As in Gemma 3: </s> and <s> are HTML in the vocabulary, and <eos> and <bos> are special."""
    content = byte_level_json(added(258, "<eos>"), added(259, "<bos>"), ordinary=("</s>", "<s>"))
    tokenizer = load(write(tmp_path / "bare", content))
    assert (tokenizer.eod_id, tokenizer.bos_id) == (258, 259)
    assert [token_text(tokenizer, token) for token in (258, 259)] == ["<eos>", "<bos>"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "<p><s>old</s></p>"}) + "\n")
    settings = EncodeSettings("HuggingFaceTokenizer", str(tmp_path / "bare"), append_eod=True, prepend_bos=True)
    summary = preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "d"), settings)
    document = IndexedDataset(summary.outputs[0])[0].tolist()
    assert document[0] == 259 and document[-1] == 258 and not {256, 257, 258, 259} & set(document[1:-1])


def test_an_explicit_null_is_respected(tmp_path):
    """As in Qwen 3: the configuration says that no token begins a text, although <s> is in the vocabulary."""
    content = byte_level_json(added(257, "<|endoftext|>"), added(258, "<s>"), ordinary=("<bos>",))
    config = {"bos_token": None, "eos_token": "<|endoftext|>", "added_tokens_decoder": {}}
    folder = write(tmp_path / "t", content, tokenizer_config=config)
    tokenizer = load(folder)
    assert (tokenizer.eod_id, tokenizer.bos_id) == (257, None)
    with pytest.raises(DataError, match=r"no beginning-of-sequence token: .*tokenizer_config.json says bos_token: null") as error:
        load_checked_tokenizer(EncodeSettings("HuggingFaceTokenizer", str(folder), prepend_bos=True))
    assert "--bos-token" in str(error.value)
    given = load_checked_tokenizer(EncodeSettings("HuggingFaceTokenizer", str(folder), prepend_bos=True, bos_token="<s>"))
    assert given.bos_id == 258


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ((added(256, "<eos>"), added(257, "</s>")), "several of its special tokens may be meant: </s>, <eos>"),
        ((added(256, "<eos>", special=False),), "none of its special tokens has a usual name"),
        ((), "none of its special tokens has a usual name"),
    ],
)
def test_several_candidates_or_none_are_an_error_that_names_the_flag(tmp_path, tokens, words):
    folder = write(tmp_path / "t", byte_level_json(*tokens))
    assert load(folder).eod_id is None
    for setting in ({"append_eod": True}, {"patch_align": 4}):
        with pytest.raises(DataError, match=words) as error:
            load_checked_tokenizer(EncodeSettings("HuggingFaceTokenizer", str(folder), **setting))
        assert "--eod-token" in str(error.value)


@pytest.mark.parametrize("role", ["eos", "bos"])
@pytest.mark.parametrize("value", ["<gone>", {"__type": "AddedToken", "content": "<gone>", "lstrip": False}, {"content": "<gone>"}])
def test_a_named_token_that_the_vocabulary_lacks_is_an_error(tmp_path, role, value):
    folder = write(tmp_path / "t", byte_level_json(added(256, "</s>"), added(257, "<s>")), tokenizer_config={f"{role}_token": value})
    with pytest.raises(DataError, match=rf"names <gone> as {role}_token, but the vocabulary has no such token"):
        load(folder)
    flag = {"eos": "eod_token", "bos": "bos_token"}[role]
    tokenizer = load(folder, **{flag: "</s>"})
    assert (tokenizer.eod_id if role == "eos" else tokenizer.bos_id) == 256
    with pytest.raises(DataError, match=rf"--{flag.replace('_', '-')} <also gone> is not in the vocabulary"):
        load(folder, **{flag: "<also gone>"})


def test_the_id_that_data_was_made_with_is_kept(tmp_path):
    """Data made with --eod-token and --bos-token can be read again although the files name other tokens."""
    content = byte_level_json(added(256, "<eos>"), added(257, "</s>"), added(258, "<s>"), added(259, "<bos>"))
    folder = write(tmp_path / "t", content)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    settings = EncodeSettings("HuggingFaceTokenizer", str(folder), append_eod=True, prepend_bos=True, eod_token="</s>", bos_token="<bos>")
    summary = preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "d"), settings)
    assert IndexedDataset(summary.outputs[0])[0].tolist()[::2] == [259, 257]
    metadata = read_metadata(summary.outputs[0])
    assert metadata is not None and (metadata.eod_id, metadata.bos_id) == (257, 259)
    tokenizer = load_from_metadata(vars(metadata))
    assert (tokenizer.eod_id, tokenizer.bos_id) == (257, 259)


def test_the_summary_shows_the_tokens_texts(tmp_path):
    folder = write(tmp_path / "t", byte_level_json(added(256, "<eos>"), added(257, "<s>")))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    command = ["tools/preprocess_data.py", "--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "d")]
    command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder), "--append-eod", "--prepend-bos"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    assert "end of document 256 '<eos>', beginning 257 '<s>'" in done.stderr
    summary = json.loads(done.stdout)
    assert (summary["eod_token"], summary["bos_token"], summary["bos_id"]) == ("<eos>", "<s>", 257)


def draw_files(draw):
    """Returns the files of a random tokenizer: special tokens in any of the files that transformers reads."""
    names = draw.sample(["<a>", "</s>", "<s>", "<|im_start|>", "<|im_end|>", "<x y>", "<pad>", "<unk>"], draw.randint(3, 8))
    split = draw.randint(0, 3)
    ordinary, names = names[:split], names[split:]
    flags = [
        {name: draw.random() < 0.3 for name in ("special", "lstrip", "rstrip", "single_word", "normalized")} | {"content": name}
        for name in names
    ]
    tokens = [{"id": 256 + split + number, **token} for number, token in enumerate(flags)]
    inside = draw.randint(0, len(tokens))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    files = {"tokenizer_config": config}
    known = [token["content"] for token in tokens] + ordinary
    named = {f"{role}_token": draw.choice([*known, None]) for role in ("eos", "bos", "pad", "unk") if draw.random() < 0.6}
    if draw.random() < 0.3 and named.get("pad_token") is None:
        named["pad_token"] = "<new pad>"
    form = draw.choice(["decoder", "decoder", "map", "none"])
    if form == "decoder":
        chosen = tokens if draw.random() < 0.5 else tokens[inside:]
        config["added_tokens_decoder"] = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in chosen}
        config |= named
    elif form == "map":
        files["special_tokens_map"] = {key: value for key, value in named.items() if value is not None}
        files["added_tokens"] = {token["content"]: token["id"] for token in tokens[inside:]}
    else:
        inside = len(tokens)
        config |= named
    if draw.random() < 0.3:
        config["additional_special_tokens"] = [draw.choice(known), "<new>"]
    if draw.random() < 0.3:
        config["extra_special_tokens"] = draw.choice([["<other>"], {"image_token": "<x>"}])
    if draw.random() < 0.3:
        config["audio_token"] = draw.choice(["<x>", {"content": "<x>"}, {"__type": "AddedToken", "content": "<x>", "lstrip": True}])
    if draw.random() < 0.2:
        config["split_special_tokens"] = True
    return byte_level_json(*tokens[:inside], ordinary=ordinary), files, known


def properties(backend):
    """Returns id, content and flags of all added tokens."""
    return {number: repr(token) for number, token in backend.get_added_tokens_decoder().items()}


@pytest.mark.parametrize("seed", range(4))
def test_random_files_are_read_as_transformers_reads_them(tmp_path, seed):
    """Ids of texts, the number of ids, and the end and beginning tokens, over random files."""
    from transformers import PreTrainedTokenizerFast

    draw, compared = random.Random(seed), 0
    for number in range(40):
        content, files, known = draw_files(draw)
        folder = write(tmp_path / str(number), content, **files)
        theirs = PreTrainedTokenizerFast.from_pretrained(folder)
        ours = load(folder)
        where = f"{folder}: {files}"
        assert ours.vocab_size == len(theirs), where
        assert properties(ours.backend) == properties(theirs.backend_tokenizer), where
        for role, mine in (("eos", ours.eod_id), ("bos", ours.bos_id)):
            named = {**files["tokenizer_config"], **files.get("special_tokens_map", {})}
            if f"{role}_token" in named:
                assert mine == getattr(theirs, f"{role}_token_id"), where
                compared += mine is not None
        for _ in range(20):
            text = "".join(draw.choices([*known, " ", "a", "b ", "<", "x", "<new>", "<new pad>", "<other>", "<x>"], k=8))
            assert encode(ours, text) == theirs.encode(text, add_special_tokens=False), (where, text)
    assert compared > 20


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer_config": []}, "holds a list"),
        ({"tokenizer_config": {"eos_token": 7}}, "a special token is 7"),
        ({"tokenizer_config": {"added_tokens_decoder": {"256": "<a>"}}}, "added_tokens_decoder holds 256: '<a>'"),
        ({"tokenizer_config": {"added_tokens_decoder": {"300": {"content": "<new>"}}}}, "gives '<new>' the id 300, but .* it is 257"),
        ({"added_tokens": {"<new>": 300}}, "added_tokens.json gives '<new>' the id 300, but .* it is 257"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, r"added_tokens_decoder is \[1\]"),
        ({"tokenizer_config": {"added_tokens_decoder": {"²": {"content": "a"}}}}, "a token has the id '²'"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}}, "a token has the id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"256": {"content": "\ud800"}}}}, "a token is"),
        ({"tokenizer_config": {"eos_token": "\ud800"}}, "a token is"),
        ({"tokenizer_config": {"eos_token": ""}}, "a token is ''"),
        ({"tokenizer_config": {"extra_special_tokens": "<new>"}}, "extra_special_tokens is '<new>'"),
        ({"tokenizer_config": {"extra_special_tokens": 5}}, "extra_special_tokens is 5"),
        ({"tokenizer_config": {"additional_special_tokens": True}}, "additional_special_tokens is True"),
        ({"tokenizer_config": {"additional_special_tokens": [5]}}, "a special token is 5"),
        ({"added_tokens": {"<new>": "abc"}}, "a token has the id 'abc'"),
        ({"added_tokens": {"<new>": None}}, "a token has the id None"),
        ({"added_tokens": {"<new>": 257.7}}, "a token has the id 257.7"),
        ({"added_tokens": {"<new>": True}}, "a token has the id True"),
        ({"added_tokens": {"": 257}}, "a token is ''"),
    ],
)
def test_damaged_files_are_named(tmp_path, files, words):
    with pytest.raises(DataError, match=words):
        load(write(tmp_path / "t", byte_level_json(added(256, "</s>")), **files))


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "added_tokens"])
def test_a_file_that_leads_nowhere_is_not_taken_for_none(tmp_path, name):
    folder = write(tmp_path / "t", byte_level_json())
    (folder / f"{name}.json").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=f"{name}.json cannot be read"):
        load(folder)
    (folder / f"{name}.json").unlink()
    os.mkfifo(folder / f"{name}.json")
    with pytest.raises(DataError, match=f"{name}.json cannot be read: it is not a file"):
        load(folder)


def test_gpt2_files_declare_one_token(tmp_path):
    """In vocab.json nothing is marked as special: only <|endoftext|> ends documents, </s> is text."""
    write(tmp_path, {}, vocab=byte_level_json(ordinary=("</s>", "<s>"))["model"]["vocab"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    files = {"vocab_file": str(tmp_path / "vocab.json"), "merge_file": str(tmp_path / "merges.txt")}
    tokenizer = load_tokenizer("GPT2BPETokenizer", **files)
    assert (tokenizer.eod_id, tokenizer.bos_id) == (None, None)
    assert load_tokenizer("GPT2BPETokenizer", **files, eod_token="</s>").eod_id == 256
