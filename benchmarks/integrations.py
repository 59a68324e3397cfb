#!/usr/bin/env python
"""Measures other trainers with this method, next to the same trainers without it.

    python benchmarks/integrations.py          a Llama of 20M parameters, CPU
    python benchmarks/integrations.py --tiny   a tiny one

All train the same model of transformers on random tokens, with the same number
of positions in a step. "without us" is the trainer with the model's own
embedding and loss, at K = 1. "published formulas" are the embedding and the loss
of PatchTrain's code (arXiv 2407.12665) around the same model, written again:
its file needs transformers 4.34. Each of them runs in a process of its own, and
all take turns in every round, so that other load slows all of them. A step's
time is the CPU time of the process, so what waits for a core does not count.
Memory is the growth of the resident set from before the first step to its peak.
Lightning is measured where it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WARM_UP = 2
OURS, WITHOUT, PUBLISHED = "with us", "without us", "published formulas"
PEERS = {
    "plain loop": [(WITHOUT, 1), (OURS, 1), (OURS, 4), (PUBLISHED, 1), (PUBLISHED, 4)],
    "Hugging Face's Trainer": [(WITHOUT, 1), (OURS, 1), (OURS, 4), (PUBLISHED, 1), (PUBLISHED, 4)],
    "Lightning": [(WITHOUT, 1), (OURS, 1), (OURS, 4)],
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model, of a step and of the measurement."""

    vocab: int = 32_000
    hidden: int = 256
    layers: int = 4
    positions: int = 128
    samples: int = 4
    steps: int = 6


TINY = Sizes(vocab=64, hidden=32, layers=1, positions=16, samples=2, steps=2)


def make_model(sizes: Sizes) -> Any:
    """Returns a Llama of transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = sizes.hidden // 16 if sizes.hidden < 256 else sizes.hidden // 64
    more = {"num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": sizes.positions}
    shape = {"hidden_size": sizes.hidden, "intermediate_size": sizes.hidden * 8 // 3, "num_hidden_layers": sizes.layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=sizes.vocab, **shape, **more))


def make_data(sizes: Sizes, patch_size: int) -> tuple[Any, Any]:
    """Returns our plan, with one micro-batch in each step, and random tokens."""
    import numpy as np

    from megatron_patch.library import build_plan

    steps = WARM_UP + sizes.steps
    stages = [{"patch_size": patch_size, "steps": steps, "batch": "constant-positions"}]
    plan = build_plan(stages=stages, seq_length=sizes.positions, global_batch_size=sizes.samples, gradient_accumulation=1, lr=1e-4)
    tokens = np.random.default_rng(0).integers(0, sizes.vocab, plan.tokens + 4096, dtype=np.int32)
    return plan, tokens


def make_stream(sizes: Sizes, patch_size: int) -> Any:
    """Returns our stream of random tokens."""
    from megatron_patch.library import TokenStream

    return TokenStream(*make_data(sizes, patch_size), vocab_size=sizes.vocab)


def make_rows(sizes: Sizes, patch_size: int) -> list[dict[str, Any]]:
    """Returns random rows of T·K tokens as "input_ids" and "labels", for the peers without us."""
    import torch

    draw = torch.Generator().manual_seed(0)
    count = (WARM_UP + sizes.steps) * sizes.samples
    rows = torch.randint(sizes.vocab, (count, sizes.positions * patch_size), generator=draw)
    return [{"input_ids": row, "labels": row} for row in rows]


def published_loss(model: Any, patch_size: int) -> Callable[..., Any]:
    """Returns the forward pass of the published code: means of embeddings, float32 logits, one cross-entropy for each of the K labels.

    The last patch of a row predicts nothing. The cast to bfloat16, which the published code makes before the mean, is left out on a CPU.
    """
    import torch.nn.functional as F

    def forward(input_ids: Any, labels: Any, **_: Any) -> dict[str, Any]:
        embeddings = model.get_input_embeddings()(input_ids).unflatten(1, (-1, patch_size)).mean(dim=2)
        logits = model.lm_head(model.model(inputs_embeds=embeddings, use_cache=False)[0]).float()
        rows = logits[:, :-1].flatten(0, 1)
        targets = labels[:, patch_size:].reshape(-1, patch_size)
        return {"loss": sum(F.cross_entropy(rows, targets[:, k]) for k in range(patch_size)) / patch_size}

    return forward


def loss_function(model: Any, kind: str, patch_size: int) -> Callable[..., Any]:
    """Returns a function from a batch's fields to the loss, for the loops that call it."""
    if kind == OURS:
        sys.path.insert(0, str(ROOT / "examples" / "integrations"))
        from with_hugging_face import read_patches

        ours = read_patches(model)
        return lambda **batch: ours(**batch).loss
    if kind == PUBLISHED:
        published = published_loss(model, patch_size)
        return lambda **batch: published(**batch)["loss"]
    return lambda **batch: model(**batch).loss


def batches(sizes: Sizes, kind: str, patch_size: int) -> Any:
    """Returns the data loader of a peer, whose rows are shuffled if they are not ours."""
    from torch.utils.data import DataLoader

    if kind == OURS:
        return DataLoader(make_stream(sizes, patch_size), batch_size=None)
    rows: Any = make_rows(sizes, patch_size)
    return DataLoader(rows, batch_size=sizes.samples, shuffle=True)


