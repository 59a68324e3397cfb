#!/usr/bin/env python
"""Records the results of benchmarks/on_gpu.py and writes them into the documents.

    python benchmarks/render_gpu.py runs/on_gpu-first.tar.gz
        unpacks the archive into benchmarks/results/gpu-…, then writes the documents
    python benchmarks/render_gpu.py
        writes the documents again from the recorded results
    python benchmarks/render_gpu.py --check
        exits with code 1 if the documents differ from the records

Figures, results and plots of a call become a folder in benchmarks/results, named
by device, date, time and call. The tables in docs/performance.md and the
sentence in README.md, each between two markers, contain all calls on the device
of the newest call; of two measurements of the same thing the later one counts.
Calls without a GPU or with tiny shapes are not recorded.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import re
import shutil
import statistics
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from _schedule import read_figures

from megatron_patch.utils.markdown import replace_between

Figure = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- gpu results: written by benchmarks/render_gpu.py -->", "<!-- end of gpu results -->"
_CALL = re.compile(r"gpu-(.+)-(\d{4}-\d\d-\d\d-\d{6})-\w+$")
KEPT = (".png",)
"""Suffixes of further files that are kept in the repository; traces and logs are not kept."""
KEYS = {
    "ceiling": ("name", "when"),
    "harness": ("variant", "operator", "rows", "vocab", "patch_size", "dtype"),
    "kernel": ("operator", "rows", "vocab", "hidden", "patch_size", "dtype", "peer"),
    "training": ("variant", "stage", "micro_batch_size"),
    "attention": ("backend", "dtype"),
    "documents": ("seq_length", "mix", "peer"),
    "experts": ("experts", "chosen", "form"),
    "profile": ("variant", "stage"),
    "run": ("step", "name", "seed"),
    "machine": ("date",),
}
"""Fields that identify a figure among others of its kind."""


def record_call(archive: Path, results: Path = RESULTS) -> Path:
    """Unpacks the archive of a call into a new folder of the results, and returns that folder.

    Raises:
        SystemExit: the archive is damaged, or its call did not measure a GPU.
    """
    needed = "needed: an archive written by benchmarks/on_gpu.py"
    with tempfile.TemporaryDirectory() as name:
        try:
            # Decompresses everything first, which verifies the checksum: a damaged archive may still unpack.
            with tarfile.open(fileobj=io.BytesIO(gzip.decompress(archive.read_bytes()))) as packed:
                packed.extractall(name, filter="data")
        except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
            raise SystemExit(f"{archive}: {error}; {needed}") from None
        call_files = sorted(Path(name).glob("*/call.json"))
        if not call_files or not call_files[0].with_name("steps.json").is_file():
            raise SystemExit(f"{archive} contains no call.json and steps.json; {needed}")
        source = call_files[0].parent
        call = json.loads(call_files[0].read_text(encoding="utf-8"))
        if call["tiny"]:
            raise SystemExit(f"{archive} is from a call with tiny shapes, which is not a measurement; {needed} without --tiny")
        gpus = [figure["gpu"] for figure in read_figures(source / "figures.jsonl") if figure["kind"] == "machine" and figure.get("gpu")]
        if not gpus:
            raise SystemExit(f"{archive} does not record on which GPU it was made: its step `device` did not pass; repeat the call")
        device = re.sub(r"[^a-z0-9]+", "-", gpus[-1].lower()).strip("-")
        began = datetime.fromisoformat(call["began"])
        target = results / f"gpu-{device}-{began:%Y-%m-%d-%H%M%S}-{call['name'].partition('-')[0]}"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for file in ("call.json", "steps.json", "figures.jsonl"):
            shutil.copyfile(source / file, target / file)
        for path in sorted((source / "files").rglob("*")):
            if path.suffix in KEPT:
                shutil.copyfile(path, target / path.name)
    return target


def newest_calls(results: Path = RESULTS) -> list[Path]:
    """Returns all recorded calls on the device of the newest one, oldest first."""
    calls = [(match[2], match[1], path) for path in results.glob("gpu-*") if (match := _CALL.match(path.name))]
    device = max(calls, default=("", "", Path()))[1]
    return [path for _, its_device, path in sorted(calls) if its_device == device]


def latest(figures: Iterable[Figure]) -> dict[str, list[Figure]]:
    """Returns figures by kind; of several with the same key, the last one recorded."""
    by_kind: dict[str, dict[tuple[Any, ...], Figure]] = {}
    for figure in figures:
        kind = figure["kind"]
        names = KEYS.get(kind)
        of_kind = by_kind.setdefault(kind, {})
        key = (len(of_kind),) if names is None else tuple(str(figure.get(name)) for name in names)
        of_kind[key] = figure
    return {kind: list(of_kind.values()) for kind, of_kind in by_kind.items()}


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def number(value: Any, form: str = ".3g") -> str:
    """Returns a formatted number, or a dash for None."""
    return "-" if value is None else format(value, form)


def percent(value: Any) -> str:
    """Returns a share in percent, or a dash for None."""
    return "-" if value is None else f"{value:.0%}"


def ratio(value: Any, other: Any) -> float | None:
    """Returns the first value over the second, or None if one is missing."""
    return value / other if value and other else None


def machine_line(figures: dict[str, list[Figure]]) -> str:
    """Returns machine, software and dates in one sentence."""
    facts = figures["machine"][-1]
    parts = [f"one {facts['gpu']}", *([f"driver {facts['driver']}"] if facts.get("driver") else [])]
    parts += [f"torch {facts['torch']}", f"Python {facts['python']}", *(f"{k} {v}" for k, v in facts.get("libraries", {}).items())]
    return f"{', '.join(parts)}; {dates_of(figures)}."


def dates_of(figures: dict[str, list[Figure]]) -> str:
    """Returns the date of the calls, or the first and the last one."""
    dates = sorted(figure["date"] for figure in figures["machine"])
    return dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"


def outcome_text(steps: Sequence[dict[str, Any]]) -> str:
    """Returns the table of the steps of all calls."""
    rows = [(entry["call"], f"`{entry['name']}`", entry["status"], f"{entry['seconds']:.0f}") for entry in steps]
    return markdown_table(["call", "step", "result", "s"], rows)


def ceiling_text(figures: Sequence[Figure]) -> str:
    """Returns the table of the machine's ceilings."""
    rows = [(figure["name"], number(figure["value"], ",.0f"), str(figure.get("when") or figure.get("step") or "")) for figure in figures]
    return markdown_table(["ceiling", "measured", "when"], rows)


