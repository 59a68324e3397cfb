"""Compares every parallel layout of up to four ranks with one process, across the switch.

`python -m tests.distributed.matrix` prints the table, with `--optimizer muon` that of Muon. Each combination trains 24 steps through a patch stage and a token stage on real
ranks, with evaluations before, at and after the switch. Each step is compared: losses, evaluations and gradient norms must agree within
1e-5 (bfloat16: losses within 1e-2 of float32). With Muon, the single process steps with torch's function (tests/oracle/reference_muon.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.distributed.runs import Run, make_corpus, start_program, train
from tests.oracle.reference_muon import start_with_reference

PLAN = "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 4 --train-tokens 4608 --lr 3e-3 --lr-warmup-fraction 0.2"
PLAN += " --num-layers 3 --eval-interval 5"
MODELS = {
    "llama": "",
    "tied": "--no-untie-embeddings-and-output-weights",
    "qwen3, one group": "--model-family qwen3 --num-query-groups 1",
    "gpt2": "--model-family gpt2",
    "windows": "--window-size 2,0 --window-attn-skip-freq 3",
    "experts": "--num-experts 8 --moe-ffn-hidden-size 24 --moe-aux-loss-coeff 0.05 --moe-z-loss-coeff 1e-3 --micro-batch-size 1",
    "sigmoid experts": "--num-experts 4 --moe-router-topk 3 --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
    "--moe-router-bias-update-rate 0.01 --moe-shared-expert-intermediate-size 16 --moe-layer-freq [0,1,1] --micro-batch-size 1",
    "weighted labels": "--no-untie-embeddings-and-output-weights --position-weights power",
}
LENGTHS = {
    "positions": "",
    "tokens": "--sample constant-tokens --reset-position-ids --reset-attention-mask --eod-token-id 63 --eval-interval 1",
}
"""What stays constant at the switch. With constant tokens, documents are also separated, so that every stage needs positions and masks, and
an evaluation follows every step, so that the evaluations around the switch have other lengths than the steps next to them."""
SHAPES = [(1, 1, 1), (1, 1, 2), (2, 1, 1), (2, 1, 2), (4, 1, 1), (1, 2, 1), (1, 2, 2), (1, 3, 1), (1, 4, 1), (2, 2, 1)]
"""(tensor, pipeline, data)."""
CONTEXT_SHAPES = [(1, 1, 2), (2, 1, 2), (1, 2, 2), (1, 1, 4)]
CONTEXT_SIZES = {2: ((1, 2), (2, 1)), 4: ((1, 4), (2, 4), (4, 1))}
"""Context-parallel sizes of the patch stage and of the token stage, by the number of data-parallel ranks."""


def stages_with_context(patch: int, token: int) -> str:
    """Returns the flags of the stages of patch-train, as `PLAN` has them, with these context-parallel sizes."""
    stages = [
        {"name": "patch", "patch_size": 4, "token_share": 2 / 3, "context_parallel_size": patch},
        {"name": "token", "lr_policy": "restart", "optimizer": "reset", "context_parallel_size": token},
    ]
    return f"--patch-size None --stages {json.dumps(stages, separators=(',', ':'))}"


@dataclass(frozen=True)
class Combination:
    """A layout and the model to train with it."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    zero: int = 1
    model: str = "llama"
    length: str = "positions"
    extra: str = ""
    optimizer: str = "adamw"
    context: tuple[int, int] | None = None

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.data

    @property
    def reference(self) -> str:
        """The flags with which one process computes the same."""
        return f"{MODELS[self.model]} {LENGTHS[self.length]} --optimizer {self.optimizer}"

    @property
    def words(self) -> str:
        """The layout as flags."""
        sequence = " --sequence-parallel" if self.sequence else ""
        layout = f"--tensor-model-parallel-size {self.tensor} --pipeline-model-parallel-size {self.pipeline}"
        return f"{layout}{sequence} --zero-stage {self.zero} {self.extra} {stages_with_context(*self.context) if self.context else ''}"

    def __str__(self) -> str:
        sequence = " SP" if self.sequence else ""
        optimizer = "" if self.optimizer == "adamw" else f"{self.optimizer} "
        layout = f"TP{self.tensor}{sequence} PP{self.pipeline} DP{self.data} ZeRO{self.zero}"
        layout += f" CP{self.context[0]}-{self.context[1]}" if self.context else ""
        return f"{optimizer}{layout} {self.model}, {self.length} {self.extra}".strip()


@dataclass
class References:
    """Runs of a single process, each trained when it is first used; Muon's do not use the product's Muon."""

    folder: Path
    corpus: str
    runs: dict[str, Run] = field(default_factory=dict)

    def __call__(self, words: str) -> Run:
        """Returns the run with these flags."""
        if words not in self.runs:
            folder = self.folder / f"single-{len(self.runs)}"
            program = start_with_reference if "--optimizer muon" in words else start_program
            self.runs[words] = train(folder, 1, PLAN, words, "--zero-stage 0 --data-path", self.corpus, main=program)
        return self.runs[words]


@dataclass(frozen=True)
class Difference:
    """Largest relative differences from a single process over all steps."""

    steps: int
    loss: float
    grad_norm: float
    evaluation: float

    def within(self, combination: Combination) -> bool:
        """Returns whether the differences are small enough to be rounding errors."""
        if "--bf16" in combination.extra:
            return max(self.loss, self.evaluation) < 1e-2 and self.loss > 1e-6
        return max(self.loss, self.evaluation, self.grad_norm) < 1e-5


