"""The training stream of a run, opened and checked, and a table of what its stages read. Needs no torch: dry runs and plans show it too.

In: a run and its plan. Out: `TrainStream`, and how often each corpus will be seen in each stage.
"""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from megatron_patch.config.resolve import RunConfig
from megatron_patch.data.corpus import check_vocabulary, open_corpus
from megatron_patch.data.dataset_paths import expand_prefixes
from megatron_patch.data.storage import exists
from megatron_patch.data.token_stream import TrainStream
from megatron_patch.errors import DataError
from megatron_patch.stages import StagePlan
from megatron_patch.utils.units import format_count


def open_stream(run: RunConfig, plan: StagePlan) -> TrainStream:
    """Opens and checks the training corpora of a run.

    Raises:
        DataError: a file that is missing, broken, of another vocabulary, or too small for the plan; more epochs than are allowed.
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


def open_stream_if_present(run: RunConfig) -> tuple[TrainStream | None, list[str]]:
    """The stream of a run whose data may not be on this machine.

    Returns:
        The stream, or None where a corpus is missing; and what should be noted about it, in sentences.

    Raises:
        DataError: as `open_stream`, of data that is here.
    """
    missing = _missing_data(run) if run.blend else "no --data-path"
    if missing is not None:
        return None, [f"how often data is read is not shown: {missing}"]
    stream = open_stream(run, run.plan)
    return stream, stream.notes()


def _missing_data(run: RunConfig) -> str | None:
    """The first of a run's corpora that is not here, in words; None: all are."""
    try:
        files = [f"{prefix}.bin" for name in run.corpus_names for prefix in expand_prefixes(name)]
    except DataError as error:
        return error.what
    return next((f"{file} does not exist" for file in files if not exists(file)), None)


def corpus_usage_json(stream: TrainStream) -> list[dict[str, str | float]]:
    """The same as `corpus_usage_table` shows, as plain values: one for each corpus of each stage."""
    return [
        {"stage": stage.name, **asdict(reading)} for index, stage in enumerate(stream.plan.stages) for reading in stream.corpus_usage(index)
    ]


def corpus_usage_table(stream: TrainStream) -> Table:
    """How much of each corpus each stage reads, and how often its training part has been read then."""
    table = Table(title="Data", title_justify="left", header_style="bold")
    for name in ("stage", "corpus", "tokens", "of the stage", "times read", "in all"):
        table.add_column(name, justify="left" if name in ("stage", "corpus") else "right", overflow="fold")
    for index, stage in enumerate(stream.plan.stages):
        corpus_usage = stream.corpus_usage(index)
        whole = sum(reading.tokens for reading in corpus_usage)
        for number, reading in enumerate(corpus_usage):
            table.add_row(
                stage.name if number == 0 else "",
                reading.corpus,
                format_count(reading.tokens),
                f"{reading.tokens / max(1, whole):.1%}",
                f"{reading.epochs:.3f}",
                f"{reading.epochs_by_end:.3f}",
            )
    return table