def kernel_text(figures: Sequence[Figure]) -> str:
    """Returns one table per operator: milliseconds of each peer, and their ratio to ours at the same size."""
    parts = []
    for operator in dict.fromkeys(figure["operator"] for figure in figures):
        mine = [figure for figure in figures if figure["operator"] == operator]
        mine.sort(key=lambda figure: (figure["dtype"], figure["vocab"], figure.get("hidden") or 0, figure["patch_size"]))
        rows = []
        for figure in mine:
            same = ("rows", "vocab", "hidden", "patch_size", "dtype")
            ours = [other for other in mine if other["peer"].startswith("ours") and all(other.get(k) == figure.get(k) for k in same)]
            best = min((other["forward_backward_ms"] for other in ours if other["forward_backward_ms"]), default=None)
            hidden = f"{figure['hidden']:,}" if figure.get("hidden") else "-"
            rate = figure.get("gb_per_second") or figure.get("tflop_per_second")
            rows.append(
                (
                    f"{figure['vocab']:,}",
                    hidden,
                    str(figure["patch_size"]),
                    str(figure["dtype"]).removeprefix("torch."),
                    figure["peer"],
                    number(figure["forward_backward_ms"], ".3f"),
                    number(ratio(figure["forward_backward_ms"], best), ".2f"),
                    number(rate, ",.0f"),
                    percent(figure.get("share_of_ceiling")),
                    number(figure.get("peak_mb"), ",.0f"),
                    number(figure.get("error"), ".1e"),
                )
            )
        unit = "TFLOP/s" if any("tflop_per_second" in figure for figure in mine) else "GB/s"
        columns = ["V", "H", "K", "dtype", "peer", "forward + backward, ms", "time / ours", unit, "share of ceiling", "peak MB", "error"]
        parts.append(f"`{operator}`, N = {mine[0]['rows']:,}:\n\n{markdown_table(columns, rows)}")
    return "\n".join(parts)


