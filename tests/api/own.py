"""Optimizers and models of a user: some that work, and some that do what the program must refuse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.parameters import parameters_of_layers


def radam(groups):
    return torch.optim.RAdam(groups)


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def nadam(groups):
    return torch.optim.NAdam(groups)


def adagrad(groups):
    return torch.optim.Adagrad(groups, initial_accumulator_value=0.1)


def first_group(groups):
    return torch.optim.AdamW(groups[:1])


def other_weights(groups):
    return torch.optim.AdamW([nn.Parameter(torch.zeros(2))])


def nothing(groups):
    return None


class ByNorm(torch.optim.Adam):
    """Has the state of Adam, but its step depends on the norm of the whole weight, as in LAMB."""

    def step(self, closure=None):
        super().step()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(1 - 1e-2 / (1 + parameter.norm()))


class FeedForwardOnly(nn.Module):
    """A module written from nothing: the program's parameters by name, no attention, a buffer that is computed."""

    def __init__(self, shape, more=None, means=False):
        super().__init__()
        self.layers, self.vocab_size, self.means = shape.num_layers, shape.vocab_size, means
        for name, size in {**parameters_of_layers(shape), **(more or {})}.items():
            *path, leaf = name.split(".")
            at = self
            for part in path:
                if part not in at._modules:
                    at.add_module(part, nn.Module())
                at = at._modules[part]
            at.register_parameter(leaf, nn.Parameter(torch.empty(size)))
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, inputs, labels, label_weights=None, position_ids=None, documents=None):
        weights = dict(self.named_parameters())
        hidden = F.embedding(inputs, weights["embedding.word.weight"]).mean(dim=2)
        unused = sum(weight.sum() for name, weight in weights.items() if "attention" in name or "norm" in name)
        for number in range(self.layers):
            gate, up, down = (weights[f"blocks.{number}.feed_forward.{name}.weight"] for name in ("gate", "up", "down"))
            hidden = hidden + self.scale * F.linear(F.silu(F.linear(hidden, gate)) * F.linear(hidden, up), down)
        logits = F.linear(F.rms_norm(hidden, hidden.shape[-1:]), weights["head.weight"])[..., : self.vocab_size].float() + 0 * unused
        if labels is None:
            return logits
        scored = (labels >= 0).float() * (1.0 if label_weights is None else label_weights)
        losses = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)) * scored
        return (losses.mean(), scored.mean()) if self.means else (losses.sum(), scored.sum())


def feed_forward_only(shape, parallel):
    return FeedForwardOnly(shape)


def means(shape, parallel):
    return FeedForwardOnly(shape, means=True)


def other_parameters(shape, parallel):
    model = FeedForwardOnly(shape, more={"router.weight": (3, 4)})
    model.head.weight = nn.Parameter(torch.zeros(3, 4))
    del model.final_norm
    model.embedding.word.weight.requires_grad_(False)
    return model


def stored_buffer(shape, parallel):
    model = FeedForwardOnly(shape)
    model.register_buffer("average", torch.zeros(2))
    return model


def detached(shape, parallel):
    model = GPTModel(shape, parallel=parallel)
    model.register_forward_hook(lambda layer, inputs, output: (output[0].detach(), output[1]))
    return model


def no_module(shape, parallel):
    return shape


def same_model(shape, parallel):
    """The program's own model, changed in nothing."""
    return GPTModel(shape, parallel=parallel)


same_model.tensor_parallel = True
