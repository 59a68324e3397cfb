"""Lightning: patches first, single tokens last, as a module around a transformer of one's own.

    plan = build_plan("patch-train", patch_size=4, train_tokens=…, seq_length=…, global_batch_size=64, gradient_accumulation=2)
    module = PatchModule(body, table, head, plan, "corpus_text_document")
    make_trainer(plan, accumulate_grad_batches=2, default_root_dir="run").fit(module, ckpt_path="last")

With several devices, give `build_plan` their number as `world_size`; each of them reads its own part. The stream stands where the trainer's
count of steps is, also when a checkpoint is loaded in the middle of a stage.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

from megatron_patch.library import StagePlan, TokenStream, learning_rate, linear_multi_token_loss, patch_embedding, switch_optimizer

Batch = dict[str, torch.Tensor]


class PatchModule(lightning.LightningModule):
    """Trains a transformer by a plan.

    Args:
        body: from embeddings [B, T, H] to the last hidden states [B, T, H].
        table: the token embeddings.
        head: the head; it has no bias.
        plan: the stages; each has as many micro-batches in a step as the trainer accumulates.
        data: what `TokenStream` takes.
        stream_options: further arguments of `TokenStream`, such as seed and vocab_size.
    """

    def __init__(self, body: nn.Module, table: nn.Embedding, head: nn.Linear, plan: StagePlan, data: Any, **stream_options: Any) -> None:
        super().__init__()
        self.body, self.table, self.head = body, table, head
        self.plan, self._data, self._stream_options = plan, data, stream_options

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Returns the mean loss of a micro-batch; Lightning takes the mean over those of a step and over devices."""
        hidden = self.body(patch_embedding(self.table.weight, batch["input_ids"]))
        total, weight = linear_multi_token_loss(hidden, self.head.weight, batch["labels"], batch["label_weights"])
        self.log("patch_size", float(batch["input_ids"].shape[-1]))
        self.log("train_loss", total / weight)
        return total / weight

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Switches the optimizer before the first micro-batch of a stage."""
        progress = self.plan.progress(self.trainer.global_step)
        stage = self.plan.stages[progress.stage_index]
        begins_step = batch_idx % self.trainer.accumulate_grad_batches == 0
        if begins_step and progress.stage_step == 0 and progress.stage_index > 0:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()  # those of the step before, which Lightning clears only in the next backward pass
            switch_optimizer(optimizer, stage)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Returns this device's micro-batches from the trainer's step on.

        Raises:
            ConfigError: a stage has another number of micro-batches in a step than the trainer.
        """
        ranks = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        accumulation = self.trainer.accumulate_grad_batches
        stream = TokenStream(self.plan, self._data, gradient_accumulation=accumulation, **ranks, **self._stream_options)
        stream.seek(self.trainer.global_step)
        return DataLoader(stream, batch_size=None)

    def configure_optimizers(self) -> Any:
        """Returns AdamW and the plan's learning rates."""
        decayed = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1.0, betas=(0.9, 0.95))

        def rate(step: int) -> float:
            return learning_rate(self.plan, self.plan.consumed_tokens(self.plan.progress(min(step + 1, self.plan.steps))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def make_trainer(plan: StagePlan, **arguments: Any) -> lightning.Trainer:
    """Returns a trainer for a plan; further arguments are those of `lightning.Trainer`.

    Lightning must not put a sampler of its own around the stream, which divides the samples among devices already.
    """
    return lightning.Trainer(**{"max_steps": plan.steps, "gradient_clip_val": 1.0, "use_distributed_sampler": False, **arguments})
