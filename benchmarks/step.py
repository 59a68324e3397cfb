#!/usr/bin/env python
"""Measures training steps at 1.3B parameters: MFU, memory, time, profile.

    python benchmarks/step.py --variant compiled
        24 x 2048, T = 2048, bfloat16, ZeRO 1, one rank; K = 4, then K = 1
    python benchmarks/step.py --variant eager --steps 4 --no-profile
    python benchmarks/step.py --tiny
        a tiny model, on any machine

The run is in this process and writes no checkpoint. Both stages have the same
positions per step. The first steps of a stage, which compile code and allocate
memory, do not count. The time of a step is that between two moments at which
the GPU has finished all work. Figures are recorded at the end of each stage.
"planned" is the prediction of tools/plan.py from the speed of copies, products
and attention measured before; planned memory without and with the allocator's
allowance corresponds to allocated and reserved memory. After the measured steps
of a stage, two more run under torch's profiler; the traces go to the folder
named by RESULTS, or to runs/.

The exit code is 1 if a stage was not measured (for example because the run was
stopped) or a loss is not finite; 2 if the model is too large for a machine
without a GPU.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_patch.engine.environment import use_expandable_segments

use_expandable_segments()

import torch  # noqa: E402
from _measure import Timer, print_table, record, write_results  # noqa: E402
from _profile import Profile  # noqa: E402
from _training import ROOT, measured_hardware, planned_memory, planned_seconds, resolved, stage_flags, train  # noqa: E402

from megatron_patch.cli.command_line import count_from_one  # noqa: E402
from megatron_patch.model.flops import parameter_count, peak_flops  # noqa: E402
from megatron_patch.training.callbacks.base import Callback, RunStart, StepRecord, SwitchRecord  # noqa: E402
from megatron_patch.training.throughput import memory_gib  # noqa: E402
from megatron_patch.training.trainer import Trainer  # noqa: E402

PROFILED = 2
TINY = {"layers": 2, "hidden": 64, "heads": 4, "ffn": 192, "vocab": 512, "seq_length": 64, "micro_batch_size": 2, "micro_batches": 2}
TINY |= {"steps": 3, "warm_up": 1}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=("eager", "compiled"), default="eager", help="eager or compiled blocks (default: eager)")
    parser.add_argument("--layers", type=count_from_one, default=24, help="blocks of the model (default: 24)")
    parser.add_argument("--hidden", type=count_from_one, default=2048, help="hidden size (default: 2048)")
    parser.add_argument("--heads", type=count_from_one, default=16, help="attention heads (default: 16)")
    parser.add_argument("--ffn", type=count_from_one, default=5504, help="width of the feed-forward layers (default: 5504)")
    parser.add_argument("--vocab", type=count_from_one, default=32_000, help="vocabulary (default: 32000)")
    parser.add_argument("--seq-length", type=count_from_one, default=2048, help="positions per sample (default: 2048)")
    parser.add_argument("--micro-batch-size", type=count_from_one, default=8, help="samples per micro-batch (default: 8)")
    parser.add_argument("--micro-batches", type=count_from_one, default=4, help="micro-batches per step (default: 4)")
    parser.add_argument("--steps", type=count_from_one, default=8, help="measured steps of each stage (default: 8)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of each stage before the measured ones (default: 3)")
    parser.add_argument("--patch-size", type=count_from_one, default=4, help="K of the patch stage (default: 4)")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=("patch", "token"),
        default=["patch", "token"],
        help="stages to run, in this order (default: patch token)",
    )
    parser.add_argument("--no-profile", action="store_true", help="do not profile")
    parser.add_argument("--flags", default="", help="further flags of pretrain_gpt_patch.py, such as --flags='--operators plain'")
    parser.add_argument("--name", default=None, help="name in the figures (default: the variant)")
    parser.add_argument("--tiny", action="store_true", help="use a tiny model in place of all sizes above")
    args = parser.parse_args(argv)
    if args.tiny:
        vars(args).update(TINY)
    return args


def flags(args: argparse.Namespace, folder: Path) -> list[str]:
    """Writes random data and returns the flags of the run."""
    sizes = [args.patch_size if stage == "patch" else 1 for stage in args.stages]
    steps = args.warm_up + args.steps + (0 if args.no_profile else PROFILED)
    model = {"num-layers": args.layers, "hidden-size": args.hidden, "num-attention-heads": args.heads, "ffn-hidden-size": args.ffn}
    return [
        *(word for name, value in model.items() for word in (f"--{name}", str(value))),
        *stage_flags(folder / "x", args.vocab, sizes, steps, args.micro_batch_size * args.micro_batches, args.seq_length),
        *("--micro-batch-size", str(args.micro_batch_size), "--bf16", "--zero-stage", "1"),
        *(["--compile"] if args.variant == "compiled" else []),
        *args.flags.split(),
    ]


class Meter(Callback):
    """Callback that measures each stage of a run and records it at its end.

    Args:
        args: the parsed command line.
        trainer: trainer of the run.
        seconds: planned seconds of a step, by stage.
        memory: planned memory in GiB (without, with the allocator's allowance), by stage.
    """

    def __init__(
        self, args: argparse.Namespace, trainer: Trainer, seconds: dict[str, float], memory: dict[str, tuple[float, float]]
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self._args, self._trainer, self._seconds, self._memory = args, trainer, seconds, memory
        self._device = trainer.device
        self._times: list[float] = []
        self._losses: list[float] = []
        self._profile: Profile | None = None

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _begin_stage(self) -> None:
        self._times, self._losses = [], []
        self._reset_peak()
        self._last = time.perf_counter()

    def _reset_peak(self) -> None:
        if self._device.type == "cuda":
            self._synchronize()
            torch.cuda.reset_peak_memory_stats(self._device)

    def on_start(self, record: RunStart) -> None:
        """Begins the first stage."""
        self._begin_stage()

    def on_switch(self, record: SwitchRecord) -> None:
        """Begins the next stage."""
        self._begin_stage()

    def on_step(self, record: StepRecord) -> None:
        """Times a step, and records the stage after its last measured step."""
        self._synchronize()
        now = time.perf_counter()
        self._times.append(now - self._last)
        self._losses.append(record.loss)
        print(f"{record.stage} step {len(self._times)}: {self._times[-1]:.3f} s, loss {record.loss:.4f}", flush=True)
        measured = self._args.warm_up + self._args.steps
        if len(self._times) == self._args.warm_up:
            # Compilation allocates memory for its trials, which does not count.
            self._reset_peak()
        if len(self._times) == measured:
            self._record_stage(record)
            if not self._args.no_profile:
                self._profile = Profile(self._device)
                self._profile.start()
        elif self._profile is not None and len(self._times) == measured + PROFILED:
            self._record_profile(self._profile, record.stage)
            self._profile = None
        self._synchronize()
        self._last = time.perf_counter()

    def _record_stage(self, last: StepRecord) -> None:
        args, stage, trainer = self._args, self._trainer.stage, self._trainer
        times = self._times[args.warm_up :]
        seconds = statistics.median(times)
        tflops = trainer.cost.step_flops(stage) / seconds / 1e12
        cuda = self._device.type == "cuda"
        peak = peak_flops(torch.cuda.get_device_name(self._device)) if cuda else None
        shape = trainer.run.shape
        self.rows.append(
            record(
                "training",
                variant=args.name or args.variant,
                stage=stage.name,
                patch_size=stage.patch_size,
                model={"num_layers": shape.num_layers, "hidden_size": shape.hidden_size, "heads": shape.num_attention_heads}
                | {"ffn_hidden_size": shape.ffn_hidden_size, "vocab_size": shape.vocab_size},
                parameters=parameter_count(shape).total,
                seq_length=stage.positions,
                micro_batch_size=stage.micro_batch_size,
                micro_batches=args.micro_batches,
                steps=len(times),
                step_seconds=seconds,
                step_seconds_all=times,
                first_step_seconds=self._times[0],
                planned_seconds=self._seconds[stage.name],
                tokens_per_second=stage.tokens_per_step / seconds,
                positions_per_second=stage.positions_per_step / seconds,
                tflops=tflops,
                mfu=tflops * 1e12 / peak if peak else None,
                memory_gib=memory_gib(self._device),
                planned_memory_gib=self._memory[stage.name][0],
                reserved_gib=torch.cuda.max_memory_reserved(self._device) / 2**30 if cuda else None,
                planned_reserved_gib=self._memory[stage.name][1],
                loss_first=self._losses[0],
                loss_last=last.loss,
                losses=self._losses,
            )
        )
        show(self.rows[-1:])

    def _record_profile(self, profile: Profile, stage: str) -> None:
        profile.stop()
        variant = self._args.name or self._args.variant
        figures = profile.figures()
        record("profile", variant=variant, stage=stage, steps=PROFILED, **figures)
        print(f"{stage}, {PROFILED} steps: {figures['wall_ms']:.1f} ms, a kernel running {figures['busy_share']:.1%} of the time")
        rows = [[row["name"][:100], f"{row['cuda_ms']:.2f}", f"{row['share']:.1%}", f"{row['calls']:,}"] for row in figures["rows"]]
        print_table(f"{variant}, {stage}: kernels", ["name", "ms", "share", "calls"], rows)
        folder = Path(os.environ.get("RESULTS") or ROOT / "runs")
        folder.mkdir(parents=True, exist_ok=True)
        print(f"trace: {profile.write_trace(folder / f'trace-{variant}-{stage}.json.gz')}", flush=True)


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the results of stages."""
    lines = []
    for row in rows:
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        ratio = f"{row['step_seconds'] / row['planned_seconds']:.2f}"
        losses = ["-" if row[name] is None else f"{row[name]:.3f}" for name in ("loss_first", "loss_last")]
        cells = [f"{row['step_seconds']:.3f}", f"{row['planned_seconds']:.3f}", ratio, f"{row['tokens_per_second']:,.0f}"]
        cells += [f"{row['tflops']:.4g}", mfu, f"{row['memory_gib']:.1f}", f"{row['planned_memory_gib']:.1f}", " to ".join(losses)]
        lines.append([f"{row['variant']}, {row['stage']}, K = {row['patch_size']}", *cells])
    heads = ["stage", "step, s", "planned", "step / planned", "tokens/s", "TFLOP/s", "MFU", "GiB", "planned", "loss"]
    print_table("Training steps", heads, lines)
    sys.stdout.flush()


def incomplete_reason(stages: Sequence[str], rows: Sequence[dict[str, Any]]) -> str | None:
    """Returns why a run has not measured all stages, or None if it has.

    Args:
        stages: stages to measure, in their order.
        rows: results of the stages that were measured.
    """
    if not rows:
        return "no stage was measured: the run ended too early"
    if missing := stages[len(rows) :]:
        return f"not measured because the run ended too early: {', '.join(missing)}"
    sick = [row["stage"] for row in rows if not all(loss is not None and math.isfinite(loss) for loss in row["losses"])]
    return f"a loss is not finite: {', '.join(sick)}" if sick else None


def main(argv: list[str] | None = None) -> int:
    """Measures; returns 1 if a stage was not measured or a loss is not finite."""
    args = parse(argv)
    if not torch.cuda.is_available() and not args.tiny and args.hidden * args.layers > 4096:
        print("no GPU found; give --tiny, or a smaller model with --layers and --hidden", file=sys.stderr)
        return 2
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run, engine_config = resolved(flags(args, Path(folder)))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        timer = Timer(device, 7)
        hardware, limits = measured_hardware(timer, run, engine_config)
        del timer
        for name, value in limits.items():
            record("ceiling", name=name, value=value, unit="GB/s" if "gb" in name else "TFLOP/s", when="before")
        print(
            f"ceilings measured after {time.perf_counter() - began:.1f} s: { ({name: round(value, 1) for name, value in limits.items()}) }",
            flush=True,
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()
        memory = {
            name: ((part.total - part.fragmentation) / 2**30, part.total / 2**30)
            for name, part in planned_memory(run, engine_config, device).items()
        }
        seconds = planned_seconds(run, engine_config, hardware)
        meters: list[Meter] = []

        def make_callbacks(trainer: Trainer) -> list[Callback]:
            print(f"the trainer is ready after {time.perf_counter() - began:.1f} s", flush=True)
            meters.append(Meter(args, trainer, seconds, memory))
            return list(meters)

        train(run, engine_config, make_callbacks)
    rows = meters[0].rows if meters else []
    if rows:
        show(rows)
    print(f"total time {time.perf_counter() - began:.1f} s")
    if rows and not args.tiny:
        write_results(f"step-{args.name or args.variant}", device, {"settings": vars(args), "ceilings": limits, "rows": rows})
    if (reason := incomplete_reason(args.stages, rows)) is not None:
        print(reason, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
