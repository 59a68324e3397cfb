#!/usr/bin/env python
"""Preprocessing speed, compared with loops that work as Megatron's tool does, on the same cores, one after another.

python benchmarks/preprocess.py prints a table and writes benchmarks/results/preprocess-*.json: wall seconds, CPU seconds of all processes,
and whether the output is the same byte for byte. Each contender is a command of its own, timed from
its start to its end. The corpus is Python source from this installation and the tokenizers are trained on it, unless others are given:

python benchmarks/preprocess.py --input web.jsonl --sentencepiece llama2.model --byte-level gpt-neox/tokenizer.json \
    --other 'megatron=python Megatron-LM/tools/preprocess_data.py --input {input} --output-prefix {output} --workers {workers} \
    --tokenizer-type {type} --tokenizer-model {model} --append-eod'

With --encoders it compares only the encoders of the tokenizers named, on each corpus of --corpora, in alternating runs, and writes
benchmarks/results/preprocess_encoders-*.json:

python benchmarks/preprocess.py --encoders SentencePieceTokenizer=mistral.model HuggingFaceTokenizer=llama3/tokenizer.json \
    --corpora novels.jsonl python.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
DOCUMENT_CHARS = 6_000


def gather(path: Path, megabytes: float) -> None:
    """Writes documents of Python source, some thousand characters each, until there are enough."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for source in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
            text = source.read_text(encoding="utf-8", errors="ignore")
            for start in range(0, len(text), DOCUMENT_CHARS):
                written += file.write(json.dumps({"text": text[start : start + DOCUMENT_CHARS]}) + "\n")
            if written > megabytes * 1e6:
                return


def train_sentencepiece(corpus: Path, model: Path) -> None:
    """A BPE of 32,000 pieces, set up as Llama-2's."""
    import sentencepiece

    texts = (json.loads(line)["text"] for number, line in enumerate(corpus.open(encoding="utf-8")) if number % 10 == 0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_prefix=str(model.with_suffix("")),
        model_type="bpe",
        vocab_size=32_000,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        input_sentence_size=150_000,
        shuffle_input_sentence=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )


def train_byte_level(corpus: Path, folder: Path) -> None:
    """A byte-level BPE of 50,000 pieces."""
    from megatron_patch.preprocess.train_tokenizer import train_tokenizer

    train_tokenizer([str(corpus)], str(folder), 50_000, max_bytes=12_000_000)


def train(kind: str, corpus: Path, model: Path) -> None:
    """A tokenizer of a kind."""
    if kind == "SentencePieceTokenizer":
        train_sentencepiece(corpus, model)
    else:
        train_byte_level(corpus, model.parent)


