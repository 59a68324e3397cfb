"""Fuzzes every reader of untrusted bytes: whatever a file holds, a reader may raise only the program's own errors, in bounded time and memory.

    python -m tests.faults.fuzz --examples 100000 [--only idx,manifest] [--seed 1]

Files are random bytes, valid files with bytes changed, removed or inserted, or valid JSON and YAML with other values in some fields.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import resource
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from megatron_patch.checkpoint import commit as commit
from megatron_patch.checkpoint.report import describe, explain, flatten
from megatron_patch.checkpoint.safetensors_io import read_header
from megatron_patch.config.parsing import parse, read_yaml
from megatron_patch.config.resolve import resolve
from megatron_patch.config.stage_spec import parse_stages
from megatron_patch.config.values import KINDS, in_file
from megatron_patch.convert.tensor_names import parameter_shapes
from megatron_patch.convert.weight_files import open_weights
from megatron_patch.data.dataset_metadata import DatasetMetadata, read_metadata, write_metadata
from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.data.inspect import describe as describe_data
from megatron_patch.data.inspect import integrity_problems
from megatron_patch.engine.deepspeed_config import resolve_engine_config
from megatron_patch.engine.fragments import Fragment
from megatron_patch.engine.inference import shape_of_state
from megatron_patch.engine.state_files import StateFiles, state_file_name, write_fragments
from megatron_patch.errors import MegatronPatchError
from megatron_patch.model.sharding import Shard
from megatron_patch.raw_text.parse_documents import iterate_documents
from megatron_patch.raw_text.readers import Batch
from megatron_patch.stages import StagePlan
from megatron_patch.training.callbacks.metrics import read_metrics

LONGEST_SECONDS = 20
MEMORY = 2 << 30
_CONFIG = """
num_layers: 2
hidden_size: 32
num-attention-heads: 4
vocab_size: 64
seq_length: 64
micro_batch_size: 2
global_batch_tokens: 4k
train_tokens: 1M
lr: 3e-4
bf16: true
data_path: [0.5, a, 0.5, b]
stages:
  - {name: patch, patch_size: 4, token_share: 0.667, position_weights: [1, 1, 1, 1]}
  - {patch_size: 1, lr_policy: restart, lr_decay_style: cosine, optimizer: reset}