def harness_text(figures: Sequence[Figure]) -> str:
    """Returns the table of the kernel variants, which run without torch."""
    rows = [
        (
            figure["variant"],
            figure["operator"],
            f"{figure['vocab']:,}",
            str(figure["patch_size"]),
            figure["dtype"],
            number(figure["ms"], ".3f"),
            number(figure["gb_per_second"], ",.0f"),
        )
        for figure in sorted(figures, key=lambda figure: (figure["operator"], figure["vocab"], figure["patch_size"], figure["ms"]))
    ]
    return markdown_table(["variant", "operator", "V", "K", "dtype", "ms", "GB/s"], rows)


def within_text(ratios: Sequence[float | None], what: str, allowed: float) -> str:
    """Returns how many ratios of planned to measured values are within the allowed distance of 1."""
    known = [value for value in ratios if value is not None]
    near = sum(1 - allowed <= value <= 1 + allowed for value in known)
    return f"{near} of {len(known)} {what} within {allowed:.0%}"


def training_text(figures: Sequence[Figure]) -> str:
    """Returns the table of training steps, measured and planned."""
    rows = [
        (
            figure["variant"],
            figure["stage"],
            str(figure["patch_size"]),
            str(figure["micro_batch_size"]),
            number(figure["tokens_per_second"], ",.0f"),
            number(figure["positions_per_second"], ",.0f"),
            number(figure["tflops"], ".0f"),
            f"{figure['mfu']:.1%}" if figure.get("mfu") else "-",
            number(figure["step_seconds"], ".3f"),
            number(ratio(figure.get("planned_seconds"), figure["step_seconds"]), ".2f"),
            number(figure["memory_gib"], ".1f"),
            number(ratio(figure.get("planned_memory_gib"), figure["memory_gib"]), ".2f"),
        )
        for figure in figures
    ]
    columns = ["variant", "stage", "K", "micro-batch", "tokens/s", "positions/s", "TFLOP/s", "MFU", "step, s", "planned / step"]
    first = figures[0]
    times = [ratio(figure.get("planned_seconds"), figure["step_seconds"]) for figure in figures]
    peaks = [ratio(figure.get("planned_memory_gib"), figure["memory_gib"]) for figure in figures]
    within = f"{within_text(times, 'step times', 0.3)}; {within_text(peaks, 'peaks of memory', 0.1)}."
    size = number(first.get("parameters"), ",.0f")
    head = f"{size} parameters, T = {first['seq_length']:,}, {first['micro_batches']} micro-batches per step:\n\n"
    return f"{head}{markdown_table([*columns, 'peak GiB', 'planned / peak'], rows)}\nCompared with the plan: {within}\n"


def profile_text(figures: Sequence[Figure]) -> str:
    """Returns tables of the kernels that take the most time."""
    parts = []
    for figure in figures:
        rows = [
            (f"`{row['name'][:90]}`", number(row["cuda_ms"], ".1f"), percent(row["share"]), str(row["calls"]))
            for row in figure["rows"][:10]
        ]
        busy = f", the GPU busy {figure['busy_share']:.0%} of the time" if figure.get("busy_share") else ""
        parts.append(
            f"{figure['variant']}, {figure['stage']} stage, two steps{busy}:\n\n{markdown_table(['kernel', 'ms', 'share', 'calls'], rows)}"
        )
    return "\n".join(parts)


