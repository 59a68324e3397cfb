"""Opens the training stream of a run, and shows how much of each corpus every stage reads.

This file is separate from `data.py` because it must not import torch: a dry run and tools/plan.py show the same numbers, and torch takes
seconds to import.

In: a run and its plan. Out: `TrainStream`, and the corpus usage (tokens and epochs of each corpus) as a table or as JSON values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from megatron_patch.config.resolve import RunConfig
from megatron_patch.data.corpus import TokenCorpus, check_vocabulary, open_corpus
from megatron_patch.data.missing_dataset import missing_datasets
from megatron_patch.data.same_dataset import shared_datasets
from megatron_patch.data.token_stream import TrainStream
from megatron_patch.stages import StagePlan
from megatron_patch.utils.console import one_line
from megatron_patch.utils.tables import FittingTable
from megatron_patch.utils.units import format_count


def open_stream(run: RunConfig, plan: StagePlan) -> TrainStream:
    """Opens and checks the training corpora of a run.

    Args:
        run: the run.
        plan: the plan that it follows.

    Raises:
        DataError: a file is missing, damaged, has another vocabulary or is too small for the plan, or a corpus is read more often than
            --max-epochs allows.
    """
    options = run.options.data
    corpora = {name: open_corpus(name) for name in run.corpus_names}
    for corpus in corpora.values():
        check_vocabulary(corpus, run.shape.vocab_size)
    stream = TrainStream(
        plan,
        corpora,
        blend=run.blend,
        split=run.training_split,
        seed=run.options.engine.seed,
        window_blocks=options.shuffle_window_blocks,
        skip_blocks=run.options.stages.start_tokens // plan.block_tokens,
    )
    stream.check_epochs(run.epoch_limits)
    return stream


def shared_notes(stream: TrainStream, valid: Sequence[tuple[str, TokenCorpus]] = ()) -> list[str]:
    """Returns sentences for the user about datasets that several corpora share, or that are trained on and held out.

    They may be meant: a part of a corpus can be read more often, or again in a later stage.

    Args:
        stream: the training stream.
        valid: word and corpus of each entry of --valid-data-path.
    """
    trained = [(word, corpus.prefixes) for word, corpus in zip(stream.names, stream.corpora, strict=True)]
    notes = [
        f"{word} and {other} share the dataset {prefix}: what one of them reads of it, the other may read again"
        for word, other, prefix in (shared_datasets(trained) if len(trained) > 1 else [])
    ]
    notes += [
        f"--valid-data-path: {word} and {other} share the dataset {prefix}, which counts in both"
        for word, other, prefix in (shared_datasets([(word, corpus.prefixes) for word, corpus in valid]) if len(valid) > 1 else [])
    ]
    words = {f"--valid-data-path {word}": corpus.prefixes for word, corpus in valid}
    found = shared_datasets([("--data-path", [prefix for _, prefixes in trained for prefix in prefixes]), *words.items()]) if words else []
    return notes + [
        f"{prefix} is in the training data and in {word}: its held-out loss is that of text that the run trains on"
        for _, word, prefix in found
    ]


def open_stream_if_present(run: RunConfig) -> tuple[TrainStream | None, list[str]]:
    """Opens the training stream of a run whose data may not exist on this machine.

    Returns:
        The stream, or None if a corpus is missing; and sentences for the user about it.

    Raises:
        DataError: the data exists, and `open_stream` refuses it.
    """
    missing = missing_datasets(run.data_words)
    notes = [one_line(f"{error.what}; {error.do}") for error in missing]
    if not run.blend:
        return None, ["epochs per corpus are unknown without --data-path", *notes]
    if any(not error.what.startswith("--valid-data-path") for error in missing):
        return None, [*notes, "epochs per corpus are unknown, because the data does not exist on this machine"]
    stream = open_stream(run, run.plan)
    return stream, [*stream.notes(), *shared_notes(stream), *notes]


def corpus_usage_json(stream: TrainStream) -> list[dict[str, str | float]]:
    """Returns the rows of `corpus_usage_table` as plain values, one for each corpus of each stage."""
    return [
        {"stage": stage.name, **asdict(usage)} for index, stage in enumerate(stream.plan.stages) for usage in stream.corpus_usage(index)
    ]


def corpus_usage_table(stream: TrainStream) -> FittingTable:
    """Returns a table of the tokens and epochs that each stage reads of each corpus."""
    names = ("stage", "corpus", "tokens", "of stage", "epochs", "epochs so far")
    table = FittingTable("Data", names, left=("stage", "corpus"), folded=("stage", "corpus"))
    for index, stage in enumerate(stream.plan.stages):
        usages = stream.corpus_usage(index)
        total = sum(usage.tokens for usage in usages)
        for number, usage in enumerate(usages):
            table.add_row(
                stage.name if number == 0 else "",
                usage.corpus,
                format_count(usage.tokens),
                f"{usage.tokens / max(1, total):.1%}",
                f"{usage.epochs:.3f}",
                f"{usage.epochs_by_end:.3f}",
            )
    return table