def compare(combination: Combination, folder: Path, references: References) -> Difference:
    """Trains a combination and compares it with a single process."""
    run = train(folder, combination.ranks, PLAN, combination.reference, combination.words, "--data-path", references.corpus)
    single = references(combination.reference)

    def largest(pairs: Iterator[tuple[float, float]]) -> float:
        return max(abs(value - expected) / abs(expected) for value, expected in pairs)

    evaluations = list(zip(run.records("evaluation"), single.records("evaluation"), strict=True))
    assert len(evaluations) >= 5 and all(ours["eval_tokens"] == expected["eval_tokens"] for ours, expected in evaluations)
    assert len({record["patch_size"] for record in run.records("step")}) == 2
    return Difference(
        len(run.losses),
        largest(zip(run.losses, single.losses, strict=True)),
        largest(zip(run.values("grad_norm"), single.values("grad_norm"), strict=True)),
        largest((ours[key], expected[key]) for ours, expected in evaluations for key in ("token_loss", "patch_loss")),
    )


def layouts() -> list[Combination]:
    """Returns every grid of up to four ranks, with and without sequence parallelism."""
    return [Combination(t, p, d, sequence) for t, p, d in SHAPES for sequence in ((False, True) if t > 1 else (False,))]


def combinations(optimizer: str = "adamw") -> list[Combination]:
    """Returns every layout at every ZeRO level and with both lengths, and every layout with every model, recomputation and bfloat16.

    Args:
        optimizer: the optimizer of all of them.
    """
    found = []
    for layout, length in itertools.product(layouts(), LENGTHS):
        for zero in range(4 if layout.pipeline == 1 else 2):
            found.append(Combination(**{**vars(layout), "zero": zero, "length": length}))
    for layout in layouts():
        for model in list(MODELS)[1:]:
            found.append(Combination(**{**vars(layout), "model": model}))
        found.append(Combination(**{**vars(layout), "model": "tied", "zero": 3 if layout.pipeline == 1 else 0}))
        for extra in (
            "--recompute-granularity full",
            "--recompute-granularity selective --operators plain",
            "--bf16",
            "--pipeline-balance flops --micro-batch-size 1",
        ):
            found.append(Combination(**{**vars(layout), "model": "tied", "extra": extra}))
    every = [*found, *context_combinations(), *expert_combinations()]
    return [replace(combination, optimizer=optimizer) for combination in every]


def context_combinations() -> list[Combination]:
    """Returns layouts with context-parallel sizes that change at the switch: with every ZeRO level, length, model and recomputation."""
    shapes = [Combination(t, p, d, sequence) for t, p, d in CONTEXT_SHAPES for sequence in ((False, True) if t > 1 else (False,))]
    found = []
    for layout, length in itertools.product(shapes, LENGTHS):
        for zero, sizes in itertools.product(range(4 if layout.pipeline == 1 else 2), CONTEXT_SIZES[layout.data]):
            found.append(replace(layout, zero=zero, length=length, context=sizes))
    for layout in shapes:
        sizes = CONTEXT_SIZES[layout.data][0]
        found += [replace(layout, model=model, length="tokens", context=sizes) for model in list(MODELS)[1:]]
        gathers = replace(layout, extra="--cp-comm-type all_gather", context=sizes)
        found += [replace(gathers, length=length, model=model) for length in LENGTHS for model in ("windows", "qwen3, one group", "gpt2")]
        for extra in ("--recompute-granularity full", "--recompute-granularity selective --operators plain", "--bf16"):
            found.append(replace(layout, model="tied", extra=extra, context=sizes))
    return found


def expert_combinations() -> list[Combination]:
    """Returns layouts in which data-parallel ranks divide experts: with every ZeRO level that can, length, recomputation and bfloat16."""
    shapes = [(1, 1, 2, False, 2), (2, 1, 2, False, 2), (2, 1, 2, True, 2), (1, 2, 2, False, 2), (1, 1, 4, False, 2), (1, 1, 4, False, 4)]
    found = []
    for t, p, d, sequence, size in shapes:
        layout = Combination(t, p, d, sequence, extra=f"--expert-model-parallel-size {size}")
        for zero in range(3 if p == 1 else 2):
            found += [replace(layout, zero=zero, model="experts", length=length) for length in LENGTHS]
            if size == 2:
                found.append(replace(layout, zero=zero, model="sigmoid experts"))
        for extra in ("--recompute-granularity full", "--bf16"):
            found.append(replace(layout, model="experts", extra=f"{layout.extra} {extra}"))
        if p == 1:
            found.append(replace(layout, model="experts", context=CONTEXT_SIZES[d][0]))
    return found


def main() -> int:
    """Prints a line for each combination and returns how many of them differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="combinations whose description contains this")
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"), help="optimizer of all combinations")
    arguments = parser.parse_args()
    chosen = [combination for combination in combinations(arguments.optimizer) if arguments.only in str(combination)]
    failures = 0
    began = time.monotonic()
    print(f"{'combination':100} {'ranks':>5} {'steps':>5} {'loss':>8} {'norm':>8} {'eval':>8}")
    with tempfile.TemporaryDirectory() as folder:
        references = References(Path(folder), make_corpus(Path(folder) / "walks"))
        for number, combination in enumerate(chosen):
            try:
                found = compare(combination, Path(folder) / f"run-{number}", references)
            except (AssertionError, RuntimeError) as error:
                failures += 1
                print(f"{combination!s:100} {combination.ranks:5} failed: {error}", flush=True)
                continue
            good = found.within(combination)
            failures += not good
            numbers = f"{found.steps:5} {found.loss:8.1e} {found.grad_norm:8.1e} {found.evaluation:8.1e}"
            print(f"{combination!s:100} {combination.ranks:5} {numbers}{'' if good else '  DIFFERS'}", flush=True)
    print(f"{len(chosen)} combinations, {failures} differ or failed, {time.monotonic() - began:.0f} s")
    return failures


if __name__ == "__main__":
    raise SystemExit(main())
