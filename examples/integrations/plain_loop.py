#!/usr/bin/env python
"""A training loop of one's own: patches of 4 bytes first, single bytes last, on the source of Python's library.

python examples/integrations/plain_loop.py --save run.pt

Torch and this package are all that it needs. What the method changes in a loop is in `loss_of` and `train`; the model is any transformer.
Start it again to resume: no token is read twice. `--stop-after 40` ends the first start in the middle of a stage.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from megatron_patch.library import (
    StagePlan,
    TokenStream,
    build_plan,
    learning_rate,
    linear_multi_token_loss,
    patch_embedding,
    switch_optimizer,
)

VOCABULARY, POSITIONS, WIDTH = 256, 64, 64
Batch = dict[str, torch.Tensor]


class Transformer(nn.Module):
    """A causal transformer of two layers over embeddings [B, T, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(POSITIONS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Returns the last hidden states [B, T, H]."""
        length = embeddings.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.blocks(embeddings + self.places.weight[:length], mask=mask, is_causal=True)


def loss_of(model: Transformer, batch: Batch) -> torch.Tensor:
    """Returns the summed loss of a micro-batch; at K = 1 this is ordinary next-token training."""
    hidden = model(patch_embedding(model.table.weight, batch["input_ids"]))
    return linear_multi_token_loss(hidden, model.head.weight, batch["labels"], batch["label_weights"])[0]


def weight_of(batch: Batch) -> float:
    """Returns the sum of the weights of a batch's scored labels."""
    return float(((batch["labels"] != -100) * batch["label_weights"]).sum())


def train(plan: StagePlan, stream: TokenStream, save: Path, stop_after: int | None = None) -> Iterator[dict[str, float]]:
    """Trains to the end of the plan, or saves and stops, and yields a record of each step.

    Args:
        plan: the stages.
        stream: the data.
        save: file of the checkpoint; if it exists, the run resumes.
        stop_after: number of steps after which to stop; None: at the end.
    """
    torch.manual_seed(0)
    model = Transformer()
    matrices, others = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    if save.exists():
        checkpoint = torch.load(save, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        stream.load_state_dict(checkpoint["stream"])
    begin = stream.state_dict()
    first = plan.first_step(begin["stage_index"]) + begin["stage_step"]
    batches = iter(stream)
    for step in range(first, plan.steps if stop_after is None else min(stop_after, plan.steps)):
        progress = plan.progress(step)
        stage = plan.stages[progress.stage_index]
        if progress.stage_step == 0 and step > 0:
            switch_optimizer(optimizer, stage)
        tokens = plan.consumed_tokens(plan.progress(step + 1))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, tokens)
        micro_batches = [next(batches) for _ in range(stage.gradient_accumulation(1))]
        weight, loss = sum(map(weight_of, micro_batches)), 0.0
        for batch in micro_batches:
            part = loss_of(model, batch) / weight
            part.backward()
            loss += part.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield {"step": step + 1, "patch_size": stage.patch_size, "tokens": tokens, "loss": loss, "lr": optimizer.param_groups[0]["lr"]}
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "stream": stream.state_dict()}, save)


def library_source(limit: int) -> np.ndarray:
    """Returns bytes of the source of Python's library, a text that every machine has."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return np.frombuffer(b"".join(file.read_bytes() for file in files)[:limit], dtype=np.uint8)


def main(words: list[str] | None = None) -> None:
    """Trains, and prints a line of JSON for each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, required=True, help="file of the checkpoint")
    parser.add_argument("--train-tokens", type=int, default=96 * 2048)
    parser.add_argument("--stop-after", type=int, help="stop and save after so many steps")
    args = parser.parse_args(words)
    plan = build_plan(
        "patch-train",
        patch_size=4,
        train_tokens=args.train_tokens,
        seq_length=POSITIONS,
        global_batch_size=32,
        micro_batch_size=8,
        lr=3e-3,
        lr_warmup_tokens=args.train_tokens // 12,
    )
    stream = TokenStream(plan, library_source(2 * args.train_tokens), vocab_size=VOCABULARY)
    for record in train(plan, stream, args.save, args.stop_after):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
