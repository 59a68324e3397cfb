"""Generates text from prompts at every evaluation, for the console and SAVE/samples.jsonl.

In: prompts, and the engine's logits at K = 1. Out: one line for each prompt and evaluation, written by rank 0. Every rank has this
callback, because all ranks compute the logits. The seed is the same at each evaluation, so that only the weights change the text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_patch.model.generate import Sampling, check_prompts, generate_without_cache
from megatron_patch.tokenizers.base import Tokenizer, prompt_ids, without_eod
from megatron_patch.training.callbacks.base import Callback, EvaluationRecord
from megatron_patch.training.callbacks.jsonl_writer import JsonlWriter

ShowSamples = Callable[[int, Sequence[str], float], None]
"""Shows texts that were generated after a step: its number, each prompt with its continuation, and the seconds that they took."""


@dataclass(frozen=True)
class SampleRequest:
    """What to generate.

    Args:
        prompts: texts to continue; an empty one starts a document.
        new_tokens: number of tokens to generate for each prompt.
        sampling: how tokens are chosen.
        learned_positions: number of positions of a model with learned position embeddings; None: no limit.
    """

    prompts: tuple[str, ...]
    new_tokens: int
    sampling: Sampling
    learned_positions: int | None = None


class Samples(Callback):
    """Generates samples at each evaluation.

    Args:
        logits: int64 token ids [B, T] to logits [B, T, V]; every rank must call it equally often.
        tokenizer: tokenizer of the training data.
        request: what to generate.
        device: device of the token ids.
        path: path of samples.jsonl, or None.
        show: shows the texts; None on other ranks than 0.

    Raises:
        ConfigError: a prompt is empty and the tokenizer has no end-of-document token, or the model has too few positions.
    """

    def __init__(
        self,
        logits: Callable[[torch.Tensor], torch.Tensor],
        tokenizer: Tokenizer,
        request: SampleRequest,
        device: torch.device,
        path: Path | None,
        show: ShowSamples | None,
    ) -> None:
        self._logits, self._tokenizer, self._request, self._device = logits, tokenizer, request, device
        self._show = show
        self._lines = JsonlWriter(path) if path is not None else None
        self._ids = [prompt_ids(tokenizer, prompt) for prompt in request.prompts]
        check_prompts(self._ids, request.new_tokens, request.learned_positions)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Continues every prompt; rank 0 prints and writes the texts."""
        request, eod = self._request, self._tokenizer.eod_id
        began = time.perf_counter()
        rows = generate_without_cache(
            self._logits, self._ids, request.new_tokens, request.sampling, eod, self._device, request.learned_positions
        )
        if self._show is None:
            return
        seconds = time.perf_counter() - began
        texts = [self._tokenizer.decode(without_eod(self._tokenizer, row)) for row in rows]
        self._show(record.step, [f"{prompt}{text}" for prompt, text in zip(request.prompts, texts, strict=True)], seconds)
        self._write(record, texts, [len(row) for row in rows], seconds)

    def _write(self, record: EvaluationRecord, texts: Sequence[str], tokens: Sequence[int], seconds: float) -> None:
        if self._lines is None:
            return
        for prompt, text, count in zip(self._request.prompts, texts, tokens, strict=True):
            line = {
                "type": "sample",
                "step": record.step,
                "stage": record.stage,
                "tokens": record.tokens,
                "prompt": prompt,
                "text": text,
                "new_tokens": count,
                "seconds": round(seconds, 3),
            }
            self._lines.add(line)

    def close(self) -> None:
        """Closes the file."""
        if self._lines is not None:
            self._lines.close()
