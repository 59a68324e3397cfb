"""Hugging Face's Trainer: patches first, single tokens last, with a causal model of transformers.

    plan = build_plan("patch-train", patch_size=4, train_tokens=…, seq_length=…, global_batch_size=64, gradient_accumulation=2)
    stream = TokenStream(plan, "corpus_text_document", vocab_size=model.config.vocab_size)
    trainer = make_trainer(model, stream, output_dir="run", gradient_accumulation=2, save_steps=500)
    trainer.train(resume_from_checkpoint=True)

The model stays a model of transformers: its checkpoints, `generate` and evaluations on tokens [B, T] are as before. With several processes
the plan counts all of them: `gradient_accumulation` of the plan is that of the Trainer times the processes, on one rank.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from megatron_patch.library import StagePlan, TokenStream, learning_rate, linear_multi_token_loss, patch_embedding, switch_optimizer

Batch = dict[str, torch.Tensor]


def read_patches(model: PreTrainedModel) -> PreTrainedModel:
    """Lets a causal model also read patches, token ids [B, T, K]; everything else goes through its own forward pass. Returns the model.

    Raises:
        ValueError: the model changes its embeddings or logits in a way that this file does not.
    """
    head, config, ordinary = model.get_output_embeddings(), model.config, model.forward
    if head is None or head.bias is not None or getattr(config, "final_logit_softcapping", None) or "gemma" in config.model_type:
        raise ValueError(
            f"{type(model).__name__} scales its embeddings, caps its logits, or has a bias in its head; allowed: models as Llama, Qwen3 "
            "and GPT-2; change `forward` in this file to do the same"
        )

    def forward(
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        label_weights: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **others: Any,
    ) -> Any:
        """Returns the loss of a batch of patches: the mean, or the sum divided by the labels of all micro-batches of the step. Without
        labels, returns the logits.
        """
        if input_ids is None or input_ids.dim() != 3:
            return ordinary(input_ids=input_ids, labels=labels, position_ids=position_ids, **others)
        mask = None
        if document_ids is not None:
            mask = (document_ids[:, None, :, None] == document_ids[:, None, None, :]).tril()
        embeddings = patch_embedding(model.get_input_embeddings().weight, input_ids)
        hidden = model.base_model(inputs_embeds=embeddings, attention_mask=mask, position_ids=position_ids, use_cache=False)[0]
        if labels is None:
            return CausalLMOutput(logits=model.get_output_embeddings()(hidden))
        total, weight = linear_multi_token_loss(hidden, model.get_output_embeddings().weight, labels, label_weights)
        return CausalLMOutput(loss=total / (weight if num_items_in_batch is None else num_items_in_batch))

    model.forward = forward
    model.accepts_loss_kwargs = True
    model.loss_type = "patches"  # the Trainer counts all labels, because they are those of the next patch already
    return model


class Stages(TrainerCallback):
    """Starts the stream where the Trainer stands, and switches the optimizer between two stages."""

    def __init__(self, stream: TokenStream) -> None:
        self.stream = stream

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks the Trainer's settings and moves the stream to its step.

        Raises:
            ValueError: a setting would read another number of tokens than the plan, or read them twice.
        """
        plan, batches = self.stream.plan, args.gradient_accumulation_steps * args.world_size
        wrong = [
            f"stage {stage.name} has {count} micro-batches in a step; the Trainer has {batches}, so a switch would be in the middle of "
            "an accumulation: use build_plan(…, gradient_accumulation=…)"
            for stage in plan.stages
            if (count := stage.gradient_accumulation(1)) != batches
        ]
        for name, found, needed in (
            ("max_steps", args.max_steps, plan.steps),
            ("per_device_train_batch_size (a batch of the stream is a whole micro-batch)", args.per_device_train_batch_size, 1),
            ("ignore_data_skip (the stream resumes by itself)", args.ignore_data_skip, True),
            ("dataloader_num_workers", args.dataloader_num_workers, 0),
            ("accelerator_config.dispatch_batches", args.accelerator_config.dispatch_batches, False),
        ):
            wrong += [] if found == needed else [f"{name} is {found}; allowed: {needed}"]
        if wrong:
            raise ValueError("\n".join(wrong))
        self.stream.seek(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Switches the optimizer at the first step of a stage."""
        progress = self.stream.plan.progress(state.global_step)
        if progress.stage_step == 0 and state.global_step > 0:
            switch_optimizer(optimizer, self.stream.plan.stages[progress.stage_index])


def only_batch(batches: list[Batch]) -> Batch:
    """Returns the one batch of a list; a data collator for a stream, whose items are batches already."""
    (batch,) = batches
    return batch


def make_scheduler(optimizer: torch.optim.Optimizer, plan: StagePlan) -> torch.optim.lr_scheduler.LambdaLR:
    """Returns the plan's learning rates as a scheduler; the optimizer's own rate must be 1."""

    def rate(step: int) -> float:
        return learning_rate(plan, plan.consumed_tokens(plan.progress(min(step + 1, plan.steps))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def make_trainer(model: PreTrainedModel, stream: TokenStream, gradient_accumulation: int = 1, **arguments: Any) -> Trainer:
    """Returns a Trainer that follows the plan of a stream.

    Args:
        model: a causal language model.
        stream: the data.
        gradient_accumulation: micro-batches of a process in a step.
        arguments: further ones of `TrainingArguments`.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1.0, betas=(0.9, 0.95), fused=True)
    fixed = {
        "max_steps": stream.plan.steps,
        "gradient_accumulation_steps": gradient_accumulation,
        "per_device_train_batch_size": 1,
        "ignore_data_skip": True,
        "accelerator_config": {"dispatch_batches": False},
        "remove_unused_columns": False,
    }
    return Trainer(
        model=read_patches(model),
        args=TrainingArguments(**{**fixed, **arguments}),
        data_collator=only_batch,
        train_dataset=stream,
        callbacks=[Stages(stream)],
        optimizers=(optimizer, make_scheduler(optimizer, stream.plan)),
    )
