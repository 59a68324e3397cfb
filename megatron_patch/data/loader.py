"""Loads this rank's micro-batches of each step, which a thread prepares in advance.

In: the stream, a stage, this rank. Out: lists of micro-batches. Let G be the global batch, R the data-parallel ranks and m the micro-batch
size. Step n reads the samples `[n·G, (n + 1)·G)` of the stage; micro-batch i of rank r has the samples `n·G + i·m·R + r·m + [0, m)`. If
m·R does not divide G, micro-batches are padded with samples that are not scored. So every rank has the same number of micro-batches, and
every sample is read once on any number of ranks.

With a context-parallel size of c, groups of c data-parallel ranks read the same samples. R is then the number of groups and r a group, and
each rank keeps its part of the positions.
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
from megatron_patch.data.corpus import check_token_ids
from megatron_patch.data.storage import is_address
from megatron_patch.data.token_stream import TokenSpan, TrainStream


@dataclass
class LoadingTimes:
    """How the time for preparing batches is spent, in seconds since the loader was made.

    Args:
        preparing: total time for preparing batches.
        cpu_seconds: CPU time of the thread during that time.
        reading: the part of that time spent reading files.
        prefetching: whether batches are prepared in advance.
        remote: whether data is read from an address.
    """

    preparing: float = 0.0
    cpu_seconds: float = 0.0
    reading: float = 0.0
    prefetching: bool = True
    remote: bool = False

    def bottleneck(self) -> str:
        """Returns a sentence on why training waits for data and what to do."""
        waiting = max(0.0, self.preparing - self.cpu_seconds)
        if waiting > self.preparing / 2 and self.reading > self.preparing / 2:
            if self.remote:
                return (
                    "data is fetched over the network for the first time: copy it to this machine, or share a MEGATRON_PATCH_CACHE folder"
                )
            return "the disk or the network file system is slow: move the data to a faster one"
        if waiting > self.preparing / 2:
            return "the loader waits for a free CPU core: leave one core free for each rank, or lower OMP_NUM_THREADS"
        if not self.prefetching:
            return "batches are not prepared in advance: use --num-workers 2"
        return "preparing a batch takes longer than training on it: the steps are very short, or the CPU is slow"


class PatchLoader:
    """The micro-batches of one stage on one rank.

    Args:
        stream: the training stream, which maps samples to tokens.
        stage_index: index of the stage.
        data_parallel_rank: this rank.
        data_parallel_size: number of ranks that share a global batch, a multiple of the stage's context-parallel size.
        masking: how documents are separated.
        start_step: first step of the stage to load.
        prefetch: number of steps that are prepared in advance; 0 prepares each step in `next_step`.
        vocab_size: all token ids must be below this; None: they are not checked.
        pin_memory: whether tensors are page-locked, so that copies to a GPU overlap with compute.
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
        parts = self._stage.context_parallel_size
        self._rank, self._part = divmod(data_parallel_rank, parts)
        self._ranks = self._stage.sample_ranks(data_parallel_size)
        self._masking, self._vocab_size, self._pin_memory = masking, vocab_size, pin_memory
        self.step = start_step
        remote = any(is_address(prefix) for corpus in stream.corpora for prefix in corpus.prefixes)
        self.times = LoadingTimes(prefetching=prefetch > 0, remote=remote)
        self._queue: queue.Queue[list[PatchBatch] | Exception | None] | None = None
        self._failure: Exception | None = None
        self._stopping = threading.Event()
        # The thread page-locks memory, and its current device would otherwise be the first GPU instead of this rank's.
        self._device = torch.cuda.current_device() if pin_memory else None
        if prefetch > 0:
            self._queue = queue.Queue(maxsize=prefetch)
            self._thread = threading.Thread(target=self._fill, args=(self._prepare_from(start_step),), daemon=True, name="loader")
            self._thread.start()

    def next_step(self) -> list[PatchBatch]:
        """Returns this rank's micro-batches of the next step.

        Raises:
            DataError: a token id is outside the vocabulary, or the data cannot be read; every later call raises it again.
            StopIteration: the stage has ended.
            RuntimeError: the loader is closed.
        """
        if self._stopping.is_set():
            raise RuntimeError("next_step() was called on a closed loader")
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
        """Ends the thread that prepares batches."""
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
        """Puts steps into the queue until the stage ends (None), a step fails (its error), or the loader is closed."""
        assert self._queue is not None
        item: list[PatchBatch] | Exception | None
        while not self._stopping.is_set():
            try:
                item = next(steps, None)
            except Exception as error:  # passed to the training thread, which raises it
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
        batches = self._micro_batches(step)
        self.times.preparing += time.perf_counter() - began
        self.times.cpu_seconds += time.thread_time() - worked
        return batches

    def _micro_batches(self, step: int) -> list[PatchBatch]:
        """Returns this rank's micro-batches of a step."""
        stage, m = self._stage, self._stage.micro_batch_size
        begin, end = step * stage.global_batch_size, (step + 1) * stage.global_batch_size
        count = stage.gradient_accumulation(self._ranks * stage.context_parallel_size)
        samples = begin + np.arange(count)[:, None] * (m * self._ranks) + self._rank * m + np.arange(m)[None, :]
        real = samples < end
        corpora, starts = self._stream.locate(self._stage_index, samples[real])
        began = time.perf_counter()
        for corpus in np.unique(corpora).tolist():
            self._stream.corpora[corpus].fetch(starts[corpora == corpus], stage.sample_tokens + stage.patch_size)
        self.times.reading += time.perf_counter() - began
        batches = []
        used = 0
        for row in range(count):
            scored = int(real[row].sum())
            part = slice(used, used + scored)
            used += scored
            spans = tuple(
                TokenSpan(int(corpus), int(start), stage.sample_tokens) for corpus, start in zip(corpora[part], starts[part], strict=True)
            )
            batches.append(self._micro_batch(spans, scored))
        return batches

    def _micro_batch(self, spans: tuple[TokenSpan, ...], scored: int) -> PatchBatch:
        """Reads the samples of one micro-batch, of which the first `scored` are real and the others padding."""
        stage = self._stage
        tokens = np.zeros((stage.micro_batch_size, stage.sample_tokens + stage.patch_size), dtype=np.int64)
        began = time.perf_counter()
        for row, span in enumerate(spans):
            self._stream.corpora[span.corpus].read_into(tokens[row], span.start)
        self.times.reading += time.perf_counter() - began
        if self._vocab_size is not None:
            check_token_ids(tokens, self._vocab_size, [(self._stream.corpora[span.corpus], span.start) for span in spans])
        batch = make_batch(
            tokens,
            stage.side,
            stage.positions,
            stage.patch_size,
            self._masking,
            spans,
            scored_rows=scored if scored < stage.micro_batch_size else None,
        ).part(self._part, stage.context_parallel_size)
        return _pinned(batch) if self._pin_memory else batch


def _pinned(batch: PatchBatch) -> PatchBatch:
    """Returns a copy of the batch in page-locked memory."""
    position_ids = None if batch.position_ids is None else batch.position_ids.pin_memory()
    documents = None if batch.documents is None else batch.documents.pin_memory()
    inputs, labels = batch.input_ids.pin_memory(), batch.labels.pin_memory()
    return batch._replace(input_ids=inputs, labels=labels, position_ids=position_ids, documents=documents)
