"""Merged shards are what one run over everything writes, by Megatron's own builder too; broken or unlike shards are refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.config.parsing import parse
from megatron_patch.config.resolve import resolve
from megatron_patch.data.corpus import TokenCorpus
from megatron_patch.data.dataset_metadata import DatasetMetadata, read_metadata, write_metadata
from megatron_patch.data.dataset_paths import check_all_shards, expand_prefixes, shard_prefix
from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.data.inspect import integrity_problems
from megatron_patch.errors import DataError
from megatron_patch.parallel.grid import Grid
from megatron_patch.preprocess import merge
from megatron_patch.preprocess.merge import merge_datasets
from megatron_patch.training.data import open_data
from megatron_patch.utils.files import checksum

ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent.parent / "data" / "golden"


def write(prefix, documents, dtype="uint16", **said):
    with IndexedDatasetWriter(str(prefix), np.dtype(dtype)) as writer:
        for document in documents:
            writer.append(np.array(document, dtype=dtype), np.array([len(document)]))
        writer.finish()
    if said.pop("info", True):
        tokens, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        more = {"tokenizer_model": "t.json", "vocab_size": 60000, "eod_id": 0, "append_eod": True, "prepend_bos": False, "patch_align": 1}
        sizes = {"bin_bytes": tokens.stat().st_size, "idx_bytes": index.stat().st_size}
        sums = {"bin_xxh64": checksum(tokens), "idx_xxh64": checksum(index)}
        counts = {"documents": len(documents), "tokens": sum(map(len, documents)), "dtype": dtype}
        write_metadata(
            str(prefix), DatasetMetadata(**{"tokenizer_type": "HuggingFaceTokenizer", **more, **counts, **sizes, **sums, **said})
        )
    return str(prefix)


def files(prefix):
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


documents = st.lists(st.lists(st.integers(0, 59999), min_size=1, max_size=9), max_size=8)


@given(st.lists(documents, min_size=1, max_size=5), st.booleans())
def test_a_merge_is_one_run_over_everything(tmp_path_factory, shards, sides):
    folder = tmp_path_factory.mktemp("merge")
    prefixes = [write(folder / f"s{i}", shard, info=sides) for i, shard in enumerate(shards)]
    whole = write(folder / "whole", [document for shard in shards for document in shard], info=sides)
    merged = merge_datasets(prefixes, str(folder / "all"))
    assert files(merged.output) == files(whole)
    assert read_metadata(merged.output) == read_metadata(whole)
    assert merged.tokens == IndexedDataset(whole).num_tokens and merged.has_metadata == sides
    assert not integrity_problems(IndexedDataset(merged.output))
    assert sorted(path.suffix for path in folder.glob("all*")) == [".bin", ".idx", *([".json"] if sides else [])]


def test_chunks_of_the_index_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "_CHUNK", 3)
    shards = [[[number] * (number % 5 + 1) for number in range(size)] for size in (7, 0, 1, 12)]
    prefixes = [write(tmp_path / f"s{i}", shard) for i, shard in enumerate(shards)]
    merge_datasets(prefixes, str(tmp_path / "all"))
    assert files(tmp_path / "all") == files(write(tmp_path / "whole", [d for shard in shards for d in shard]))


@pytest.mark.parametrize("multimodal", [False, True])
def test_a_merge_is_megatrons_byte_for_byte(tmp_path, multimodal):
    """Documents of several sequences, and modes of sequences, which our own writer never writes."""
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset", exc_type=ImportError)
    for name, rows in {"a": [[5, 6], [7, 8, 9]], "b": [[1]], "c": [[2, 3, 4], [4], [9, 9]]}.items():
        builder = megatron.IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), np.uint16, multimodal)
        for number, row in enumerate(rows):
            builder.add_item(torch.tensor(row), number % 2)
            if number % 2 or number == len(rows) - 1:
                builder.end_document()
        builder.finalize(str(tmp_path / f"{name}.idx"))
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), np.uint16, multimodal)
    for name in "abc":
        builder.add_index(str(tmp_path / name))
    builder.finalize(str(tmp_path / "theirs.idx"))
    merged = merge_datasets([str(tmp_path / name) for name in "abc"], str(tmp_path / "ours"))
    assert files(merged.output) == files(tmp_path / "theirs")
    assert (merged.sequences, merged.documents) == (6, 4)


def damage(path, offset, data):
    raw = bytearray(Path(path).read_bytes())
    raw[offset : offset + len(data)] = data
    Path(path).write_bytes(raw)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"vocab_size": 50000}, "differ in vocab_size: 60000 and 50000"),
        ({"append_eod": False}, "differ in append_eod"),
        ({"eod_id": 7}, "differ in eod_id"),
        ({"tokenizer_type": "SentencePieceTokenizer"}, "differ in tokenizer_type"),
        ({"dtype": "int32"}, "uint16 tokens.*int32"),
        ({"bin_xxh64": "0" * 16}, "the checksum of .* differs"),
        ({"idx_xxh64": "0" * 16}, "the checksum of .* differs"),
        ({"tokens": 5}, "its metadata file lists 5 tokens"),
    ],
)
def test_shards_that_do_not_go_together_are_refused(tmp_path, said, words):
    prefixes = [write(tmp_path / "a", [[1, 2]]), write(tmp_path / "b", [[3, 4, 5, 6]], **said)]
    if "tokens" in said:
        info = read_metadata(prefixes[1])
        write_metadata(prefixes[1], DatasetMetadata(**{**info.__dict__, **said}))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=words):
        merge_datasets(prefixes, str(tmp_path / "all"))
    assert sorted(tmp_path.iterdir()) == before


def test_damaged_indices_are_found_without_side_files(tmp_path):
    one = write(tmp_path / "a", [[1, 2], [3, 4], [5]], info=False)
    damage(one + ".idx", 34 + 12 + 8, b"\x02")
    with pytest.raises(DataError, match="offsets in .* do not match"):
        merge_datasets([one], str(tmp_path / "all"))
    two = write(tmp_path / "b", [[1, 2], [3, 4], [5]], info=False)
    damage(two + ".idx", 34 + 12 + 24 + 8, b"\x03")
    with pytest.raises(DataError, match="ends before it begins"):
        merge_datasets([two], str(tmp_path / "all"))
    assert not list(tmp_path.glob("all*"))


def test_a_copy_that_goes_wrong_is_found(tmp_path, monkeypatch):
    """One wrong byte on its way to the disk."""
    prefix = write(tmp_path / "a", [[1, 2, 3]], info=False)

    def wrong(source, target, start, count):
        os.write(target, bytes(count))

    monkeypatch.setattr(merge, "copy_range", wrong)
    with pytest.raises(DataError, match="the copy is damaged"):
        merge_datasets([prefix], str(tmp_path / "all"))
    assert not list(tmp_path.glob("all*"))


def test_alignment_is_what_all_shards_keep(tmp_path):
    prefixes = [write(tmp_path / "a", [[1] * 12], patch_align=4), write(tmp_path / "b", [[2] * 6], patch_align=6)]
    merge_datasets(prefixes, str(tmp_path / "all"))
    assert read_metadata(str(tmp_path / "all")).patch_align == 2


def test_outputs_are_kept_unless_told_otherwise(tmp_path):
    prefixes = [write(tmp_path / "a", [[1, 2]]), write(tmp_path / "b", [[3]])]
    merge_datasets(prefixes, str(tmp_path / "all"))
    with pytest.raises(DataError, match="exists"):
        merge_datasets(prefixes[:1], str(tmp_path / "all"))
    with pytest.raises(DataError, match="also one of the shards"):
        merge_datasets(prefixes, prefixes[1], overwrite=True)
    merge_datasets(prefixes[:1], str(tmp_path / "all"), overwrite=True)
    assert files(tmp_path / "all") == files(prefixes[0])


def test_prefixes_globs_and_lists(tmp_path):
    shards = [write(shard_prefix(str(tmp_path / "x"), number, 3), [[number]]) for number in range(3)]
    assert expand_prefixes(str(tmp_path / "x_shard-*")) == tuple(shards)
    assert expand_prefixes(str(tmp_path / "x_shard-*.idx")) == tuple(shards)
    (tmp_path / "list.txt").write_text(f"# newest first\n{Path(shards[2]).name}\n\n{tmp_path}/x_shard-0000[01]*\n")
    assert expand_prefixes(f"@{tmp_path}/list.txt") == (shards[2], shards[0], shards[1])
    assert expand_prefixes("anything") == ("anything",)
    for word, words in (("none*", "matches no dataset"), ("@nowhere", "cannot be read"), (f"@{tmp_path}/empty", "lists no dataset")):
        (tmp_path / "empty").write_text("# nothing\n")
        with pytest.raises(DataError, match=words):
            expand_prefixes(word)
    check_all_shards(shards)
    for some, words in ((shards[:2], "shards 2 of 3 are missing"), ([shards[1], shards[0], shards[2]], "not in order")):
        with pytest.raises(DataError, match=words):
            check_all_shards(some)
    with pytest.raises(DataError, match="of one run"):
        check_all_shards([*shards, shard_prefix("y", 0, 4)])


def tool(*words, **options):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "merge_datasets.py"), *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_the_tool_merges_and_says_what(tmp_path):
    shards = [write(shard_prefix(str(tmp_path / "x"), number, 3), [[number, 7]]) for number in range(3)]
    result = tool("--input", tmp_path / "x_shard-*", "--output-prefix", tmp_path / "all")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["tokens"] == 6
    assert TokenCorpus([str(tmp_path / "all")]).read(0, 6).tolist() == TokenCorpus(shards).read(0, 6).tolist()
    Path(shards[1] + ".idx").unlink()
    result = tool("--input", tmp_path / "x_shard-*", "--output-prefix", tmp_path / "two")
    assert result.returncode == 3 and "shards 1 of 3 are missing" in result.stderr


def test_training_reads_shards_as_it_reads_them_merged(tmp_path):
    draw = np.random.default_rng(0)
    shards = [[draw.integers(0, 50000, 37).tolist() for _ in range(size)] for size in (9, 0, 30, 1)]
    prefixes = [write(tmp_path / f"s{number}", shard) for number, shard in enumerate(shards)]
    merge_datasets(prefixes, str(tmp_path / "all"))
    (tmp_path / "list").write_text("s0\ns1\ns2\ns3\n")
    whole = open_data_of(tmp_path / "all")
    for word in (tmp_path / "s?", f"@{tmp_path}/list"):
        shards = open_data_of(word)
        for step in range(4):
            ours, theirs = shards.loader(0, step).next_step(), whole.loader(0, step).next_step()
            assert len(ours) == len(theirs) > 0
            assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(ours, theirs, strict=True))


def open_data_of(word):
    flags = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 16 --seq-length 8 --micro-batch-size 2"
    flags += " --global-batch-size 4 --train-tokens 640 --split 80,20,0"
    run = resolve(parse([*flags.split(), "--data-path", str(word)]), 1)
    assert run.shape.vocab_size == 60000
    return open_data(run, run.plan, Grid(0, 1))


def test_a_corpus_has_more_shards_than_files_may_be_open_at_first(tmp_path):
    prefix = write(tmp_path / "s", [[1, 2, 3]])
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))\n"
    code += "from megatron_patch.data.corpus import TokenCorpus\nprint(TokenCorpus([sys.argv[1]] * 300).num_tokens)"
    result = subprocess.run([sys.executable, "-c", code, prefix], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "900", result.stderr


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    import signal

    prefix = write(tmp_path / "a", [list(range(2000))])
    ignoring = lambda: (limited(), signal.signal(signal.SIGXFSZ, signal.SIG_IGN))  # noqa: E731
    result = tool("--input", prefix, "--output-prefix", tmp_path / "out", preexec_fn=ignoring)
    assert result.returncode == 3 and "cannot write" in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_more_shards_than_open_files(tmp_path):
    """200 shards where 64 files may be open."""
    one = write(tmp_path / "s0", [[1, 2, 3]])
    for number in range(1, 200):
        for suffix in (".bin", ".idx", ".json"):
            shutil.copy(one + suffix, tmp_path / f"s{number}{suffix}")
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))  # noqa: E731
    result = tool("--input", tmp_path / "s*", "--output-prefix", tmp_path / "all", preexec_fn=limit)
    assert result.returncode == 0, result.stderr
    assert IndexedDataset(str(tmp_path / "all")).num_tokens == 600