def attention_text(figures: Sequence[Figure]) -> str:
    """Returns the table of attention backends."""
    rows = [
        (
            figure["backend"],
            number(figure["forward_backward_ms"], ".3f"),
            number(figure["tflop_per_second"], ".0f"),
            "yes" if figure.get("chosen") else "",
        )
        for figure in figures
    ]
    return markdown_table(["backend", "forward + backward, ms", "TFLOP/s", "chosen by torch"], rows)


def documents_text(figures: Sequence[Figure]) -> str:
    """Returns the table of attention inside documents and its peers."""
    rows = [
        (
            number(figure["seq_length"], ",d"),
            figure["mix"],
            number(figure["documents"], ",d"),
            number(figure["longest"], ",d"),
            figure["peer"],
            number(figure["forward_backward_ms"], ".3f"),
            number(figure["speed_of_plain"], ".2f"),
            number(figure["peak_mb"], ".1f"),
            number(figure["error"], ".1e"),
        )
        for figure in figures
    ]
    columns = ["T", "lengths", "documents", "longest", "peer", "forward + backward, ms", "speed / plain causal", "peak MB", "error"]
    return markdown_table(columns, rows)


def experts_text(figures: Sequence[Figure]) -> str:
    """Returns the table of the forms in which a block's experts are computed."""
    rows = [
        (
            f"{figure['chosen']} of {figure['experts']}",
            figure["form"],
            number(figure["forward_backward_ms"], ".3f"),
            number(figure["time_of_ordinary"], ".2f"),
            number(figure["error"], ".1e"),
        )
        for figure in figures
    ]
    return markdown_table(["experts", "form", "forward + backward, ms", "time / ordinary layer", "error"], rows)


def run_text(figures: Sequence[Figure]) -> str:
    """Returns tables of runs on text; runs that differ only in their seed are one row with mean and spread of their losses."""
    parts = []
    for step in dict.fromkeys(figure.get("step") for figure in figures):
        mine = [figure for figure in figures if figure.get("step") == step]
        rows = []
        for name in dict.fromkeys(figure["name"] for figure in mine):
            seeds = [figure for figure in mine if figure["name"] == name]
            losses = [figure["held_out_loss"] for figure in seeds if figure["held_out_loss"] is not None]
            loss = f"{statistics.mean(losses):.3f}" if losses else "-"
            rows.append(
                (
                    name,
                    " → ".join(str(size) for size in seeds[0]["patch_sizes"]),
                    str(len(seeds)),
                    number(seeds[0]["tokens"] / 1e6, ".1f"),
                    number(seeds[0]["cost"] / 1e6, ".1f"),
                    number(seeds[0].get("steps"), ",d"),
                    f"{loss} ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else loss,
                    number(statistics.mean(figure["seconds"] for figure in seeds), ".0f"),
                    ", ".join(dict.fromkeys(str(figure.get("ended", "")) for figure in seeds)),
                )
            )
        data = mine[0].get("data") or {}
        text = f" on {data['tokens'] / 1e6:.1f}M tokens of {', '.join(data['text'])}" if data else ""
        columns = ["run", "K", "seeds", "tokens, M", "cost, M tokens at token level", "steps", "held-out loss at K = 1", "s", "ended"]
        parts.append(f"{number(mine[0].get('parameters'), ',.0f')} parameters{text}:\n\n{markdown_table(columns, rows)}")
    return "\n".join(parts)


SECTIONS: tuple[tuple[str, str, Callable[[Sequence[Figure]], str]], ...] = (
    ("ceiling", "Ceilings of the machine", ceiling_text),
    ("kernel", "Operators and their peers", kernel_text),
    ("harness", "Variants of the loss kernel, without torch", harness_text),
    ("training", "Training steps", training_text),
    ("profile", "Time of a step by kernel", profile_text),
    ("attention", "Attention by backend", attention_text),
    ("documents", "Attention inside documents", documents_text),
    ("experts", "Experts of a block, next to an ordinary layer of as many active parameters", experts_text),
    ("run", "Real text, at equal cost", run_text),
)


