"""The loader: this rank's micro-batches of each step, prepared ahead by a thread.

In: the stream, a stage, this rank. Out: lists of micro-batches. In step n the global batch is samples `[n·G, (n + 1)·G)` of the stage;
micro-batch i of rank r takes samples `n·G + i·m·R + r·m + [0, m)`. Where the ranks' micro-batches do not divide G, the missing samples
are filled with unscored ones, so that every rank has the same number of micro-batches and every sample is read once on any layout.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatron_patch.data.collate import DocumentMasking, PatchBatch, make_batch
from megatron_patch.data.corpus import check_ids
from megatron_patch.data.storage import is_address
from megatron_patch.data.token_stream import Span, TrainStream


@dataclass
class LoadingTimes:
    """Where the time of preparing steps goes, in seconds.

    Args:
        preparing: in all.
        processor: of it, on a processor in this thread.
        reading: of it, reading files.
        ahead: steps are prepared ahead of the training.
        remote: files come from elsewhere.
    """

    preparing: float = 0.0
    processor: float = 0.0
    reading: float = 0.0
    ahead: bool = True
    remote: bool = False

    def cause(self) -> str:
        """Why the training waits for data, and what to do, as a sentence."""
        waiting = max(0.0, self.preparing - self.processor)
        if waiting > self.preparing / 2 and self.reading > self.preparing / 2:
            if self.remote:
                return "the data comes over the network, once: copy it here before, or share the folder MEGATRON_PATCH_CACHE"
            return "the disk or the network file system is slow: put the data on a faster one"
        if waiting > self.preparing / 2:
            return "the loader waits for a processor, which others have: leave one free for each rank, or lower OMP_NUM_THREADS"
        if not self.ahead:
            return "steps are prepared when they are asked for: use --num-workers 2"
        return "cutting samples into patches takes longer than training on them: steps are tiny, or this processor is slow"


class PatchLoader:
    """Micro-batches of one stage on one rank.

    Args:
        stream: where samples lie.
        stage_index: which stage.
        data_parallel_rank: this rank.
        data_parallel_size: ranks that share a global batch.
        masking: how documents are kept apart.
        start_step: the stage's first step to load.
        prefetch: steps prepared ahead; 0 prepares each when it is asked for.
        vocab_size: ids from here on are an error; None: not checked.
        pin_memory: page-locked tensors, for copies to a GPU that overlap with compute.
    """

    def __init__(
        self,
        stream: TrainStream,
        stage_index: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        masking: DocumentMasking,
        start_step: int = 0,
        prefetch: int = 2,
        vocab_size: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        self._stream, self._stage_index = stream, stage_index
        self._stage = stream.plan.stages[stage_index]
        self._rank, self._ranks = data_parallel_rank, data_parallel_size
        self._masking, self._vocab_size, self._pin_memory = masking, vocab_size, pin_memory
        self.step = start_step
        remote = any(is_address(prefix) for corpus in stream.corpora for prefix in corpus.prefixes)
        self.times = LoadingTimes(ahead=prefetch > 0, remote=remote)
        self._queue: queue.Queue[list[PatchBatch] | Exception | None] | None = None
        self._failure: Exception | None = None
        self._stopping = threading.Event()
        # Page-locking happens in the thread, whose current device would be the first GPU, and not this rank's.
        self._device = torch.cuda.current_device() if pin_memory else None
        if prefetch > 0:
            self._queue = queue.Queue(maxsize=prefetch)
            self._thread = threading.Thread(target=self._fill, args=(self._prepare_from(start_step),), daemon=True, name="loader")
            self._thread.start()

    def next_step(self) -> list[PatchBatch]:
        """The micro-batches of the next step.

        Raises:
            DataError: a token id outside the vocabulary, or tokens outside the file; every later call raises it again.
            StopIteration: the stage has ended.
            RuntimeError: the loader is closed.
        """
        if self._stopping.is_set():
            raise RuntimeError("next_step() of a loader that is closed")
        if self._failure is not None:
            raise self._failure
        if self.step >= self._stage.steps:
            raise StopIteration
        if self._queue is None:
            batches = self._prepare(self.step)
        else:
            item = self._queue.get()
            if isinstance(item, Exception):
                self._failure = item
                raise item
            assert item is not None
            batches = item
        self.step += 1
        return batches

    def close(self) -> None:
        """Ends the thread."""
        self._stopping.set()
        if self._queue is not None:
            while self._thread.is_alive():
                try:
                    self._queue.get_nowait()
                except queue.Empty:
                    self._thread.join(timeout=0.05)

    def _prepare_from(self, step: int) -> Iterator[list[PatchBatch]]:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        while step < self._stage.steps:
            yield self._prepare(step)
            step += 1

    def _fill(self, steps: Iterator[list[PatchBatch]]) -> None:
        assert self._queue is not None
        item: list[PatchBatch] | Exception | None
        while not self._stopping.is_set():
            try:
                item = next(steps, None)
            except Exception as error:  # handed to the training thread, which raises it
                item = error
            while not self._stopping.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if item is None or isinstance(item, Exception):
                return

    def _prepare(self, step: int) -> list[PatchBatch]:
        began, worked = time.perf_counter(), time.thread_time()
        batches = self._make(step)
        self.times.preparing += time.perf_counter() - began
        self.times.processor += time.thread_time() - worked
        return batches

    def _make(self, step: int) -> list[PatchBatch]:
        stage, m = self._stage, self._stage.micro_batch_size
        begin, end = step * stage.global_batch_size, (step + 1) * stage.global_batch_size
        count = stage.gradient_accumulation(self._ranks)
        samples = begin + np.arange(count)[:, None] * (m * self._ranks) + self._rank * m + np.arange(m)[None, :]
        real = samples < end
        corpora, starts = self._stream.locate(self._stage_index, samples[real])
        began = time.perf_counter()
        for corpus in np.unique(corpora).tolist():
            self._stream.corpora[corpus].fetch(starts[corpora == corpus], stage.sample_tokens + stage.patch_size)
        self.times.reading += time.perf_counter() - began
        batches = []
        taken = 0
        for row in range(count):
            scored = int(real[row].sum())
            places = slice(taken, taken + scored)
            taken += scored
            spans = tuple(
                Span(int(corpus), int(start), stage.sample_tokens) for corpus, start in zip(corpora[places], starts[places], strict=True)
            )
            batches.append(self._micro_batch(spans, scored))
        return batches

    def _micro_batch(self, spans: tuple[Span, ...], scored: int) -> PatchBatch:
        stage = self._stage
        tokens = np.zeros((stage.micro_batch_size, stage.sample_tokens + stage.patch_size), dtype=np.int64)
        began = time.perf_counter()
        for row, span in enumerate(spans):
            self._stream.corpora[span.corpus].read_into(tokens[row], span.start)
        self.times.reading += time.perf_counter() - began
        if self._vocab_size is not None:
            check_ids(tokens, self._vocab_size, [(self._stream.corpora[span.corpus], span.start) for span in spans])
        batch = make_batch(
            tokens,
            stage.side,
            stage.positions,
            stage.patch_size,
            self._masking,
            spans,
            scored_rows=scored if scored < stage.micro_batch_size else None,
        )
        return _pinned(batch) if self._pin_memory else batch


def _pinned(batch: PatchBatch) -> PatchBatch:
    """The same batch in page-locked memory."""

    def pin(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.pin_memory()

    return PatchBatch(
        batch.input_ids.pin_memory(), batch.labels.pin_memory(), pin(batch.position_ids), pin(batch.document_ids), batch.spans
    )