dry_run: true
"""


@dataclass(frozen=True)
class Target:
    """A reader.

    Args:
        write_valid: writes valid files into a folder.
        file: name of the file in that folder that is changed.
        read: reads from the folder.
        text: whether the file is JSON or YAML, whose values can be changed.
        cost: time of one example over the time of an example of the cheapest target, roughly.
    """

    write_valid: Callable[[Path], None]
    file: str
    read: Callable[[Path], Any]
    text: bool = False
    cost: int = 1


def _dataset(folder: Path) -> None:
    with IndexedDatasetWriter(str(folder / "d"), np.dtype(np.uint16)) as writer:
        writer.append(np.arange(40, dtype=np.uint16), np.array([7, 20, 13]))
        writer.finish()
    info = DatasetMetadata("NullTokenizer", "", 64, 63, 3, 40, "uint16", True, False, 1, 80, 0, "0" * 16, "0" * 16)
    write_metadata(str(folder / "d"), info)


def _read_dataset(folder: Path) -> None:
    dataset = IndexedDataset(str(folder / "d"))
    describe_data(dataset)
    integrity_problems(dataset, 64)
    for number in range(min(len(dataset), 100)):
        with contextlib.suppress(MegatronPatchError):
            np.asarray(dataset[number]).sum()


def _config_file() -> str:
    path = Path(tempfile.gettempdir()) / f"fuzz-config-{os.getpid()}.yaml"
    path.write_text(_CONFIG)
    return str(path)


def _checkpoint(folder: Path) -> None:
    config = _config_file()
    try:
        run = resolve(parse([f"--config={config}"]), 1)
    finally:
        os.unlink(config)
    model = {name: getattr(run.shape, name) for name in run.shape.__dataclass_fields__}
    state = commit.TrainerState(
        4, 0, 4, "patch", 400, 4, run.plan.to_json(), run.to_json(), {"seed": 1}, {"step_count": 4, "loss_scaler": {}}, model
    )
    entries = commit.write_state(folder, state)
    kinds = {"weight": torch.ones(8), "exp_avg": torch.ones(8), "exp_avg_sq": torch.ones(8)}
    found = [Fragment("a", (4, 2), None, 0, 8, kinds), Fragment("b", (2, 8), Shard(1, 0, 2), 0, 8, kinds)]
    entries |= write_fragments(folder, 0, 2, found)
    entries |= write_fragments(folder, 1, 2, [Fragment("b", (2, 8), Shard(1, 1, 2), 0, 8, kinds)])
    commit.write_manifest(folder, entries)


def _read_manifest(folder: Path) -> None:
    commit.verify(folder)
    describe(folder, full=True)
    # An attacker can compute the manifest's own checksum.
    path = folder / commit.MANIFEST
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        data = json.loads(path.read_bytes())
        data["xxh64"] = xxhash.xxh64(json.dumps(data["files"]).encode()).hexdigest()
        path.write_text(json.dumps(data))
    commit.verify(folder)
    commit.read_manifest(folder)


def _read_state(folder: Path) -> None:
    state = commit.read_state(folder)
    flatten(explain(folder))
    with contextlib.suppress(MegatronPatchError):
        parameter_shapes(shape_of_state(state, "it"))
    plan = StagePlan.from_json(state.plan)
    plan.consumed_tokens(plan.progress(min(state.step, plan.steps)))


def _read_state_files(folder: Path) -> None:
    with contextlib.suppress(MegatronPatchError):
        read_header(folder / state_file_name(0, 2))
    files = StateFiles(folder)
    for name in files.shapes:
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            files.read(kind, name)


def _read_config(folder: Path) -> None:
    values = read_yaml(str(folder / "c.yaml"))
    in_file({name: value for name, value in values.items() if name in KINDS}, "c.yaml")
    stages = values.get("stages")
    if stages is not None:
        parse_stages(stages if isinstance(stages, str) else json.dumps(stages))


def _read_run(folder: Path) -> None:
    run = resolve(parse([f"--config={folder / 'c.yaml'}"]), 1)
    if run.options.engine.deepspeed_config is None:
        resolve_engine_config(run.options.engine, run.options.schedule, run.origins, run.plan, run.data_parallel_size)


def _lines(folder: Path) -> None:
    (folder / "x.jsonl").write_text('{"text": "one", "meta": {"text": "two"}}\n\n{"text": "drei ü"}\n{"text": 5}\n')


def _read_lines(folder: Path) -> None:
    path = folder / "x.jsonl"
    counted: list[int] = []
    batch = Batch(str(path), path=str(path), end=path.stat().st_size)
    for document in iterate_documents(batch, ["text", "meta.text"], counted):
        assert document.texts is None or all(isinstance(text, str) for text in document.texts)
    assert len(counted) == 1
    for record in read_metrics(path):
        assert isinstance(record, dict)


def _weights(folder: Path) -> None:
    _checkpoint(folder)
    os.replace(folder / state_file_name(0, 2), folder / "model.safetensors")


def _read_weights(folder: Path) -> None:
    weights = open_weights(folder / "model.safetensors")
    for name in weights.infos:
        weights.read(name)


TARGETS = {
    "idx": Target(_dataset, "d.idx", _read_dataset),
    "bin": Target(_dataset, "d.bin", _read_dataset),
    "metadata": Target(_dataset, "d.json", lambda folder: read_metadata(str(folder / "d")), text=True),
    "manifest": Target(_checkpoint, commit.MANIFEST, _read_manifest, text=True),
    "trainer_state": Target(_checkpoint, commit.STATE, _read_state, text=True),
    "state_file": Target(_checkpoint, state_file_name(0, 2), _read_state_files),
    "weights": Target(_weights, "model.safetensors", _read_weights),
    "json_lines": Target(_lines, "x.jsonl", _read_lines),
    "config": Target(lambda folder: (folder / "c.yaml").write_text(_CONFIG) and None, "c.yaml", _read_config, text=True),
    "run": Target(lambda folder: (folder / "c.yaml").write_text(_CONFIG) and None, "c.yaml", _read_run, text=True, cost=50),
}

_NUMBERS = [0, 1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
_PACKED = [struct.pack("<Q", number) for number in _NUMBERS] + [struct.pack("<I", number & 0xFFFFFFFF) for number in _NUMBERS]


@st.composite
def _changed(draw: Any, valid: bytes) -> bytes:
    """A valid file with some bytes changed, removed or inserted, or truncated."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, min(16, len(data) - place)))
        kind = draw(st.sampled_from(["put", "number", "cut", "end", "flip"]))
        if kind == "end":
            del data[place:]
        elif kind == "flip" and place < len(data):
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "number":
            packed = draw(st.sampled_from(_PACKED))
            data[place : place + len(packed)] = packed
        else:
            data[place : place + length] = b"" if kind == "cut" else draw(st.binary(max_size=16))
    return bytes(data)


