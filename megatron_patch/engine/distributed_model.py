"""Inference with a model that several ranks hold together, by tensor and pipeline parallelism.

In: this rank's part of a model. Out: losses and logits, the same on every rank of a replica; all ranks of the replica must make the same
calls in the same order. It cannot train and needs no DeepSpeed engine, so its memory is that of the weights. Pipeline ranks work one
after another, so tensor parallelism is faster.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_patch.model.attention import ModelCache
from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.shape import ModelShape
from megatron_patch.parallel.groups import Groups


class DistributedModel:
    """A full model with the interface of `megatron_patch.model.inference_model.InferenceModel`.

    Args:
        part: this rank's layers, in evaluation mode, on its device.
        groups: this rank's coordinates and process groups.
    """

    def __init__(self, part: GPTModel, groups: Groups) -> None:
        self._part, self._groups = part, groups
        self.shape: ModelShape = part.shape
        self._dtype = next(part.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self._part.device

    def __call__(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (sum of losses, sum of weights) over the labels of a batch; see `InferenceModel`."""
        result = self._part(self._receive(inputs), labels)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        if self._part.is_last:
            sums = torch.stack([part.double() for part in result])
        else:
            self._send(result)
        loss_sum, weight_sum = self._broadcast_from_last(sums)
        return loss_sum, weight_sum

    def logits(self, input_ids: torch.Tensor, *, cache: ModelCache | None = None, last_only: bool = False) -> torch.Tensor:
        """Returns the logits at K = 1, float32 with several pipeline ranks; see `InferenceModel`."""
        result = self._part.logits(self._receive(input_ids), cache=cache, last_only=last_only)
        if self._groups.pipeline is None:
            return result
        if not self._part.is_last:
            self._send(result)
            positions = 1 if last_only else input_ids.shape[1]
            result = torch.empty(input_ids.shape[0], positions, self.shape.vocab_size, device=self.device)
        return self._broadcast_from_last(result.float().contiguous())

    def _receive(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the input of this rank's layers: on the first pipeline rank the token ids, else the previous rank's hidden states."""
        if self._part.is_first:
            return inputs
        hidden = torch.empty(*inputs.shape[:2], self.shape.hidden_size, dtype=self._dtype, device=self.device)
        dist.recv(hidden, group=self._groups.pipeline, group_src=self._groups.grid.pipeline_parallel_rank - 1)
        return hidden

    def _send(self, hidden: torch.Tensor) -> None:
        dist.send(hidden.contiguous(), group=self._groups.pipeline, group_dst=self._groups.grid.pipeline_parallel_rank + 1)

    def _broadcast_from_last(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrites the tensor with that of the last pipeline rank and returns it."""
        if self._groups.pipeline is not None:
            dist.broadcast(tensor, group=self._groups.pipeline, group_src=self._groups.grid.pipeline_parallel_size - 1)
        return tensor
