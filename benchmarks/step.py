#!/usr/bin/env python
"""A step of training at 1.3B parameters, patches and tokens: MFU, peak memory and time against the plan, and where the time goes.

    python benchmarks/step.py --variant compiled            24 x 2048, T = 2048, bfloat16, ZeRO 1, one rank; by default K = 4, then 1
    python benchmarks/step.py --variant eager --steps 4 --no-profile
    python benchmarks/step.py --tiny                        the same course with a tiny model, on any machine

The run is in this process and writes no checkpoint. Both stages have the same positions a step; their first steps, in which code is
compiled and memory is found, do not count; a step's time is from one moment at which the GPU has done all its work to the next. Figures
are recorded when a stage has them. "planned" is what the plan (tools/plan.py) expects, from copies, products and attention measured here
beforehand, and for memory without and with the allocator's allowance beside what is allocated and reserved. After the measured steps of a
stage two more run under torch's profiler; its traces go to the folder that RESULTS names, or to runs/.

The exit code is 1 where a stage was not measured, as in a run that was told to stop, or a loss is not finite; 2 where the model is too
large for a machine without a GPU.
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
    parser.add_argument("--variant", choices=("eager", "compiled"), default="eager", help="blocks as they are, or compiled")
    parser.add_argument("--layers", type=count_from_one, default=24, help="blocks of the model")
    parser.add_argument("--hidden", type=count_from_one, default=2048, help="width of the model")
    parser.add_argument("--heads", type=count_from_one, default=16, help="attention heads of a block")
    parser.add_argument("--ffn", type=count_from_one, default=5504, help="width inside the feed-forward layers")
    parser.add_argument("--vocab", type=count_from_one, default=32_000, help="ids of the vocabulary")
    parser.add_argument("--seq-length", type=count_from_one, default=2048, help="positions of a sample, patches or tokens")
    parser.add_argument("--micro-batch-size", type=count_from_one, default=8, help="samples of a micro-batch")
    parser.add_argument("--micro-batches", type=count_from_one, default=4, help="micro-batches of a step")
    parser.add_argument("--steps", type=count_from_one, default=8, help="steps of each stage that count")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of each stage that do not count")
    parser.add_argument("--patch-size", type=count_from_one, default=4, help="K, tokens of a patch")
    parser.add_argument("--stages", nargs="+", choices=("patch", "token"), default=["patch", "token"], help="what runs, in this order")
    parser.add_argument("--no-profile", action="store_true", help="leave the profiled steps out")
    parser.add_argument("--flags", default="", help="more flags of pretrain_gpt_patch.py, such as --flags='--operators plain'")
    parser.add_argument("--name", default=None, help="called so in the figures; by default the variant")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in place of all sizes above")
    args = parser.parse_args(argv)
    if args.tiny:
        vars(args).update(TINY)
    return args


def flags(args: argparse.Namespace, folder: Path) -> list[str]:
    """The run as flags of pretrain_gpt_patch.py; writes its data."""
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
    """Measures each stage of a run and records it at once.

    Args:
        args: of the command line.
        trainer: of the run.
        seconds: that the plan expects of a step, by stage.
        memory: (without, with the allocator's allowance) in GiB that the plan expects, by stage.
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
        self._forget_peak()
        self._last = time.perf_counter()

    def _forget_peak(self) -> None:
        if self._device.type == "cuda":
            self._synchronize()
            torch.cuda.reset_peak_memory_stats(self._device)

    def on_start(self, record: RunStart) -> None:
        """The first stage begins."""
        self._begin_stage()

    def on_switch(self, record: SwitchRecord) -> None:
        """The next one does."""
        self._begin_stage()

    def on_step(self, record: StepRecord) -> None:
        """Counts a step, and records what the stage has reached."""
        self._synchronize()
        now = time.perf_counter()
        self._times.append(now - self._last)
        self._losses.append(record.loss)
        print(f"{record.stage} step {len(self._times)}: {self._times[-1]:.3f} s, loss {record.loss:.4f}", flush=True)
        measured = self._args.warm_up + self._args.steps
        if len(self._times) == self._args.warm_up:
            # What compilation tries out takes memory, too.
            self._forget_peak()
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
        print(f"{stage}, {PROFILED} steps: {figures['wall_ms']:.1f} ms, {figures['busy_share']:.1%} of them with a kernel running")
        rows = [[row["name"][:100], f"{row['cuda_ms']:.2f}", f"{row['share']:.1%}", f"{row['calls']:,}"] for row in figures["rows"]]
        print_table(f"{variant}, {stage}: kernels", ["name", "ms", "share", "calls"], rows)
        folder = Path(os.environ.get("RESULTS") or ROOT / "runs")
        folder.mkdir(parents=True, exist_ok=True)
        print(f"trace: {profile.write_trace(folder / f'trace-{variant}-{stage}.json.gz')}", flush=True)


def show(rows: list[dict[str, Any]]) -> None:
    """Prints figures of stages."""
    lines = []
    for row in rows:
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        ratio = f"{row['step_seconds'] / row['planned_seconds']:.2f}"
        losses = ["-" if row[name] is None else f"{row[name]:.3f}" for name in ("loss_first", "loss_last")]
        cells = [f"{row['step_seconds']:.3f}", f"{row['planned_seconds']:.3f}", ratio, f"{row['tokens_per_second']:,.0f}"]
        cells += [f"{row['tflops']:.4g}", mfu, f"{row['memory_gib']:.1f}", f"{row['planned_memory_gib']:.1f}", " to ".join(losses)]
        lines.append([f"{row['variant']}, {row['stage']}, K = {row['patch_size']}", *cells])
    heads = ["stage", "step, s", "planned", "over it", "tokens/s", "TFLOP/s", "MFU", "GiB", "planned", "loss"]
    print_table("Steps of training", heads, lines)
    sys.stdout.flush()


def what_is_missing(stages: Sequence[str], rows: Sequence[dict[str, Any]]) -> str | None:
    """Why a run has not measured what it was asked to, or None where it has.

    Args:
        stages: that were asked for, in their order.
        rows: figures of those that were measured.
    """
    if not rows:
        return "no stage was measured: the run ended before that"
    if missing := stages[len(rows) :]:
        return f"not measured, as the run ended before that: {', '.join(missing)}"
    sick = [row["stage"] for row in rows if not all(loss is not None and math.isfinite(loss) for loss in row["losses"])]
    return f"a loss is not finite: {', '.join(sick)}" if sick else None


def main(argv: list[str] | None = None) -> int:
    """Measures, and returns 1 where a stage was not measured or a loss is not finite."""
    args = parse(argv)
    if not torch.cuda.is_available() and not args.tiny and args.hidden * args.layers > 4096:
        print("no GPU: on a CPU give --tiny, or a smaller model (--layers, --hidden)", file=sys.stderr)
        return 2
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run, settings = resolved(flags(args, Path(folder)))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        timer = Timer(device, 7)
        hardware, limits = measured_hardware(timer, run, settings)
        del timer
        for name, value in limits.items():
            record("ceiling", name=name, value=value, unit="GB/s" if "gb" in name else "TFLOP/s", when="before")
        print(
            f"ceilings after {time.perf_counter() - began:.1f} s: { ({name: round(value, 1) for name, value in limits.items()}) }",
            flush=True,
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()
        memory = {
            name: ((part.total - part.fragmentation) / 2**30, part.total / 2**30)
            for name, part in planned_memory(run, settings, device).items()
        }
        seconds = planned_seconds(run, settings, hardware)
        meters: list[Meter] = []

        def listeners(trainer: Trainer) -> list[Callback]:
            print(f"the trainer is ready after {time.perf_counter() - began:.1f} s", flush=True)
            meters.append(Meter(args, trainer, seconds, memory))
            return list(meters)

        train(run, settings, listeners)
    rows = meters[0].rows if meters else []
    if rows:
        show(rows)
    print(f"{time.perf_counter() - began:.1f} s in all")
    if rows and not args.tiny:
        write_results(f"step-{args.name or args.variant}", device, {"settings": vars(args), "ceilings": limits, "rows": rows})
    if (missing := what_is_missing(args.stages, rows)) is not None:
        print(missing, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
