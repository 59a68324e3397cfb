"""A model split into pipeline ranks has the same loss and the same gradients as the full model."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.init import initialize
from tests.model.shapes import FAMILIES


@pytest.mark.parametrize("boundaries", [[0, 2, 4], [0, 1, 2, 3, 4], [0, 3, 4], [0, 1, 4]])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_one_after_another_are_the_model(family, boundaries):
    shape = FAMILIES[family]
    whole = GPTModel(shape)
    initialize(whole, shape, seed=3)
    parts = [GPTModel(shape, layers=range(first, last)) for first, last in itertools.pairwise(boundaries)]
    for part in parts:
        initialize(part, shape, seed=3)
    ids = torch.randint(0, shape.vocab_size, (2, 5, 3))
    labels = torch.randint(0, shape.vocab_size, (2, 5, 3))
    weights = torch.tensor([1.0, 0.5, 0.25])
    expected, _ = whole(ids, labels, weights)
    expected.backward()
    hidden = ids
    for part in parts[:-1]:
        hidden = part(hidden, None)
    loss, _ = parts[-1](hidden, labels, weights)
    loss.backward()
    assert torch.equal(loss, expected)
    gradients: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            gradients[name] = gradients[name] + parameter.grad if name in gradients else parameter.grad
    assert set(gradients) == {name for name, _ in whole.named_parameters()}
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-6, atol=1e-7)
    copies = [part.copied_parameters for part in parts]
    assert copies[-1] == ({"embedding.word.weight"} if shape.tie_embeddings else frozenset())
    assert not any(copies[:-1])
