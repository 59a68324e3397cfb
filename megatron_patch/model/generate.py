"""Generates tokens one at a time, at K = 1.

`generate` keeps the keys and values of earlier positions. `generate_without_cache` computes the logits of all positions again for each
token; it works with any function of a fixed input shape, such as an engine whose weights are sharded over ranks. Both choose tokens the
same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_patch.errors import ConfigError
from megatron_patch.model.attention import ModelCache
from megatron_patch.model.inference_model import InferenceModel


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: divisor of the logits; 0 chooses the most likely token.
        top_p: sample from the smallest set of tokens with this probability mass.
        top_k: sample from this number of most likely tokens; 0: from all.
        seed: seed of the sampling; row i of a batch samples with seed + i, independently of the other rows. None: a new seed each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def check(self) -> None:
        """Checks that the settings are in range.

        Raises:
            ConfigError: one is not.
        """
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigError(
                f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}",
                "a temperature of at least 0, a top_p above 0 and at most 1, a top_k of at least 0",
                "change the setting that is out of range",
            )


class _Chooser:
    """Chooses tokens for the rows of a batch, each with its own generator."""

    def __init__(self, sampling: Sampling, rows: int, device: torch.device) -> None:
        sampling.check()
        self._sampling = sampling
        seeds = [torch.seed() if sampling.seed is None else sampling.seed + row for row in range(rows)]
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds] if sampling.temperature > 0 else []

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns one token id for each row of logits [B, V]."""
        sampling = self._sampling
        if sampling.temperature == 0.0:
            return logits.argmax(dim=-1)
        ordered, ids = logits.float().sort(dim=-1, descending=True, stable=True)
        if sampling.top_k:
            ordered, ids = ordered[:, : sampling.top_k], ids[:, : sampling.top_k]
        # Subtracts the maximum before the division, because a tiny temperature would turn the largest logits into infinities.
        probabilities = torch.softmax((ordered - ordered[:, :1]) / sampling.temperature, dim=-1)
        outside = probabilities.cumsum(dim=-1) - probabilities >= sampling.top_p
        probabilities = probabilities.masked_fill(outside, 0.0)
        drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, self._generators, strict=True)]
        return ids.gather(-1, torch.stack(drawn)).squeeze(-1)


def check_prompts(prompts: Sequence[Sequence[int]], new_tokens: int, learned_positions: int | None) -> int:
    """Checks that prompts can be continued.

    Args:
        prompts: token ids of each prompt.
        new_tokens: number of tokens to add.
        learned_positions: number of learned positions of the model; None: rotary positions, without a limit.

    Returns:
        The length of the longest prompt.

    Raises:
        ConfigError: there is no prompt, a prompt is empty, or there are more tokens than learned positions.
    """
    if not prompts or min(len(prompt) for prompt in prompts) == 0:
        raise ConfigError("a prompt is empty", "prompts of at least 1 token", "start with the end-of-document token")
    longest = max(len(prompt) for prompt in prompts)
    if learned_positions is not None and longest + new_tokens > learned_positions:
        raise ConfigError(
            f"prompt and continuation have {longest + new_tokens} tokens, but the model has {learned_positions} learned positions",
            f"at most {learned_positions} tokens",
            "shorten the prompt, or generate fewer tokens",
        )
    return longest


@torch.no_grad()
def generate(
    model: InferenceModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    eod_id: int | None = None,
    on_token: Callable[[list[int]], None] | None = None,
    ends: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continues prompts, which can have different lengths; the other prompts of the batch do not influence a continuation.

    Args:
        model: the model, which generates at K = 1 whatever stage it was trained in.
        prompts: token ids of each prompt.
        max_new_tokens: largest number of tokens to add.
        sampling: how tokens are chosen.
        eod_id: id of the end-of-document token, which ends a row; generation stops when all rows have ended.
        on_token: called after each step with the new ids, one for each row.
        ends: called with the new ids of a row; returns whether the row has ended.

    Returns:
        The new ids of each prompt, including the token that ended it.

    Raises:
        ConfigError: an empty prompt, more tokens than learned positions, or settings out of range.
    """
    learned = model.shape.learned_positions
    longest = check_prompts(prompts, max_new_tokens, learned)
    device = model.device
    choose = _Chooser(sampling, len(prompts), device)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    cache = ModelCache(padding=padding if bool(padding.any()) else None)
    new = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], dtype=torch.int64, device=device)
    rows: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for _ in range(max_new_tokens):
        chosen = choose(model.logits(new[..., None], cache=cache, last_only=True)[:, -1])
        ids = [int(token) for token in chosen]
        for row, token in enumerate(ids):
            if not ended[row]:
                rows[row].append(token)
                ended[row] = token == eod_id or (ends is not None and ends(rows[row]))
        if on_token is not None:
            on_token(ids)
        if all(ended):
            break
        new = chosen[:, None]
    return rows


@torch.no_grad()
def generate_without_cache(
    logits: Callable[[torch.Tensor], torch.Tensor],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    sampling: Sampling,
    eod_id: int | None,
    device: torch.device,
    learned_positions: int | None = None,
) -> list[list[int]]:
    """Continues prompts by computing the logits of all positions for each new token.

    `logits` is called exactly `new_tokens` times with inputs of one shape, so that all ranks make the same number of calls whatever they
    sample, and a compiled model is compiled once.

    Args:
        logits: maps int64 [B, T] to logits [B, T, V].
        prompts: token ids of each prompt.
        new_tokens: number of tokens to add.
        sampling: how tokens are chosen.
        eod_id: id of the end-of-document token, which ends a row.
        device: device of the ids.
        learned_positions: number of learned positions of the model; None: rotary positions, without a limit.

    Returns:
        The new ids of each prompt, including the token that ended it.

    Raises:
        ConfigError: an empty prompt, more tokens than learned positions, or settings out of range.
    """
    longest = check_prompts(prompts, new_tokens, learned_positions)
    choose = _Chooser(sampling, len(prompts), device)
    ids = torch.zeros(len(prompts), longest + new_tokens, dtype=torch.int64, device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
    rows = torch.arange(len(prompts), device=device)
    for step in range(new_tokens):
        # Attention is causal: the positions after a row's last token do not influence its logits.
        last = lengths + step - 1
        ids[rows, last + 1] = choose(logits(ids)[rows, last])
    result = []
    for row, prompt in enumerate(prompts):
        new = ids[row, len(prompt) : len(prompt) + new_tokens].tolist()
        result.append(new[: new.index(eod_id) + 1] if eod_id in new else new)
    return result