def timed(command: Sequence[str], cores: int | None = None) -> dict[str, float]:
    """Wall and CPU seconds of a command with all its processes, which get so many cores, or all."""
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    result = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
    )
    wall = time.perf_counter() - began
    _wait_for_orphans()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{result.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_seconds": round(wall, 2), "cpu_seconds": round(cpu, 2)}


def _adopt_orphans() -> None:
    """From now on processes whose parents have ended become this one's children, so that their CPU time is counted (Linux)."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def _wait_for_orphans() -> None:
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def contenders(args: argparse.Namespace, kind: str, model: str, eod: int, vocab: int, workers: int) -> dict[str, list[str]]:
    """Commands by name; {output} is where each writes."""
    program = [sys.executable, str(Path(__file__).resolve().parent / "_text_peers.py")]
    tail = [str(args.input), "{output}", kind, model, str(eod), str(vocab), str(workers)]
    ours = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(args.input), "--output-prefix", "{output}"]
    ours += ["--tokenizer-type", kind, "--tokenizer-model", model, "--append-eod", "--workers", str(workers)]
    library = "sentencepiece" if kind == "SentencePieceTokenizer" else "tokenizers"
    found = {
        "ours": ours,
        "ours without fastokens": [*ours, "--backend", "reference"],
        f"loop over {library}, each document": [*program, "each", *tail],
        f"loop over {library}, in batches": [*program, "batches", *tail],
    }
    for other in args.other:
        name, _, line = other.partition("=")
        values = {"input": str(args.input), "type": kind, "model": model, "workers": str(workers), "output": "{output}"}
        found[name] = [word.format(**values) for word in shlex.split(line)]
    return found


def measure(args: argparse.Namespace, kind: str, model: str, folder: Path) -> list[dict[str, Any]]:
    """One row for each contender and number of workers."""
    from megatron_patch.tokenizers.base import load_tokenizer

    tokenizer = load_tokenizer(kind, model)
    assert tokenizer.eod_id is not None
    megabytes = args.input.stat().st_size / 1e6
    rows = []
    for workers in args.workers:
        expected = None
        for number, (name, command) in enumerate(contenders(args, kind, model, tokenizer.eod_id, tokenizer.vocab_size, workers).items()):
            output = folder / f"{kind}-{workers}-{number}"
            times = timed([word.replace("{output}", str(output)) for word in command])
            files = [Path(f"{output}_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx")]
            expected = expected or files
            tokens = len(files[0]) // (2 if tokenizer.vocab_size < 65500 else 4)
            rows.append(
                {
                    "tokenizer": kind,
                    "vocabulary": tokenizer.vocab_size,
                    "contender": name,
                    "workers": workers,
                    **times,
                    "megabytes": round(megabytes, 1),
                    "tokens": tokens,
                    "megabytes_per_second": round(megabytes / times["wall_seconds"], 2),
                    "megabytes_per_cpu_second": round(megabytes / times["cpu_seconds"], 2),
                    "tokens_per_second": round(tokens / times["wall_seconds"]),
                    "identical": files == expected,
                }
            )
            for path in folder.glob(f"{output.name}_*"):
                path.unlink()
    return rows


def shares(corpus: Path, kind: str, model: str, folder: Path) -> dict[str, float]:
    """CPU seconds of each part of the work, in one process, batch by batch."""
    from megatron_patch.data.indexed_dataset import optimal_dtype
    from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
    from megatron_patch.preprocess.encode import Encoder, EncodeSettings, load_checked_tokenizer
    from megatron_patch.raw_text.inputs import FileRange
    from megatron_patch.raw_text.parse_documents import iterate_documents
    from megatron_patch.raw_text.readers import read_batches

    settings = EncodeSettings(kind, model, append_eod=True)
    tokenizer = load_checked_tokenizer(settings)
    encoder = Encoder(dataclasses.replace(settings, dtype=str(optimal_dtype(tokenizer.vocab_size))), tokenizer)
    seconds = dict.fromkeys(("read and parse", "encode", "frame", "write"), 0.0)

    @contextlib.contextmanager
    def counted(name: str) -> Iterator[None]:
        began = time.process_time()
        yield
        seconds[name] += time.process_time() - began

    with IndexedDatasetWriter(str(folder / "shares"), np.dtype(encoder.settings.dtype)) as writer:
        for batch in read_batches([FileRange(str(corpus))]):
            with counted("read and parse"):
                texts = [str(document.texts[0]) for document in iterate_documents(batch, ("text",), []) if document.texts]
            with counted("encode"):
                ids, lengths = encoder.fast_encoder.encode_flat(texts) if encoder.fast_encoder else tokenizer.encode_flat(texts)
            with counted("frame"):
                part = encoder.add_special_tokens(ids, lengths)
            with counted("write"):
                writer.append(part.tokens, part.lengths)
    return {name: round(value, 3) for name, value in seconds.items()}


def scaling(args: argparse.Namespace, kind: str, model: str, folder: Path) -> dict[str, float]:
    """What a second core gives on a large input: to one worker, which then reads and writes while it encodes; to a second worker; and to
    two runs over a half each, both at once.
    """
    whole, half = folder / "large.jsonl", folder / "half.jsonl"
    data = args.input.read_bytes()
    count = max(1, round(args.large_megabytes * 1e6 / len(data) / 2))
    for path, times in ((half, count), (whole, 2 * count)):
        with path.open("wb") as file:
            for _ in range(times):
                file.write(data)
    ours = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--tokenizer-type", kind, "--tokenizer-model", model]
    ours += ["--append-eod", "--input"]
    one = [*ours, str(whole), "--output-prefix", str(folder / "large")]
    halves = ["sh", "-c", 'first=$1; shift; "$@" --output-prefix "$first-a" & "$@" --output-prefix "$first-b" && wait', "-"]
    contenders = {
        "one worker on one core": (one, 1),
        "one worker on two cores": (one, 2),
        "two workers on two cores": ([*one, "--workers", "2"], 2),
        "two halves on two cores": ([*halves, str(folder / "half"), *ours, str(half)], 2),
    }
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(args.repeat):
        for name, (command, cores) in contenders.items():
            seconds[name].append(timed(command, cores))
            for path in (*folder.glob("large_*"), *folder.glob("half-*")):
                path.unlink()
    encoding = shares(whole, kind, model, folder)["encode"]
    for path in (whole, half):
        path.unlink()
    best = {name: min(runs, key=lambda run: run["wall_seconds"]) for name, runs in seconds.items()}
    wall = {name: times["wall_seconds"] for name, times in best.items()}
    alone = wall["one worker on one core"]
    return {
        "megabytes": round(2 * count * len(data) / 1e6),
        "encoding alone, cpu_seconds": encoding,
        **{f"{name}, {unit}": times[unit] for name, times in best.items() for unit in times},
        "a second worker on a second core gives": round(alone / wall["two workers on two cores"], 2),
        "the machine gives": round(alone / wall["two halves on two cores"], 2),
        "a second core gives one worker": round(alone / wall["one worker on two cores"], 2),
    }


def added_to_encoding(large: dict[str, float], small: dict[str, Any]) -> float:
    """Returns the time that reading and writing add to encoding, as a share, for each further megabyte; start-up is left out.

    Args:
        large: the result of `scaling`.
        small: the row of `measure` with one worker.
    """
    wall = large["one worker on two cores, wall_seconds"] - small["wall_seconds"]
    return wall / (large["megabytes"] - small["megabytes"]) * large["megabytes"] / large["encoding alone, cpu_seconds"] - 1


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A table; the last columns say how many times as long as ours."""
    table = Table(title="Text to a dataset, end to end", title_justify="left")
    for column in (
        "tokenizer",
        "contender",
        "workers",
        "wall s",
        "CPU s",
        "MB/s",
        "MB per CPU s",
        "M tokens/s",
        "wall x",
        "CPU x",
        "identical",
    ):
        table.add_column(column, justify="left" if column in ("tokenizer", "contender") else "right")
    for row in rows:
        ours = next(o for o in rows if (o["tokenizer"], o["workers"], o["contender"]) == (row["tokenizer"], row["workers"], "ours"))
        table.add_row(
            row["tokenizer"],
            row["contender"],
            str(row["workers"]),
            f"{row['wall_seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['megabytes_per_second']:.1f}",
            f"{row['megabytes_per_cpu_second']:.1f}",
            f"{row['tokens_per_second'] / 1e6:.2f}",
            f"{row['wall_seconds'] / ours['wall_seconds']:.1f}",
            f"{row['cpu_seconds'] / ours['cpu_seconds']:.1f}",
            "yes" if row["identical"] else "NO",
        )
    Console(width=150, markup=False).print(table)


def compare_encoders(tokenizers: Sequence[str], corpora: Sequence[Path], repeat: int) -> None:
    """Measures the encoders of some tokenizers, given as TYPE=MODEL, on some corpora; prints a table and writes a result file."""
    import torch

    from benchmarks._encoders import TABLE_COLUMNS, compare, table
    from benchmarks._measure import print_table, write_results

    rows: list[dict[str, Any]] = []
    for word in tokenizers:
        kind, _, model = word.partition("=")
        for corpus in corpora:
            rows += compare(kind, model, corpus, repeat)
            print_table("Encoders, CPU seconds of one process", TABLE_COLUMNS, table(rows))
    write_results("preprocess_encoders", torch.device("cpu"), {"rows": rows})


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="a .jsonl with text; by default Python source")
    parser.add_argument("--megabytes", type=float, default=50, help="of Python source")
    parser.add_argument("--sentencepiece", help="a SentencePiece model; by default one is trained")
    parser.add_argument("--byte-level", help="a tokenizer.json; by default one is trained")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--other", action="append", default=[], help="NAME=COMMAND with {input} {output} {type} {model} {workers}")
    parser.add_argument("--only", choices=("sentencepiece", "byte-level"), help="one kind of tokenizer")
    parser.add_argument(
        "--large-megabytes", type=float, default=2000, help="of the corpus, repeated, for the speed of a second worker; 0: none"
    )
    parser.add_argument("--repeat", type=int, default=3, help="runs for that, of which the fastest counts")
    parser.add_argument("--folder", type=Path, help="for corpus, tokenizers and outputs; what is there is used again")
    parser.add_argument("--encoders", nargs="+", metavar="TYPE=MODEL", help="compare only the encoders of these tokenizers")
    parser.add_argument("--corpora", type=Path, nargs="+", default=[], help=".jsonl files for --encoders")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.encoders:
        compare_encoders(args.encoders, args.corpora, args.repeat)
        return
    _adopt_orphans()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if args.input is None:
            args.input = folder / f"source-{args.megabytes:g}.jsonl"
            if not args.input.exists():
                gather(args.input, args.megabytes)
        rows: list[dict[str, Any]] = []
        parts: dict[str, dict[str, float]] = {}
        second: dict[str, dict[str, float]] = {}
        models = {
            "SentencePieceTokenizer": Path(args.sentencepiece or folder / "sentencepiece.model"),
            "HuggingFaceTokenizer": Path(args.byte_level or folder / "byte_level" / "tokenizer.json"),
        }
        if args.only:
            del models["HuggingFaceTokenizer" if args.only == "sentencepiece" else "SentencePieceTokenizer"]
        for kind, model in models.items():
            if not model.exists():
                train(kind, args.input, model)
            rows += measure(args, kind, str(model), folder)
            parts[kind] = shares(args.input, kind, str(model), folder)
            if args.large_megabytes:
                second[kind] = scaling(args, kind, str(model), folder)
    show(rows)
    for kind, seconds in parts.items():
        other = sum(seconds.values()) - seconds["encode"]
        print(f"{kind}, CPU seconds: {seconds}; all but encoding is {other / seconds['encode']:.0%} of it")
    for kind, found in second.items():
        for row in rows:
            if (row["tokenizer"], row["contender"], row["workers"]) == (kind, "ours", 1):
                found["added to the wall time of encoding"] = round(added_to_encoding(found, row), 2)
        print(f"{kind}, {found['megabytes']} MB: {found}")
    today = date.today().isoformat()
    output = Path(__file__).parent / "results" / f"preprocess-{today}{f'-{args.only}' if args.only else ''}.json"
    output.parent.mkdir(exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    load = round(os.getloadavg()[0], 2)
    result = {
        "date": today,
        "command": shlex.join(
            ["python", "benchmarks/preprocess.py", *(Path(word).name if word.startswith("/") else word for word in sys.argv[1:])]
        ),
        "machine": machine,
        "load_average": load,
        "rows": rows,
        "cpu_seconds_of_parts": parts,
        "second_worker": second,
    }
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output}")


if __name__ == "__main__":
    main()