def plain_loop(sizes: Sizes, kind: str, patch_size: int, mark: Callable[[], None]) -> None:
    """Trains in a loop."""
    import torch

    model = make_model(sizes)
    loss_of = loss_function(model, kind, patch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    mark()
    for batch in batches(sizes, kind, patch_size):
        loss_of(**batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mark()


def hugging_face(sizes: Sizes, kind: str, patch_size: int, mark: Callable[[], None]) -> None:
    """Trains with Hugging Face's Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Mark(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            mark()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            mark()

    model, folder = make_model(sizes), tempfile.mkdtemp()
    quiet: dict[str, Any] = {"output_dir": folder, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    quiet["logging_strategy"] = "no"
    if kind == OURS:
        sys.path.insert(0, str(ROOT / "examples" / "integrations"))
        from with_hugging_face import make_trainer

        trainer = make_trainer(model, make_stream(sizes, patch_size), **quiet)
    else:
        if kind == PUBLISHED:
            model.forward = published_loss(model, patch_size)
            model.accepts_loss_kwargs = False
        rows: Any = make_rows(sizes, patch_size)
        args = TrainingArguments(per_device_train_batch_size=sizes.samples, num_train_epochs=1, remove_unused_columns=False, **quiet)
        trainer = Trainer(model=model, args=args, train_dataset=rows)
    trainer.add_callback(Mark())
    trainer.train()


def with_lightning(sizes: Sizes, kind: str, patch_size: int, mark: Callable[[], None]) -> None:
    """Trains with Lightning."""
    import lightning
    import torch

    model = make_model(sizes)

    class Body(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.model

        def forward(self, embeddings: Any) -> Any:
            return self.model(inputs_embeds=embeddings, use_cache=False)[0]

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    class Mark(lightning.Callback):
        def on_train_start(self, *_: Any) -> None:
            mark()

        def on_train_batch_end(self, *_: Any) -> None:
            mark()

    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    quiet |= {"accelerator": "cpu", "devices": 1, "callbacks": [Mark()]}
    if kind == OURS:
        sys.path.insert(0, str(ROOT / "examples" / "integrations"))
        from with_lightning import PatchModule, make_trainer

        plan, tokens = make_data(sizes, patch_size)
        module = PatchModule(Body(), model.get_input_embeddings(), model.lm_head, plan, tokens, vocab_size=sizes.vocab)
        make_trainer(plan, **quiet).fit(module)
        return
    trainer = lightning.Trainer(max_steps=WARM_UP + sizes.steps, gradient_clip_val=1.0, **quiet)
    trainer.fit(Module(), batches(sizes, kind, patch_size))


TRAINERS = {"plain loop": plain_loop, "Hugging Face's Trainer": hugging_face, "Lightning": with_lightning}


def resident(name: str) -> int:
    """Returns a field of this process' status in bytes: "VmRSS" now, "VmHWM" at its peak; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def measure(trainer: str, kind: str, patch_size: int, sizes: Sizes) -> dict[str, float]:
    """Trains in this process; returns the median CPU seconds of a step and the growth of the resident set in MB."""
    times: list[float] = []
    before = 0

    def mark() -> None:
        nonlocal before
        if not times:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before = resident("VmRSS")
        times.append(time.process_time())

    TRAINERS[trainer](sizes, kind, patch_size, mark)
    steps = [end - begin for begin, end in itertools.pairwise(times)][WARM_UP:]
    return {"seconds": statistics.median(steps), "megabytes": (resident("VmHWM") - before) / 1e6, "steps": len(steps)}


def in_child(trainer: str, kind: str, patch_size: int, tiny: bool) -> dict[str, float]:
    """Measures in a child process."""
    words = [sys.executable, __file__, "--child", trainer, kind, str(patch_size), *(["--tiny"] if tiny else [])]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{trainer}, {kind}, K = {patch_size} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(measured: dict[tuple[str, str, int], list[dict[str, float]]], sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yields one result for each peer: medians over rounds, and ratios to the same trainer without us."""
    positions = sizes.samples * sizes.positions
    for (trainer, kind, patch_size), results in measured.items():
        without = measured[trainer, WITHOUT, 1]
        yield {
            "trainer": trainer,
            "kind": kind,
            "patch_size": patch_size,
            "tokens_per_cpu_second": positions * patch_size / statistics.median(one["seconds"] for one in results),
            # Each round by itself: what slows one of them slows the other.
            "ratio": statistics.median(patch_size * base["seconds"] / one["seconds"] for one, base in zip(results, without, strict=True)),
            "megabytes": statistics.median(one["megabytes"] for one in results),
        }


def main(argv: list[str] | None = None) -> int:
    """Measures all peers, prints a table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each peer (default: 3)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, two steps")
    parser.add_argument("--child", nargs=3, metavar=("TRAINER", "KIND", "K"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sizes = TINY if args.tiny else Sizes()
    if args.child:
        print(json.dumps(measure(args.child[0], args.child[1], int(args.child[2]), sizes)))
        return 0
    import torch
    from _measure import print_table, write_results

    found = [name for name in PEERS if name != "Lightning" or importlib.util.find_spec("lightning")]
    order = [(trainer, kind, patch_size) for trainer in found for kind, patch_size in PEERS[trainer]]
    measured: dict[tuple[str, str, int], list[dict[str, float]]] = {peer: [] for peer in order}
    for number in range(args.rounds):
        for peer in order:
            measured[peer].append(in_child(*peer, args.tiny))
            print(f"round {number + 1}: {', '.join(map(str, peer))}: {measured[peer][-1]}", file=sys.stderr, flush=True)
    rows = list(rows_of(measured, sizes))
    table = [
        [row["trainer"], row["kind"], str(row["patch_size"]), f"{row['tokens_per_cpu_second']:,.0f}", f"{row['ratio']:.2f}",
         f"{row['megabytes']:,.0f}"]
        for row in rows
    ]  # fmt: skip
    print_table("Trainers", ["trainer", "", "K", "tokens per CPU second", "tokens / without us", "memory, MB"], table)
    device = torch.device("cpu")
    write_results("integrations", device, {"sizes": vars(sizes), "rounds": args.rounds, "results": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
