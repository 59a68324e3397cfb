"""torchtitan's own Trainer on the CPU, one process: a program that tests start, because it changes what torch says about devices.

torchtitan supports GPUs only: its Trainer sets the device of `torch.cuda`, and its memory monitor asks that for a name and a size. So torch
is made to say that the CPU is its accelerator, and the monitor's numbers are zero; all else is torchtitan's code.

python -m tests.examples.titan FOLDER TRAIN_STEPS

Prints a line of JSON for each step: patch size, loss, learning rate, a hash of the inputs.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

import torch


def pretend() -> None:
    torch._utils._get_available_device_type = lambda: "cpu"
    for name, answer in {
        "get_device_name": "none", "get_device_properties": SimpleNamespace(total_memory=1), "memory_stats": {}, "memory_allocated": 0,
        "reset_peak_memory_stats": None, "empty_cache": None,
    }.items():  # fmt: skip
        setattr(torch.cpu, name, lambda *_, answer=answer: answer)


def dense_loss(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed loss by plain formulas: torchtitan's model reads embeddings where it has no table, as a later pipeline stage."""
    table, model.tok_embeddings = model.tok_embeddings, None
    with torch.no_grad():
        log_p = torch.log_softmax(model(table.weight[ids].mean(dim=2)), dim=-1)
    model.tok_embeddings = table
    return -log_p.gather(2, labels).sum()


def main(folder: str, steps: int) -> None:
    pretend()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "29599")
    import torchtitan.distributed.utils
    from torchtitan.config import ConfigManager
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.protocols.train_spec import register_train_spec

    from examples.integrations import plain_loop, with_torchtitan
    from megatron_patch.library import learning_rate
    from tests.examples.sizes import plain_plan

    torchtitan.distributed.utils.set_pg_timeouts = lambda **_: None  # its barrier names a GPU
    plan = plain_plan(gradient_accumulation=4)
    spec = with_torchtitan.make_spec(plan, plain_loop.library_source(2 * plan.tokens), vocab_size=256)
    spec.model_args = {"tiny": TransformerModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=256, multiple_of=64)}
    spec.state_dict_adapter = None
    register_train_spec("llama3_patches", spec)
    words = f"--model.name llama3_patches --model.flavor tiny --training.steps {plan.steps} --training.seq_len {plain_loop.POSITIONS}"
    words += " --training.local_batch_size 8 --training.global_batch_size 32 --optimizer.lr 1 --metrics.log_freq 1 --debug.seed 0"
    words += f" --training.mixed_precision_param float32 --job.dump_folder {folder} --checkpoint.enable --checkpoint.interval 1000"
    words += " --checkpoint.folder saved --checkpoint.no_last_save_model_only"
    trainer = with_torchtitan.PatchTrainer(ConfigManager().parse_args(words.split()))
    trainer.should_continue_training = lambda: trainer.step < steps
    seen: list[int] = []
    inner = trainer.forward_backward_step

    def forward_backward_step(*, input_dict, **others):
        ids = input_dict["input"]
        seen.append(hash(tuple(ids.flatten().tolist())))
        expected = dense_loss(trainer.model_parts[0], ids, others["labels"]) / others["global_valid_tokens"]
        loss = inner(input_dict=input_dict, **others)
        assert abs(loss.item() / expected.item() - 1) < 1e-5, (loss.item(), expected.item())
        return loss

    def log(step, mean, largest, norm, extra_metrics):
        size = plan.stages[plan.progress(step - 1).stage_index].patch_size
        print("RECORD", json.dumps([step, size, float(mean), extra_metrics["lr"], seen[-4:]]), flush=True)
        assert abs(extra_metrics["lr"] - learning_rate(plan, plan.consumed_tokens(plan.progress(step)))) < 1e-12

    trainer.forward_backward_step, trainer.metrics_processor.log = forward_backward_step, log
    trainer.train()
    trainer.checkpointer.save(trainer.step, last_step=True)
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
