"""Texts that the model writes while it trains: SAVE/samples.jsonl and the screen, with every evaluation.

In: prompts, and the engine's logits at K = 1, for which all ranks are needed; so this listener lives on all of them. Out: one line a prompt
and evaluation, from rank 0. The seed is the same each time: what changes between two evaluations is the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console as RichConsole
from rich.markup import escape

from megatron_patch.model.generate import Sampling, check_prompts, generate_by_rereading
from megatron_patch.tokenizers.base import Tokenizer, encode
from megatron_patch.training.callbacks.base import Callback, EvaluationRecord, RunStart
from megatron_patch.training.callbacks.jsonl_writer import JsonlWriter
from megatron_patch.training.callbacks.metrics import truncate

_SHOWN = 400


@dataclass(frozen=True)
class SampleRequest:
    """What to write.

    Args:
        prompts: beginnings; an empty one is the start of a document.
        new_tokens: length of each continuation.
        sampling: how tokens are chosen.
        learned_positions: how many positions the model has; None: any number.
    """

    prompts: tuple[str, ...]
    new_tokens: int
    sampling: Sampling
    learned_positions: int | None = None


class Samples(Callback):
    """Writes samples.

    Args:
        logits: int64 [B, T] to [B, T, V], called by all ranks equally often.
        tokenizer: of the data.
        request: what to write.
        device: of the ids.
        path: of the file, or None.
        console: where to, on rank 0; None elsewhere.

    Raises:
        ConfigError: an empty prompt for a tokenizer without end of document, or more tokens than the model has positions.
    """

    def __init__(
        self,
        logits: Callable[[torch.Tensor], torch.Tensor],
        tokenizer: Tokenizer,
        request: SampleRequest,
        device: torch.device,
        path: Path | None,
        console: RichConsole | None,
    ) -> None:
        self._logits, self._tokenizer, self._request, self._device = logits, tokenizer, request, device
        self._path, self._console = path, console
        self._lines = JsonlWriter(path) if path is not None else None
        eod = [] if tokenizer.eod_id is None else [tokenizer.eod_id]
        self._ids = [encode(tokenizer, prompt) or eod for prompt in request.prompts]
        check_prompts(self._ids, request.new_tokens, request.learned_positions)

    def on_start(self, record: RunStart) -> None:
        """Drops what will be written again."""
        if self._console is not None and self._path is not None:
            truncate(self._path, record.step)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Continues every prompt."""
        request, eod = self._request, self._tokenizer.eod_id
        began = time.perf_counter()
        rows = generate_by_rereading(
            self._logits, self._ids, request.new_tokens, request.sampling, eod, self._device, request.learned_positions
        )
        if self._console is None:
            return
        texts = [self._tokenizer.decode(row[:-1] if row[-1] == eod else row) for row in rows]
        for prompt, text in zip(request.prompts, texts, strict=True):
            shown = " ".join(f"{prompt}{text}".split())
            self._console.print(f"{record.step:>8,} [bold]sample[/bold]: {escape(shown[:_SHOWN])}")
        self._write(record, texts, [len(row) for row in rows], time.perf_counter() - began)

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
