"""Text out of a model: one token at a time at K = 1, with the keys and values of earlier positions kept."""

from __future__ import annotations

import torch

from megatron_patch.errors import ConfigError
from megatron_patch.model.attention import ModelCache
from megatron_patch.model.gpt import GPTModel


def _choose(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> torch.Tensor:
    """One id a row of [B, V]: the likeliest at temperature 0, else a draw from the smallest set of ids with mass `top_p`."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    # Shifted before the division: the smallest temperatures would make infinities of the likeliest tokens too.
    probabilities = torch.softmax((logits - logits.max(dim=-1, keepdim=True).values) / temperature, dim=-1)
    ordered, ids = probabilities.sort(dim=-1, descending=True)
    outside = ordered.cumsum(dim=-1) - ordered >= top_p
    drawn = torch.multinomial(ordered.masked_fill(outside, 0.0), 1, generator=generator)
    return ids.gather(-1, drawn).squeeze(-1)


@torch.no_grad()
def generate(
    model: GPTModel,
    prompt_ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eod_id: int | None = None,
    seed: int | None = None,
) -> torch.Tensor:
    """Continues prompts.

    Args:
        model: any stage's weights; they are read at K = 1.
        prompt_ids: int64 [B, T], T from 1.
        max_new_tokens: how many to add at most.
        temperature: 0 takes the likeliest token.
        top_p: probability mass to draw from.
        eod_id: stop when every row has ended with it; later tokens of a row repeat it.
        seed: of the draws.

    Returns:
        int64 [B, T + new].

    Raises:
        ConfigError: an empty prompt, more positions than the model has learned, or settings out of range.
    """
    if prompt_ids.shape[-1] == 0:
        raise ConfigError("an empty prompt", "at least one token", "start with the end-of-document token")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ConfigError(f"temperature {temperature}, top_p {top_p}", "a temperature from 0, top_p above 0 and up to 1")
    longest = prompt_ids.shape[1] + max_new_tokens
    if model.shape.position_embedding == "learned" and longest > model.shape.max_positions:
        raise ConfigError(f"{longest} tokens for a model with {model.shape.max_positions} learned positions", "fewer tokens")
    generator = None if seed is None else torch.Generator(prompt_ids.device).manual_seed(seed)
    cache = ModelCache()
    ids, new = prompt_ids, prompt_ids
    ended = torch.zeros(prompt_ids.shape[0], dtype=torch.bool, device=prompt_ids.device)
    for _ in range(max_new_tokens):
        chosen = _choose(model.logits(new[..., None], cache=cache)[:, -1], temperature, top_p, generator)
        if eod_id is not None:
            chosen = torch.where(ended, torch.full_like(chosen, eod_id), chosen)
            ended |= chosen == eod_id
        new = chosen[:, None]
        ids = torch.cat((ids, new), dim=1)
        if eod_id is not None and bool(ended.all()):
            break
    return ids
