"""Opens the data of a run: the training stream, the held-out ranges and how documents are masked.

In: a run and its plan. Out: `RunData`, which makes loaders for stages and batches for evaluations. The part that needs no torch is in
`stream.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_patch.checkpoint.trainer_state import HeldOutName
from megatron_patch.config.resolve import RunConfig
from megatron_patch.data.collate import DocumentMasking, PatchBatch
from megatron_patch.data.corpus import Corpus, check_metadata, check_vocabulary, open_corpus
from megatron_patch.data.corpus_names import names_in_run
from megatron_patch.data.evaluation_data import HeldOutCorpus, evaluation_batches, held_out_starts, shares
from megatron_patch.data.loader import PatchLoader
from megatron_patch.data.token_stream import TrainStream
from megatron_patch.parallel.grid import Grid
from megatron_patch.stages import Stage, StagePlan
from megatron_patch.tokenizers.base import Tokenizer, tokenizer_of_checkpoint
from megatron_patch.training.stream import open_stream, shared_notes
from megatron_patch.utils.units import plural


@dataclass(frozen=True)
class RunData:
    """The data that a run reads.

    Args:
        stream: the training stream over all stages.
        held_out: the held-out data of each corpus that has enough of it; corpora are numbered in this order.
        held_out_notes: sentences for the user about it.
        held_out_names: the names under which the run has evaluated corpora so far, in earlier starts too.
        masking: how documents are kept apart.
        grid: coordinates of this rank.
        prefetch: number of steps prepared in advance.
        vocab_size: every token id must be below it.
        evaluation_unit: number of tokens in which held-out data is read, a multiple of every stage's sample.
        pin_memory: whether batches are in page-locked memory, for GPUs.
    """

    stream: TrainStream
    held_out: tuple[HeldOutCorpus, ...]
    held_out_notes: tuple[str, ...]
    held_out_names: tuple[HeldOutName, ...]
    masking: DocumentMasking
    grid: Grid
    prefetch: int
    vocab_size: int
    evaluation_unit: int
    pin_memory: bool

    def notes(self) -> list[str]:
        """Returns sentences for the user about the data."""
        return [*self.stream.notes(), *self.held_out_notes]

    def loader(self, stage_index: int, stage_step: int) -> PatchLoader:
        """Returns a loader of this rank's micro-batches of a stage.

        Args:
            stage_index: the stage.
            stage_step: steps of the stage that are already taken.
        """
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
        """Yields this rank's held-out batches, corpus by corpus; every patch size reads the same tokens.

        Every corpus gets the same number of tokens, so that its own loss is equally exact whatever it weighs in the blend.

        Args:
            stage: the stage whose micro-batch size and context-parallel size are used.
            positions: positions of a sample.
            patch_size: K.
            tokens: number of tokens to read at most, over all ranks.
        """
        unit = math.lcm(self.evaluation_unit, positions * patch_size)
        rank, part = divmod(self.grid.data_parallel_rank, stage.context_parallel_size)
        for number, held_out in enumerate(self.held_out):
            batches = evaluation_batches(
                held_out.corpus,
                held_out_starts(held_out.token_range, unit, self.stream.plan.lookahead_tokens, tokens // len(self.held_out)),
                unit_tokens=unit,
                positions=positions,
                patch_size=patch_size,
                micro_batch_size=stage.micro_batch_size,
                rank=rank,
                size=stage.sample_ranks(self.grid.data_parallel_size),
                masking=self.masking,
                vocab_size=self.vocab_size,
                number=number,
            )
            yield from (batch.part(part, stage.context_parallel_size) for batch in batches)


def open_data(run: RunConfig, plan: StagePlan, grid: Grid, pin_memory: bool = False, used: Sequence[HeldOutName] = ()) -> RunData:
    """Opens and checks the data of a run.

    Args:
        run: the run.
        plan: the plan that it follows.
        grid: coordinates of this rank.
        pin_memory: whether batches are in page-locked memory, for GPUs.
        used: the names under which the run has evaluated corpora before it resumes.

    Raises:
        DataError: a file is missing, damaged, has another vocabulary or is too small for the plan, or corpora do not fit together.
    """
    options = run.options.data
    stream = open_stream(run, plan)
    valid = [open_corpus(name) for name, _ in run.valid_blend]
    named = [(name, corpus) for (name, _), corpus in zip(run.valid_blend, valid, strict=True)]
    infos = check_metadata([*stream.corpora, *valid], options.eod_token_id)
    for corpus in valid:
        check_vocabulary(corpus, run.shape.vocab_size)
    unit = math.lcm(run.options.stages.seq_length, *(stage.positions * stage.patch_size for stage in plan.stages))
    blend = run.valid_blend or run.blend
    trained = dict(zip(stream.names, stream.corpora, strict=True))
    evaluated: list[Corpus] = [*valid] or [trained[word] for word, _ in blend]
    names = names_in_run([word for word, _ in blend], [corpus.num_tokens for corpus in evaluated], used)
    held_out, held_out_notes = _held_out(run, stream, evaluated, names, unit + plan.lookahead_tokens)
    held_out_notes = (*shared_notes(stream, named), *held_out_notes)
    masking = DocumentMasking(
        eod_id=run.eod_id if run.eod_id is not None else next((info.eod_id for info in infos), None),
        reset_attention_mask=options.reset_attention_mask,
        reset_position_ids=options.reset_position_ids,
        eod_mask_loss=options.eod_mask_loss,
        ignore_repeated_eod=any(info.patch_align > 1 for info in infos),
    )
    return RunData(stream, held_out, held_out_notes, names, masking, grid, options.num_workers, run.shape.vocab_size, unit, pin_memory)


def _held_out(
    run: RunConfig, stream: TrainStream, evaluated: Sequence[Corpus], names: Sequence[HeldOutName], needed: int
) -> tuple[tuple[HeldOutCorpus, ...], tuple[str, ...]]:
    """Returns the held-out data of each corpus that has at least `needed` tokens of it, and sentences for the user about it.

    Args:
        run: the run.
        stream: its training stream.
        evaluated: the held-out corpora, or else the training corpora of which parts are held out.
        names: names that begin with those of these corpora.
        needed: tokens of the smallest evaluation, and after them those for its last labels.
    """
    blend = run.valid_blend or run.blend
    every = [
        HeldOutCorpus(
            one.name,
            corpus,
            (0, corpus.num_tokens) if run.valid_blend else corpus.ranges(stream.split)[1],
            weight if run.weighs_held_out else None,
        )
        for one, (_, weight), corpus in zip(names, blend, evaluated, strict=False)
    ]
    kept = tuple(one for one in every if one.tokens >= needed)
    if not kept:
        return (), ("no evaluation: the held-out part of the data is shorter than one sample (use --valid-data-path or another --split)",)
    notes = [
        f"{one.name} is not evaluated and its weight goes to the other corpora: it has {plural(one.tokens, 'held-out token')}, and an "
        f"evaluation needs {needed:,} (use --valid-data-path or another --split)"
        for one in every
        if one not in kept
    ]
    if not run.valid_blend:
        of_stages = [word for word in stream.names if word not in dict(blend)]
        notes += [f"{word} is not evaluated, because only a stage names it (use --valid-data-path)" for word in of_stages]
    if len(kept) > 1:
        weights = shares([one.weight for one in kept], [1] * len(kept))
        weighed = " + ".join(f"{weight:.4g} × {one.name}" for weight, one in zip(weights, kept, strict=True))
        notes.append(
            f"the held-out loss is {weighed}"
            if run.weighs_held_out
            else f"the held-out loss counts each evaluated token of {', '.join(one.name for one in kept)} the same"
        )
    return kept, tuple(notes)


def sample_tokenizer(run: RunConfig) -> Tokenizer | None:
    """Returns the tokenizer of the training data, or None without --sample-prompts.

    Raises:
        ConfigError: the tokenizer is unknown, or has more ids than the model.
        DataError: a file of the tokenizer is missing or damaged.
    """
    if not run.options.logging.sample_prompts:
        return None
    info = dataclasses.asdict(run.data_metadata) if run.data_metadata else {}
    return tokenizer_of_checkpoint(info, run.options.data.tokenizer_type, run.options.data.tokenizer_model, run.shape.vocab_size)
