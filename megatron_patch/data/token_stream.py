"""The stream that the stages share: which tokens are the n-th sample of a stage, by arithmetic alone.

In: the plan, corpora and weights, a seed. Out: spans of tokens. The journey of a sample number:

1. Its stage holds the blocks `[first_block, last_block)` of the order in which the corpus is dealt; within windows of blocks the
   samples are shuffled by a keyed permutation, so that a step does not hold neighbours of one document.
2. The block's number in the dealt order says, by the blend's table, from which corpus it comes and as which of that corpus' blocks.
3. That ordinal, modulo the corpus' number of blocks, is permuted with a key of (seed, corpus, epoch): the block in the file.

Nothing is built, stored or shared between ranks, whatever the size of the data, and the order depends on the seed, the data and the plan
alone. Because stages take consecutive blocks of one dealt order, every token of every block is an input exactly once an epoch, over all
stages together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_patch.data.blend import Blend
from megatron_patch.data.corpus import TokenCorpus, tokenizer_notes
from megatron_patch.data.permutation import Permutation, derive_key
from megatron_patch.errors import DataError
from megatron_patch.stages import StagePlan
from megatron_patch.utils.units import format_count

Weights = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Span:
    """The input tokens of one sample.

    Args:
        corpus: index of the corpus in `TrainStream.names`.
        start: first token in that corpus.
        length: input tokens (labels lie up to the stage's patch size beyond).
    """

    corpus: int
    start: int
    length: int


@dataclass(frozen=True)
class CorpusUsage:
    """What a stage reads of one corpus.

    Args:
        corpus: its name.
        tokens: read in the stage, in whole blocks.
        epochs: how often its training part is read in the stage.
        epochs_by_end: how often it has been read in all when the stage ends.
    """

    corpus: str
    tokens: int
    epochs: float
    epochs_by_end: float


@dataclass(frozen=True)
class _Deal:
    """How one stage draws blocks: its table, where in the table it begins, and what each corpus had given before the table began."""

    blend: Blend
    corpora: npt.NDArray[np.int64]
    phase: int
    taken: npt.NDArray[np.int64]


class TrainStream:
    """The training data of a plan.

    Args:
        plan: the stages.
        corpora: by name; the order decides `Span.corpus`.
        blend: (name, weight) for stages without a blend of their own.
        split: which part of each corpus is for training.
        seed: of the order.
        window_blocks: blocks whose samples are shuffled together.
        skip_blocks: blocks of the dealt order to leave out at the start.

    Raises:
        DataError: a corpus with less than one block for training; a blend that names a corpus twice, or one that is not there.
    """

    def __init__(
        self,
        plan: StagePlan,
        corpora: Mapping[str, TokenCorpus],
        blend: Weights,
        split: str,
        seed: int,
        window_blocks: int = 1024,
        skip_blocks: int = 0,
    ) -> None:
        self.plan, self.seed, self.split = plan, seed, split
        self.names = tuple(corpora)
        self.corpora = tuple(corpora.values())
        self.window_blocks, self.skip_blocks = window_blocks, skip_blocks
        self.ranges = tuple(corpus.ranges(split)[0] for corpus in self.corpora)
        self.blocks = tuple((last - first - plan.lookahead_tokens) // plan.block_tokens for first, last in self.ranges)
        for corpus, (first, last), blocks in zip(self.corpora, self.ranges, self.blocks, strict=True):
            if blocks < 1:
                raise DataError(
                    f"{corpus.name} has {format_count(last - first)} tokens for training, less than a block of "
                    f"{plan.block_tokens:,} and {plan.lookahead_tokens} more",
                    "corpora of at least one block",
                    "add data, lower --seq-length or the patch sizes, or change --split",
                )
        self._blend = tuple(blend)
        self._deals = self._plan_deals(blend)
        self._block_orders: dict[tuple[int, int], Permutation] = {}

    def _plan_deals(self, blend: Weights) -> tuple[_Deal, ...]:
        deals: list[_Deal] = []
        taken = np.zeros(len(self.names), dtype=np.int64)
        before: Weights | None = None
        blocks_before = 0
        for index, stage in enumerate(self.plan.stages):
            blocks = self.plan.last_block(index) - self.plan.first_block(index)
            mine = self._checked(tuple(stage.blend or blend))
            if deals and mine == before:
                deal = _Deal(deals[-1].blend, deals[-1].corpora, deals[-1].phase + blocks_before, deals[-1].taken)
            else:
                members = np.array([self.names.index(name) for name, _ in mine], dtype=np.int64)
                deal = _Deal(Blend([weight for _, weight in mine]), members, 0 if deals else self.skip_blocks, taken.copy())
            deals.append(deal)
            given = deal.blend.consumed(deal.phase + blocks)
            taken = deal.taken.copy()
            np.add.at(taken, deal.corpora, given)
            before, blocks_before = mine, blocks
        return tuple(deals)

    def _checked(self, blend: Weights) -> Weights:
        # Each entry counts its own blocks from where the corpus was: two entries of one corpus would read the same ones.
        names = [name for name, _ in blend]
        if len(set(names)) < len(names) or not set(names) <= set(self.names):
            raise DataError(f"a blend of {', '.join(names)}", f"each once: {', '.join(self.names)}", "correct --data-path")
        return blend

    def _block_order(self, corpus: int, epoch: int) -> Permutation:
        key = (corpus, epoch)
        if key not in self._block_orders:
            if len(self._block_orders) > 256:
                self._block_orders.clear()
            self._block_orders[key] = Permutation(self.blocks[corpus], derive_key(self.seed, "blocks", corpus, epoch))
        return self._block_orders[key]

    def locate(self, stage_index: int, samples: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where samples of a stage lie.

        Args:
            stage_index: which stage.
            samples: their numbers in the stage's order, from 0.

        Returns:
            (corpus of each, first token of each).
        """
        stage = self.plan.stages[stage_index]
        per_block = self.plan.block_tokens // stage.sample_tokens
        first, last = self.plan.first_block(stage_index), self.plan.last_block(stage_index)
        if samples.size and (int(samples.min()) < 0 or int(samples.max()) >= (last - first) * per_block):
            raise IndexError(f"samples {int(samples.min())} to {int(samples.max())} of {(last - first) * per_block}")
        windows = samples // (self.window_blocks * per_block)
        blocks, parts = np.empty_like(samples), np.empty_like(samples)
        for window in np.unique(windows):
            inside = windows == window
            begin = int(window) * self.window_blocks
            size = min(self.window_blocks, last - first - begin)
            order = Permutation(size * per_block, derive_key(self.seed, "samples", self.skip_blocks + first + begin))
            places = order.many(samples[inside] - begin * per_block)
            blocks[inside] = begin + places // per_block
            parts[inside] = places % per_block
        deal = self._deals[stage_index]
        members, ordinals = deal.blend.locate(deal.phase + blocks)
        corpora = deal.corpora[members]
        ordinals += deal.taken[corpora]
        starts = np.empty_like(samples)
        for corpus in np.unique(corpora):
            inside = corpora == corpus
            epochs, places = np.divmod(ordinals[inside], self.blocks[corpus])
            numbers = np.empty_like(places)
            for epoch in np.unique(epochs):
                now = epochs == epoch
                numbers[now] = self._block_order(int(corpus), int(epoch)).many(places[now])
            starts[inside] = self.ranges[corpus][0] + numbers * self.plan.block_tokens
        return corpora, starts + parts * stage.sample_tokens

    def spans_of_step(self, stage_index: int, step: int) -> list[tuple[str, int, int]]:
        """What all ranks together read in one step of a stage.

        Args:
            stage_index: which stage.
            step: its step, from 0.

        Returns:
            (corpus, first token, tokens) of each sample.
        """
        size = self.plan.stages[stage_index].global_batch_size
        spans = self.spans(stage_index, np.arange(step * size, (step + 1) * size, dtype=np.int64))
        return [(self.names[span.corpus], span.start, span.length) for span in spans]

    def spans(self, stage_index: int, samples: npt.NDArray[np.int64]) -> tuple[Span, ...]:
        """The same as spans."""
        length = self.plan.stages[stage_index].sample_tokens
        corpora, starts = self.locate(stage_index, samples)
        return tuple(Span(int(corpus), int(start), length) for corpus, start in zip(corpora, starts, strict=True))

    def corpus_usage(self, stage_index: int) -> tuple[CorpusUsage, ...]:
        """How much a stage reads of each of its corpora."""
        deal = self._deals[stage_index]
        blocks = self.plan.last_block(stage_index) - self.plan.first_block(stage_index)
        before, after = deal.blend.consumed(deal.phase), deal.blend.consumed(deal.phase + blocks)
        return tuple(
            CorpusUsage(
                corpus=self.names[corpus],
                tokens=int(end - begin) * self.plan.block_tokens,
                epochs=float(end - begin) / self.blocks[corpus],
                epochs_by_end=float(end + deal.taken[corpus]) / self.blocks[corpus],
            )
            for corpus, begin, end in zip(deal.corpora.tolist(), before, after, strict=True)
        )

    def check_epochs(self, limits: Mapping[str, float]) -> None:
        """No corpus may be read more often than its limit allows.

        Args:
            limits: how often the training part of a corpus may be read in the whole run, by the corpus' name.

        Raises:
            DataError: naming the first stage in which one is, and what the limit allows.
        """
        for index, stage in enumerate(self.plan.stages):
            for reading in self.corpus_usage(index):
                limit = limits.get(reading.corpus, math.inf)
                if reading.epochs_by_end > limit:
                    size = self.blocks[self.names.index(reading.corpus)] * self.plan.block_tokens
                    raise DataError(
                        f"by the end of stage {stage.name} the training part of {reading.corpus} is read {reading.epochs_by_end:.2f} times",
                        f"{limit:g} times (--max-epochs): {format_count(limit * size)} tokens of it",
                        "add data, lower its weight or --train-tokens, or raise --max-epochs",
                    )

    def notes(self) -> list[str]:
        """What may surprise, in sentences: corpora read more than once, of other tokenizers, or aligned to other patches."""
        aligned = [
            f"documents of {reading.corpus} are aligned to {align} tokens: patches of {stage.patch_size} in stage {stage.name} may span two"
            for index, stage in enumerate(self.plan.stages)
            for reading in self.corpus_usage(index)
            if (align := self.corpora[self.names.index(reading.corpus)].patch_align) > 1 and align % stage.patch_size
        ]
        return [*tokenizer_notes(self.corpora), *aligned] + [
            f"by the end of stage {stage.name} the training part of {reading.corpus} is read {reading.epochs_by_end:.2f} times"
            for index, stage in enumerate(self.plan.stages)
            for reading in self.corpus_usage(index)
            if reading.epochs_by_end > 1
        ]

    def fingerprint(self) -> dict[str, object]:
        """What the order of the data depends on beside the plan, as JSON values; no paths, so that data may be moved."""
        blend = [[self.names.index(name), weight] for name, weight in self._blend]
        return {
            **({"blend": blend} if len(blend) > 1 else {}),
            "corpora": [corpus.fingerprint() for corpus in self.corpora],
            "split": self.split,
            "seed": self.seed,
            "window_blocks": self.window_blocks,
            "skip_blocks": self.skip_blocks,
        }
