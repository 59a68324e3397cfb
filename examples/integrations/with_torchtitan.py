"""torchtitan 0.2.2: patches first, single tokens last, as a train spec for its Llama 3 and a Trainer that switches.

    plan = build_plan("patch-train", patch_size=4, …, global_batch_size=64, gradient_accumulation=2, world_size=8)
    register_train_spec("llama3_patches", make_spec(plan, "corpus_text_document"))

in a file that `--experimental.custom_import` names; then run its `train.py` with PatchTrainer in place of Trainer, and
`--model.name llama3_patches --training.steps STEPS --training.global_batch_size SAMPLES --optimizer.lr 1`: the steps of the plan, and
gradient_accumulation · world_size · local_batch_size.

Its checkpoints hold the two numbers of the stream, with the state of the data loader. It was tried in one process. Tensor parallelism needs
a spec of its own, because its plan for the embeddings replaces the module below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.models.llama3 import Transformer, get_train_spec
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.train import Trainer

from megatron_patch.library import StagePlan, TokenStream, learning_rate, multi_token_loss, patch_embedding, switch_optimizer

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


class PatchEmbedding(nn.Embedding):
    """Embeds patches: token ids [B, T, K] to [B, T, H]."""

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Returns the means of the embeddings of each patch."""
        return patch_embedding(self.weight, token_ids)


class PatchTransformer(Transformer):
    """torchtitan's Llama 3 over patches."""

    def __init__(self, model_args: Any) -> None:
        super().__init__(model_args)
        self.tok_embeddings = PatchEmbedding(model_args.vocab_size, model_args.dim)


class PatchLoss:
    """The sum of the losses of logits [B, T, V] for labels [B, T, K]; the Trainer divides it by the number of labels of the step.

    Raises:
        ValueError: a stage anneals its weights, which then depend on the step; the loss sees labels only.
    """

    def __init__(self, plan: StagePlan) -> None:
        if any(stage.anneal_share for stage in plan.stages):
            raise ValueError("anneal_share is above 0; allowed here: 0; pass label weights through the input dictionary instead")
        self._weights = {stage.labels_per_position: stage.position_weights for stage in plan.stages}

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the summed loss."""
        weights = torch.tensor(self._weights[labels.shape[-1]], device=labels.device)
        return multi_token_loss(logits, labels, weights)[0]


class StreamLoader(BaseDataLoader):
    """A stream as torchtitan's data loader, whose state is in its checkpoints."""

    def __init__(self, stream: TokenStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Batch]:
        """Yields ({"input": token ids [B, T, K]}, labels [B, T, K])."""
        for batch in self.stream:
            yield {"input": batch["input_ids"]}, batch["labels"]

    def state_dict(self) -> dict[str, Any]:
        """Returns the two numbers."""
        return self.stream.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them back; those of a run that has none start from the beginning."""
        if state_dict:
            self.stream.load_state_dict(state_dict)


class PatchTrainer(Trainer):
    """torchtitan's Trainer with the switch between stages before the step that begins one."""

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        """Trains one step; `self.step` is its number from 1.

        Raises:
            ConfigError: the stages have another number of micro-batches in a step than the Trainer.
        """
        plan = self.dataloader.stream.plan
        progress = plan.progress(self.step - 1)
        if progress.stage_step == 0 and self.step > 1:
            self.optimizers.zero_grad()
            for optimizer in self.optimizers:
                switch_optimizer(optimizer, plan.stages[progress.stage_index])
        super().train_step(data_iterator)


def make_spec(plan: StagePlan, data: Any, **stream_options: Any) -> TrainSpec:
    """Returns torchtitan's spec of Llama 3 with the model, the loss, the data and the learning rates of a plan.

    Args:
        plan: the stages; `build_plan(gradient_accumulation=…, world_size=…)` with torchtitan's numbers. `--optimizer.lr` must be 1.
        data: what `TokenStream` takes.
        stream_options: further arguments of `TokenStream`, such as seed and vocab_size.
    """

    def loader(dp_world_size: int, dp_rank: int, job_config: Any, **_: Any) -> StreamLoader:
        settings = job_config.training
        if settings.steps != plan.steps:
            raise ValueError(f"--training.steps is {settings.steps}; allowed: the plan's {plan.steps}; change one of them")
        accumulation = max(1, settings.global_batch_size // (settings.local_batch_size * dp_world_size))
        stream = TokenStream(plan, data, rank=dp_rank, world_size=dp_world_size, gradient_accumulation=accumulation, **stream_options)
        return StreamLoader(stream)

    def rate(step: int) -> float:
        return learning_rate(plan, plan.consumed_tokens(plan.progress(min(step + 1, plan.steps))))

    return dataclasses.replace(
        get_train_spec(),
        model_cls=PatchTransformer,
        build_loss_fn=lambda job_config, **_: PatchLoss(plan),
        build_dataloader_fn=loader,
        build_lr_schedulers_fn=lambda optimizers, *_: LRSchedulersContainer(optimizers, rate),
        build_tokenizer_fn=None,
        build_validator_fn=None,
    )
