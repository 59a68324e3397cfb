"""The token stream that all stages share: which tokens are the n-th sample of a stage, computed without an index.

In: the plan, corpora and weights, a seed. Out: spans of tokens. A sample number becomes a span in three steps:

1. The run reads one sequence of blocks; a stage reads its blocks `[first_block, last_block)`. Within windows of blocks a keyed
   permutation shuffles the samples, so that a step does not have neighboring samples of one document.
2. The table of the blend maps the block's number in the sequence to a corpus and a block number among the blocks of that corpus.
3. That number, modulo the number of blocks in the corpus, is permuted with a key of (seed, corpus, epoch). The result is the block's
   number in the file.

Nothing is built, stored or shared between ranks, whatever the size of the data. The order depends only on the seed, the data and the plan.
Because stages have consecutive blocks of one sequence, every token of every block is an input exactly once in an epoch, counted over all
stages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_patch.data.blend import Blend
from megatron_patch.data.corpus import Corpus, tokenizer_notes
from megatron_patch.data.permutation import Permutation, derive_key
from megatron_patch.errors import DataError
from megatron_patch.stages import StagePlan
from megatron_patch.utils.units import format_count

Weights = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class TokenSpan:
    """The input tokens of one sample.

    Args:
        corpus: index of the corpus in `TrainStream.names`.
        start: first token in that corpus.
        length: number of input tokens; labels come from up to K tokens more.
    """

    corpus: int
    start: int
    length: int


@dataclass(frozen=True)
class CorpusUsage:
    """What a stage reads of one corpus.

    Args:
        corpus: name of the corpus.
        tokens: tokens that the stage reads, in full blocks.
        epochs: epochs of the training part in the stage.
        epochs_by_end: epochs of the training part from the start of the run to the end of the stage.
    """

    corpus: str
    tokens: int
    epochs: float
    epochs_by_end: float


@dataclass(frozen=True)
class _BlockDraw:
    """How one stage draws its blocks.

    Args:
        blend: the table of the blend.
        corpora: index of the corpus of each entry of the blend, int64.
        offset: number of the stage's first block in the table.
        drawn_before: blocks of each corpus that were read before the table begins, int64.
    """

    blend: Blend
    corpora: npt.NDArray[np.int64]
    offset: int
    drawn_before: npt.NDArray[np.int64]


class TrainStream:
    """The training data of a plan.

    Args:
        plan: the stages.
        corpora: the corpora by name; `TokenSpan.corpus` is the index in this order.
        blend: (name, weight) of each corpus, for stages that set no blend.
        split: relative sizes of the parts for training, validation and test.
        seed: random seed of the order.
        window_blocks: number of blocks whose samples are shuffled together.
        skip_blocks: number of blocks to skip at the start of the sequence.

    Raises:
        DataError: a corpus has less than one block for training, or a blend names a corpus twice or one that does not exist.
    """

    def __init__(
        self,
        plan: StagePlan,
        corpora: Mapping[str, Corpus],
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
                    f"{corpus.name} has {format_count(last - first)} tokens for training, fewer than one block of "
                    f"{plan.block_tokens:,} and {plan.lookahead_tokens} more for its last labels",
                    "corpora with at least one block for training",
                    "add data, lower --seq-length or the patch sizes, or change --split",
                )
        self._blend = tuple(blend)
        self._draws = self._plan_draws(blend)
        self._block_orders: dict[tuple[int, int], Permutation] = {}

    def _plan_draws(self, blend: Weights) -> tuple[_BlockDraw, ...]:
        """Returns the draw of each stage; a stage with the blend of the one before it continues in the same table."""
        draws: list[_BlockDraw] = []
        drawn_before = np.zeros(len(self.names), dtype=np.int64)
        previous: Weights | None = None
        blocks_before = 0
        for index, stage in enumerate(self.plan.stages):
            blocks = self.plan.last_block(index) - self.plan.first_block(index)
            stage_blend = self._checked(tuple(stage.blend or blend))
            if draws and stage_blend == previous:
                draw = _BlockDraw(draws[-1].blend, draws[-1].corpora, draws[-1].offset + blocks_before, draws[-1].drawn_before)
            else:
                members = np.array([self.names.index(name) for name, _ in stage_blend], dtype=np.int64)
                draw = _BlockDraw(
                    Blend([weight for _, weight in stage_blend]), members, 0 if draws else self.skip_blocks, drawn_before.copy()
                )
            draws.append(draw)
            drawn = draw.blend.consumed(draw.offset + blocks)
            drawn_before = draw.drawn_before.copy()
            np.add.at(drawn_before, draw.corpora, drawn)
            previous, blocks_before = stage_blend, blocks
        return tuple(draws)

    def _checked(self, blend: Weights) -> Weights:
        # Each entry numbers the blocks of its corpus by itself, so two entries of one corpus would read the same blocks.
        names = [name for name, _ in blend]
        if len(set(names)) < len(names) or not set(names) <= set(self.names):
            raise DataError(f"a blend of {', '.join(names)}", f"each of these corpora once: {', '.join(self.names)}", "correct --data-path")
        return blend

    def _block_order(self, corpus: int, epoch: int) -> Permutation:
        """Returns the order of a corpus' blocks in an epoch."""
        key = (corpus, epoch)
        if key not in self._block_orders:
            if len(self._block_orders) > 256:
                self._block_orders.clear()
            self._block_orders[key] = Permutation(self.blocks[corpus], derive_key(self.seed, "blocks", corpus, epoch))
        return self._block_orders[key]

    def locate(self, stage_index: int, samples: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns where samples of a stage are in their corpora.

        Args:
            stage_index: index of the stage.
            samples: numbers of the samples in the stage's order, from 0, int64 [N].

        Returns:
            The index of the corpus and the first token of each sample, two int64 arrays [N].

        Raises:
            IndexError: the stage has fewer samples.
        """
        stage = self.plan.stages[stage_index]
        per_block = self.plan.block_tokens // stage.sample_tokens
        first, last = self.plan.first_block(stage_index), self.plan.last_block(stage_index)
        if samples.size and (int(samples.min()) < 0 or int(samples.max()) >= (last - first) * per_block):
            raise IndexError(
                f"samples {int(samples.min())} to {int(samples.max())} are out of range: the stage has {(last - first) * per_block} samples"
            )
        ends = np.unique([0, *stage.earlier_ends, last - first])
        blocks, parts = samples // per_block, np.empty_like(samples)
        # A window begins every `window_blocks` blocks, and where an earlier plan of the run ended the stage.
        starts_here = ends[np.searchsorted(ends, blocks, side="right") - 1]
        windows = starts_here + (blocks - starts_here) // self.window_blocks * self.window_blocks
        for begin in np.unique(windows).tolist():
            inside = windows == begin
            next_end = int(ends[np.searchsorted(ends, begin, side="right")])
            size = min(self.window_blocks, next_end - begin)
            order = Permutation(size * per_block, derive_key(self.seed, "samples", self.skip_blocks + first + begin))
            shuffled = order.many(samples[inside] - begin * per_block)
            blocks[inside] = begin + shuffled // per_block
            parts[inside] = shuffled % per_block
        draw = self._draws[stage_index]
        members, ordinals = draw.blend.locate(draw.offset + blocks)
        corpora = draw.corpora[members]
        ordinals += draw.drawn_before[corpora]
        starts = np.empty_like(samples)
        for corpus in np.unique(corpora):
            inside = corpora == corpus
            epochs, within_epoch = np.divmod(ordinals[inside], self.blocks[corpus])
            numbers = np.empty_like(within_epoch)
            for epoch in np.unique(epochs):
                now = epochs == epoch
                numbers[now] = self._block_order(int(corpus), int(epoch)).many(within_epoch[now])
            starts[inside] = self.ranges[corpus][0] + numbers * self.plan.block_tokens
        return corpora, starts + parts * stage.sample_tokens

    def spans_of_step(self, stage_index: int, step: int) -> list[tuple[str, int, int]]:
        """Returns what all ranks together read in one step of a stage.

        Args:
            stage_index: index of the stage.
            step: step of the stage, from 0.

        Returns:
            (name of the corpus, first token, number of tokens) of each sample.
        """
        size = self.plan.stages[stage_index].global_batch_size
        spans = self.spans(stage_index, np.arange(step * size, (step + 1) * size, dtype=np.int64))
        return [(self.names[span.corpus], span.start, span.length) for span in spans]

    def spans(self, stage_index: int, samples: npt.NDArray[np.int64]) -> tuple[TokenSpan, ...]:
        """Returns where samples of a stage are, as `locate` does, as one span for each."""
        length = self.plan.stages[stage_index].sample_tokens
        corpora, starts = self.locate(stage_index, samples)
        return tuple(TokenSpan(int(corpus), int(start), length) for corpus, start in zip(corpora, starts, strict=True))

    def corpus_usage(self, stage_index: int) -> tuple[CorpusUsage, ...]:
        """Returns how much a stage reads of each of its corpora."""
        draw = self._draws[stage_index]
        blocks = self.plan.last_block(stage_index) - self.plan.first_block(stage_index)
        before, after = draw.blend.consumed(draw.offset), draw.blend.consumed(draw.offset + blocks)
        return tuple(
            CorpusUsage(
                corpus=self.names[corpus],
                tokens=int(end - begin) * self.plan.block_tokens,
                epochs=float(end - begin) / self.blocks[corpus],
                epochs_by_end=float(end + draw.drawn_before[corpus]) / self.blocks[corpus],
            )
            for corpus, begin, end in zip(draw.corpora.tolist(), before, after, strict=True)
        )

    def check_epochs(self, limits: Mapping[str, float]) -> None:
        """Checks that the run reads no corpus more often than its limit.

        Args:
            limits: largest number of epochs of the training part of a corpus, over the run, by the corpus' name.

        Raises:
            DataError: a limit is exceeded; the message names the first stage in which this happens.
        """
        for index, stage in enumerate(self.plan.stages):
            for usage in self.corpus_usage(index):
                limit = limits.get(usage.corpus, math.inf)
                if usage.epochs_by_end > limit:
                    size = self.blocks[self.names.index(usage.corpus)] * self.plan.block_tokens
                    raise DataError(
                        f"by the end of stage {stage.name} the training part of {usage.corpus} is read {usage.epochs_by_end:.2f} times",
                        f"at most {limit:g} times (--max-epochs), which is {format_count(limit * size)} tokens",
                        "add data, lower the weight of this corpus or --train-tokens, or raise --max-epochs",
                    )

    def notes(self) -> list[str]:
        """Returns notes on what may surprise: corpora that are read more than once, have another tokenizer or another patch alignment."""
        aligned = [
            f"the documents of {usage.corpus} are aligned to {align} tokens, so patches of {stage.patch_size} in stage {stage.name} "
            "may contain tokens of two documents"
            for index, stage in enumerate(self.plan.stages)
            for usage in self.corpus_usage(index)
            if (align := self.corpora[self.names.index(usage.corpus)].patch_align) > 1 and align % stage.patch_size
        ]
        return [*tokenizer_notes(self.corpora), *aligned] + [
            f"by the end of stage {stage.name} the training part of {usage.corpus} is read {usage.epochs_by_end:.2f} times"
            for index, stage in enumerate(self.plan.stages)
            for usage in self.corpus_usage(index)
            if usage.epochs_by_end > 1
        ]

    def fingerprint(self) -> dict[str, object]:
        """Returns, as JSON values, what the order of the data depends on in addition to the plan. Paths are left out, so data may move."""
        blend = [[self.names.index(name), weight] for name, weight in self._blend]
        return {
            **({"blend": blend} if len(blend) > 1 else {}),
            "corpora": [corpus.fingerprint() for corpus in self.corpora],
            "split": self.split,
            "seed": self.seed,
            "window_blocks": self.window_blocks,
            "skip_blocks": self.skip_blocks,
        }