_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([-1, 2**31, 2**62, 2**63, 10**12, 10**40, -(10**40), 1e308, float("inf"), float("nan"), -0.0, 0.5]),
    st.text(max_size=8),
    st.sampled_from(["../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "1e999", "*", "~", "${HOME}", "$(id)", "-1", "4k", "270B"]),
)
_VALUES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6
)


def _entries(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (container, key) of every value inside."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _entries(value[key])


@st.composite
def _other_values(draw: Any, valid: Any, dump: Callable[[Any], str]) -> bytes:
    """Valid JSON in which some values are replaced or removed."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        entries = list(_entries(value))
        if not entries:
            break
        container, key = entries[draw(st.integers(0, len(entries) - 1))]
        kind = draw(st.sampled_from(["set", "set", "remove", "again", "deep"]))
        if kind == "set":
            container[key] = draw(_VALUES)
        elif kind == "remove":
            del container[key]
        elif kind == "again" and isinstance(container, dict):
            container[draw(st.text(max_size=6))] = copy.deepcopy(container[key])
        elif kind == "deep":
            container[key] = [[[[[[container[key]]]]]]]
    return dump(value).encode("utf-8", "surrogatepass")


def _dump_yaml(value: Any) -> str:
    # YAML's own writer refuses lone surrogates; JSON is YAML, too.
    with contextlib.suppress(Exception):
        return str(yaml.safe_dump(value, allow_unicode=True))
    return json.dumps(value)


_NESTED = [opening * depth for opening in (b"[", b'{"a":', b"- ", b"[{") for depth in (50, 2000, 100_000)]


def contents(target: Target, valid: bytes) -> st.SearchStrategy[bytes]:
    """Returns a strategy of contents to put in place of a valid file."""
    choices = [st.binary(max_size=200), _changed(valid), _changed(valid)]
    if target.text:
        value = yaml.safe_load(valid) if target.file.endswith("yaml") else json.loads(valid)
        dump = _dump_yaml if target.file.endswith("yaml") else json.dumps
        choices += [_other_values(value, dump)] * 3 + [st.sampled_from(_NESTED)]
    if target.file.endswith(".safetensors"):
        size = struct.unpack("<Q", valid[:8])[0]
        header = json.loads(valid[8 : 8 + size])

        def packed(text: bytes) -> bytes:
            return struct.pack("<Q", len(text)) + text + valid[8 + size :]

        choices += [_other_values(header, json.dumps).map(packed)] * 2
        index = json.loads(header["__metadata__"]["fragments"])

        def with_index(text: bytes) -> bytes:
            metadata = {**header["__metadata__"], "fragments": text.decode("utf-8", "replace")}
            return packed(json.dumps({**header, "__metadata__": metadata}).encode())

        choices += [_other_values(index, json.dumps).map(with_index)] * 3
    return st.one_of(choices)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Limits further memory, and the processor time of this process, so that a busy machine does not look like a slow reader."""

    def rang(*_: object) -> None:
        raise AssertionError(f"a reader took more than {LONGEST_SECONDS} seconds")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, rang)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def fuzz(name: str, folder: Path, examples: int, number: int = 0) -> dict[str, int]:
    """Gives files to a reader; returns how many it read and how many it refused.

    Args:
        name: name of the target.
        folder: where to write the files.
        examples: number of files.
        number: seed.

    Raises:
        BaseException: the reader raised something else; the smallest such file that was found is printed.
    """
    target = TARGETS[name]
    folder.mkdir(parents=True, exist_ok=True)
    target.write_valid(folder)
    valid = (folder / target.file).read_bytes()
    target.read(folder)
    count = {"read": 0, "refused": 0}

    @seed(number)
    @settings(
        max_examples=max(1, examples // target.cost),
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(contents(target, valid))
    def one(data: bytes) -> None:
        (folder / target.file).write_bytes(data)
        signal.setitimer(signal.ITIMER_PROF, LONGEST_SECONDS)
        try:
            target.read(folder)
            count["read"] += 1
        except MegatronPatchError:
            count["refused"] += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    with bounded():
        one()
    return count


def main() -> int:
    """Runs the command line and prints a line of JSON for each reader."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--only", default=",".join(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.only.split(","):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            count = fuzz(name, Path(folder) / name, args.examples, args.seed)
        print(json.dumps({"reader": name, **count, "seconds": round(time.monotonic() - began, 1)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