def load(calls: Sequence[Path]) -> tuple[dict[str, list[Figure]], list[dict[str, Any]]]:
    """Returns the figures by kind and the results of all steps of some calls."""
    figures = latest(figure for call in calls for figure in read_figures(call / "figures.jsonl"))
    steps = [
        {**entry, "call": " ".join(call.name.split("-")[-2:][::-1])}
        for call in calls
        for entry in json.loads((call / "steps.json").read_text(encoding="utf-8"))
    ]
    return figures, steps


def results_text(calls: Sequence[Path]) -> str:
    """Returns all tables, for docs/performance.md."""
    if not calls:
        return "No results from a GPU are recorded yet.\n"
    figures, steps = load(calls)
    records = ", ".join(f"`{call.relative_to(ROOT)}`" for call in calls if call.is_relative_to(ROOT))
    parts = [f"Measured on {machine_line(figures)} Records: {records}.\n"]
    parts += [f"#### {title}\n\n{text(figures[kind])}" for kind, title, text in SECTIONS if figures.get(kind)]
    for call in calls:
        parts += [f"![{path.stem}](../{path.relative_to(ROOT)})\n" for path in sorted(call.glob("*.png")) if path.is_relative_to(ROOT)]
    return "\n".join([*parts, f"#### Steps of the calls\n\n{outcome_text(steps)}"])


def readme_text(calls: Sequence[Path]) -> str:
    """Returns one sentence for the README."""
    if not calls:
        return "No results from a GPU are recorded yet; one command measures them ([performance](docs/performance.md#on-a-gpu)).\n"
    figures, _ = load(calls)
    sentences = []
    for figure in figures.get("kernel", []):
        ours = figure["operator"] == "multi_token_loss" and figure["peer"].startswith("ours, loss and gradient")
        if ours and figure["patch_size"] == 4 and figure["vocab"] > 100_000:
            same = ("operator", "rows", "vocab", "patch_size", "dtype")
            papers = [
                other for other in figures["kernel"] if other["peer"].startswith("papers") and all(other[k] == figure[k] for k in same)
            ]
            against = f", the papers' code {papers[-1]['forward_backward_ms']:.1f}" if papers else ""
            shape = f"N = {figure['rows']:,}, V = {figure['vocab']:,}"
            sentences.append(f"loss and gradient of four labels take {figure['forward_backward_ms']:.2f} ms{against} ({shape})")
    steps = [figure for figure in figures.get("training", []) if figure.get("mfu")]
    if steps:
        best = max(steps, key=lambda figure: figure["mfu"])
        size = f"{best['parameters'] / 1e9:.1f}B"
        sentences.append(f"a model of {size} parameters trains at {best['mfu']:.0%} MFU ({best['variant']}, {best['stage']} stage)")
    text = f": {'; '.join(sentences)}" if sentences else ""
    link = "[performance](docs/performance.md#on-a-gpu)"
    return f"Measured on one {figures['machine'][-1]['gpu']}, {dates_of(figures)}{text} ({link}).\n"


def main(argv: list[str] | None = None) -> int:
    """Records archives and writes the documents; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", nargs="*", type=Path, help="archives written by benchmarks/on_gpu.py")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the documents differ from the records")
    args = parser.parse_args(argv)
    if args.check and args.archives:
        parser.error("--check records nothing; give archives without --check")
    failed = False
    for archive in args.archives:
        try:
            print(f"recorded {record_call(archive).relative_to(ROOT)}")
        except SystemExit as error:
            print(error, file=sys.stderr)
            failed = True
    calls = newest_calls()
    stale = []
    for name, text in (("docs/performance.md", results_text(calls)), ("README.md", readme_text(calls))):
        document = ROOT / name
        after = replace_between(document, BEGIN, END, text)
        if after == document.read_text(encoding="utf-8"):
            continue
        stale.append(name)
        if not args.check:
            document.write_text(after, encoding="utf-8")
            print(f"wrote {name}")
    if args.check and stale:
        print(f"differs from the records: {', '.join(stale)}; run python benchmarks/render_gpu.py", file=sys.stderr)
        return 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
