"""The data of a run: corpora opened and checked, the training stream, the held-out ranges, the masking.

In: a run and its plan. Out: `RunData`, which makes loaders for stages and batches for evaluations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_patch.config.resolve import RunConfig
from megatron_patch.data.collate import DocumentMasking, PatchBatch
from megatron_patch.data.corpus import TokenCorpus, check_metadata, check_vocabulary, open_corpus
from megatron_patch.data.evaluation_data import evaluation_batches, held_out_starts
from megatron_patch.data.loader import PatchLoader
from megatron_patch.data.token_stream import TrainStream
from megatron_patch.parallel.grid import Grid
from megatron_patch.stages import Stage, StagePlan
from megatron_patch.tokenizers.base import Tokenizer, tokenizer_of_checkpoint
from megatron_patch.training.stream import open_stream


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Args:
        stream: the training stream over all stages.
        held_out: (corpus, (first token, last token)) of each held-out range.
        masking: how documents are kept apart.
        grid: this rank's coordinates.
        prefetch: steps prepared ahead.
        vocab_size: every id must be below it.
        evaluation_unit: held-out data is read in units of so many tokens, a multiple of every stage's sample.
        pin_memory: page-locked batches, for GPUs.
    """

    stream: TrainStream
    held_out: tuple[tuple[TokenCorpus, tuple[int, int]], ...]
    masking: DocumentMasking
    grid: Grid
    prefetch: int
    vocab_size: int
    evaluation_unit: int
    pin_memory: bool

    def notes(self) -> list[str]:
        """What people are told of the data at the start."""
        notes = list(self.stream.notes())
        if not self.held_out:
            notes.append(
                "no evaluation: the held-out part of the data is shorter than a sample (give --valid-data-path or another --split)"
            )
        return notes

    def loader(self, stage_index: int, stage_step: int) -> PatchLoader:
        """This rank's micro-batches of a stage, from a step on."""
        return PatchLoader(
            self.stream,
            stage_index,
            self.grid.data_parallel_rank,
            self.grid.data_parallel_size,
            self.masking,
            start_step=stage_step,
            prefetch=self.prefetch,
            vocab_size=self.vocab_size,
            pin_memory=self.pin_memory,
        )

    def evaluation(self, stage: Stage, positions: int, patch_size: int, tokens: int) -> Iterator[PatchBatch]:
        """This rank's held-out batches at a patch size; the same tokens for every patch size."""
        unit = math.lcm(self.evaluation_unit, positions * patch_size)
        for corpus, token_range in self.held_out:
            yield from evaluation_batches(
                corpus,
                held_out_starts(token_range, unit, self.stream.plan.lookahead_tokens, tokens // len(self.held_out)),
                unit_tokens=unit,
                positions=positions,
                patch_size=patch_size,
                micro_batch_size=stage.micro_batch_size,
                rank=self.grid.data_parallel_rank,
                size=self.grid.data_parallel_size,
                masking=self.masking,
                vocab_size=self.vocab_size,
            )


def open_data(run: RunConfig, plan: StagePlan, grid: Grid, pin_memory: bool = False) -> RunData:
    """Opens and checks the corpora of a run.

    Raises:
        DataError: a file that is missing, broken, of another vocabulary, or too small for the plan; corpora that do not go together.
    """
    options = run.options.data
    stream = open_stream(run, plan)
    corpora = dict(zip(stream.names, stream.corpora, strict=True))
    valid = [open_corpus(name) for name, _ in run.valid_blend]
    infos = check_metadata([*stream.corpora, *valid], options.eod_token_id)
    if valid:
        for corpus in valid:
            check_vocabulary(corpus, run.shape.vocab_size)
        held_out = tuple((corpus, (0, corpus.num_tokens)) for corpus in valid)
    else:
        held_out = tuple((corpora[name], corpora[name].ranges(stream.split)[1]) for name, _ in run.blend)
    unit = math.lcm(run.options.stages.seq_length, *(stage.positions * stage.patch_size for stage in plan.stages))
    held_out = tuple((corpus, (first, last)) for corpus, (first, last) in held_out if last - first >= unit + plan.lookahead_tokens)
    masking = DocumentMasking(
        eod_id=run.eod_id if run.eod_id is not None else next((info.eod_id for info in infos), None),
        reset_attention_mask=options.reset_attention_mask,
        reset_position_ids=options.reset_position_ids,
        eod_mask_loss=options.eod_mask_loss,
        ignore_repeated_eod=any(info.patch_align > 1 for info in infos),
    )
    return RunData(stream, held_out, masking, grid, options.num_workers, run.shape.vocab_size, unit, pin_memory)


def sample_tokenizer(run: RunConfig) -> Tokenizer | None:
    """The tokenizer for samples, where the run asks for any.

    Raises:
        ConfigError: it is not known, or has more ids than the model.
        DataError: its files are missing or broken.
    """
    if not run.options.logging.sample_prompts:
        return None
    info = dataclasses.asdict(run.data_metadata) if run.data_metadata else {}
    return tokenizer_of_checkpoint(info, run.options.data.tokenizer_type, run.options.data.tokenizer_model, run.shape.vocab_size)
