"""Text out of a model, one token at a time at K = 1.

Two ways: with the keys and values of earlier positions kept, for a model of one's own; and by reading everything again, for whoever can
only ask for logits of a fixed shape, like an engine whose weights are sharded over ranks. Both choose tokens in the same way.
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
    """How a token is chosen.

    Args:
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_p: draw from the smallest set of tokens with this mass.
        top_k: draw from so many likeliest tokens; 0: from all.
        seed: of the draws, None for others each time. Row i of a batch draws with seed + i, whatever is beside it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def check(self) -> None:
        """Refuses settings out of range.

        Raises:
            ConfigError: naming all three.
        """
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigError(
                f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}",
                "a temperature from 0, top_p above 0 and up to 1, top_k from 0",
            )


class _Chooser:
    """Chooses tokens for the rows of a batch, each with its own generator."""

    def __init__(self, sampling: Sampling, rows: int, device: torch.device) -> None:
        sampling.check()
        self._sampling = sampling
        seeds = [torch.seed() if sampling.seed is None else sampling.seed + row for row in range(rows)]
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds] if sampling.temperature > 0 else []

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, V] to one id a row."""
        sampling = self._sampling
        if sampling.temperature == 0.0:
            return logits.argmax(dim=-1)
        ordered, ids = logits.float().sort(dim=-1, descending=True, stable=True)
        if sampling.top_k:
            ordered, ids = ordered[:, : sampling.top_k], ids[:, : sampling.top_k]
        # Shifted before the division: the smallest temperatures would make infinities of the likeliest tokens too.
        probabilities = torch.softmax((ordered - ordered[:, :1]) / sampling.temperature, dim=-1)
        outside = probabilities.cumsum(dim=-1) - probabilities >= sampling.top_p
        probabilities = probabilities.masked_fill(outside, 0.0)
        drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, self._generators, strict=True)]
        return ids.gather(-1, torch.stack(drawn)).squeeze(-1)


def check_prompts(prompts: Sequence[Sequence[int]], new_tokens: int, learned_positions: int | None) -> int:
    """Whether prompts can be continued.

    Args:
        prompts: ids.
        new_tokens: how many will be added.
        learned_positions: how many positions the model has; None: any number.

    Returns:
        The longest prompt's length.

    Raises:
        ConfigError: an empty prompt, or more tokens than positions.
    """
    if not prompts or min(len(prompt) for prompt in prompts) == 0:
        raise ConfigError("an empty prompt", "at least one token", "start with the end-of-document token")
    longest = max(len(prompt) for prompt in prompts)
    if learned_positions is not None and longest + new_tokens > learned_positions:
        raise ConfigError(f"{longest + new_tokens} tokens for a model with {learned_positions} learned positions", "fewer tokens")
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
    """Continues prompts, which may have different lengths; each as if it were alone.

    Args:
        model: any stage's weights; they are read at K = 1.
        prompts: ids.
        max_new_tokens: how many to add at most.
        sampling: how tokens are chosen.
        eod_id: ends a row; generation stops when every row has ended.
        on_token: is called with each step's ids, one a row.
        ends: whether a row's new ids are at an end.

    Returns:
        The new ids of each prompt, up to its end, which is included.

    Raises:
        ConfigError: an empty prompt, more positions than the model has learned, or settings out of range.
    """
    learned = model.shape.max_positions if model.shape.position_embedding == "learned" else None
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
def generate_by_rereading(
    logits: Callable[[torch.Tensor], torch.Tensor],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    sampling: Sampling,
    eod_id: int | None,
    device: torch.device,
    learned_positions: int | None = None,
) -> list[list[int]]:
    """Continues prompts by asking for all logits again for each token, always `new_tokens` times and always of one shape.

    So ranks that must all take part ask equally often whatever they draw, and a compiled model is compiled once.

    Args:
        logits: int64 [B, T] to [B, T, V].
        prompts: ids.
        new_tokens: how many to add.
        sampling: how tokens are chosen.
        eod_id: ends a row.
        device: of the ids.
        learned_positions: how many positions the model has; None: any number.

    Returns:
        As `generate`.

    Raises:
        ConfigError: as `generate`.
    """
    longest = check_prompts(prompts, new_tokens, learned_positions)
    choose = _Chooser(sampling, len(prompts), device)
    ids = torch.zeros(len(prompts), longest + new_tokens, dtype=torch.int64, device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
    rows = torch.arange(len(prompts), device=device)
    for step in range(new_tokens):
        # What stands behind a row's last token has no influence on it.
        last = lengths + step - 1
        ids[rows, last + 1] = choose(logits(ids)[rows, last])
    result = []
    for row, prompt in enumerate(prompts):
        new = ids[row, len(prompt) : len(prompt) + new_tokens].tolist()
        result.append(new[: new.index(eod_id) + 1] if eod_id in new else new)
    return result
