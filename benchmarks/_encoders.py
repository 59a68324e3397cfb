"""Compares the encoders of one tokenizer: CPU seconds for the same documents, each encoder in a process of its own, in alternating runs.

As a program (`python benchmarks/_encoders.py ENCODER TYPE MODEL CORPUS`) it encodes one corpus with one encoder and prints a line of JSON.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

ROOT = Path(__file__).parent.parent
BATCH_CHARS = 1_000_000


def _fastokens(tokenizer: Any) -> Any:
    from megatron_patch.preprocess.fast_encoder import FastokensEncoder

    return FastokensEncoder(tokenizer)


def _words(tokenizer: Any) -> Any:
    from megatron_patch.preprocess.word_cache import WordCache, supports

    return WordCache(tokenizer) if supports(tokenizer) else None


ENCODERS: dict[str, Callable[[Any], Any]] = {"fastokens": _fastokens, "words": _words, "plain": lambda tokenizer: tokenizer}


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _batches(corpus: str) -> Iterator[list[str]]:
    batch, size = [], 0
    with open(corpus, encoding="utf-8") as lines:
        for line in lines:
            batch.append(json.loads(line)["text"])
            size += len(batch[-1])
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def encode_corpus(encoder: str, kind: str, model: str, corpus: str) -> dict[str, Any]:
    """Encodes a corpus in this process.

    Returns:
        CPU seconds to load the tokenizer, to make and check the encoder, and to encode; tokens; and a checksum of all ids. Only the name
        of the encoder where it cannot serve this tokenizer.
    """
    from megatron_patch.tokenizers.base import load_tokenizer

    batches = list(_batches(corpus))
    start = _cpu_seconds()
    tokenizer = load_tokenizer(kind, model)
    loaded = _cpu_seconds()
    made = ENCODERS[encoder](tokenizer)
    if made is None:
        return {"encoder": encoder}
    ready, digest, tokens, seconds = _cpu_seconds(), xxhash.xxh64(), 0, 0.0
    for batch in batches:
        began = _cpu_seconds()
        ids, _ = made.encode_flat(batch)
        seconds += _cpu_seconds() - began
        digest.update(ids.tobytes())
        tokens += ids.size
    times = {"load": loaded - start, "make": ready - loaded, "encode": seconds}
    return {"encoder": encoder, **{name: round(value, 3) for name, value in times.items()}, "tokens": tokens, "xxh64": digest.hexdigest()}


def compare(kind: str, model: str, corpus: Path, repeat: int) -> list[dict[str, Any]]:
    """Rows with the median CPU seconds of each encoder, and how many times the CPU time of fastokens it takes; one row an encoder."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ENCODERS}
    for _ in range(repeat):
        for name, found in runs.items():
            command = [sys.executable, __file__, name, kind, model, str(corpus)]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    megabytes = corpus.stat().st_size / 1e6
    rows: list[dict[str, Any]] = []
    for name, found in runs.items():
        row: dict[str, Any] = {"tokenizer": "/".join(Path(model).parts[-2:]), "corpus": corpus.name, "encoder": name, "runs": len(found)}
        if "encode" in found[0]:
            row |= {part: round(statistics.median(run[part] for run in found), 2) for part in ("load", "make", "encode")}
            row["megabytes_per_cpu_second"] = round(megabytes / row["encode"], 1)
            pairs = zip(found, runs["fastokens"], strict=True)
            row["times_fastokens"] = [round(run["encode"] / base["encode"], 2) for run, base in pairs if "encode" in base]
            row["tokens"], row["identical"] = found[0]["tokens"], {run["xxh64"] for run in found} == {runs["plain"][0]["xxh64"]}
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The rows as text, for a terminal."""
    return [
        [
            *(str(row.get(name, "-")) for name in ("tokenizer", "corpus", "encoder", "make", "encode", "megabytes_per_cpu_second")),
            f"{statistics.median(row['times_fastokens']):.1f}" if row.get("times_fastokens") else "-",
            {True: "yes", False: "NO"}.get(row.get("identical"), "cannot serve"),
        ]
        for row in rows
    ]


TABLE_COLUMNS = ("tokenizer", "corpus", "encoder", "make s", "encode s", "MB per CPU s", "x fastokens", "identical")


if __name__ == "__main__":
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path.insert(0, str(ROOT))
    print(json.dumps(encode_corpus(*sys.argv[1:])))
