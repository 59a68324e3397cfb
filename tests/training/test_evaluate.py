"""The held-out loss of corpora of which labels are masked, and of a single corpus."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_patch.config.resolve import load_config
from megatron_patch.data.collate import IGNORE_INDEX
from megatron_patch.data.dataset_metadata import DatasetMetadata, write_metadata
from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.engine.interface import EvaluationResult
from megatron_patch.parallel.grid import Grid
from megatron_patch.training.data import open_data
from megatron_patch.training.evaluate import held_out_losses

EOD = 9
FLAGS = (
    "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 8 --global-batch-size 4 --vocab-size 64 --patch-size 2 "
    "--patch-fraction 0.5 --train-tokens 256 --eod-mask-loss --eod-token-id 9"
)


def corpus(prefix, document, documents):
    """Writes copies of a document, padded as if for patches, and returns its prefix."""
    with IndexedDatasetWriter(str(prefix), np.dtype(np.int32)) as writer:
        writer.append(np.array(document * documents, np.int32), np.full(documents, len(document)))
        writer.finish()
    tokens = len(document) * documents
    metadata = DatasetMetadata("NullTokenizer", "63", 64, EOD, documents, tokens, "int32", True, False, 2, 4 * tokens, 1, "", "")
    write_metadata(str(prefix), metadata)
    return str(prefix)


def losses(folder, *words):
    """The losses of an engine for which the loss of a label is its token id."""
    run = load_config([*FLAGS.split(), "--data-path", corpus(folder / "train", [1, 2, 3, EOD], 300), "--valid-data-path", *words], 1)
    data = open_data(run, run.plan, Grid(0, 1, 1, 1))

    def result(batches):
        labels = np.concatenate([batch.labels.numpy().reshape(-1) for batch in batches])
        scored = labels[labels != IGNORE_INDEX]
        return EvaluationResult(float(scored.mean()) if scored.size else math.nan, scored.size)

    def evaluate(batches):
        numbers = {batch.corpus for batch in batches}
        parts = {number: result([batch for batch in batches if batch.corpus == number]) for number in numbers}
        return EvaluationResult(result(batches).loss, result(batches).labels, parts)

    stage = run.plan.stages[0]
    return held_out_losses(SimpleNamespace(evaluate=evaluate), data, stage, 8, 512, lambda: None)


def test_the_weight_of_a_corpus_whose_labels_are_masked_goes_to_the_others(tmp_path):
    """At K = 2, each label of documents of two tokens belongs to another document than the patch before it."""
    words = ["0.5", corpus(tmp_path / "long", [4] * 60, 20), "0.25", corpus(tmp_path / "pairs", [7, EOD], 300)]
    found = losses(tmp_path, *words, "0.25", corpus(tmp_path / "ends", [EOD] * 2, 300))
    assert found.patch_loss == pytest.approx(4) and found.corpora["pairs"].token_loss == EOD
    assert found.token_loss == pytest.approx(4 * 2 / 3 + EOD / 3)
    assert [part.weight for part in found.corpora.values()] == pytest.approx([2 / 3, 1 / 3, 0])
    assert math.isnan(found.corpora["ends"].token_loss) and found.corpora["ends"].eval_tokens == 0
    text = "the held-out loss at K = {} has no part of {}: each of its labels is masked at an end of a document"
    expected = [(1, "ends"), (2, "pairs"), (2, "ends")]
    assert found.notes == tuple(text.format(k, name) + "; its weight goes to the other corpora" for k, name in expected)


def test_without_any_label_the_loss_is_not_a_number(tmp_path):
    ends = [corpus(tmp_path / name, [EOD] * 2, 300) for name in ("a", "b")]
    for words in (ends, ["1", ends[0], "3", ends[1]]):
        found = losses(tmp_path, *words)
        assert math.isnan(found.token_loss) and math.isnan(found.patch_loss) and len(found.notes) == 4


@pytest.mark.parametrize("weight", [[], ["2"]])
def test_a_single_corpus_has_its_own_entry(tmp_path, weight):
    found = losses(tmp_path, *weight, corpus(tmp_path / "one", [4, 4, 5, EOD], 300))
    (part,) = found.corpora.values()
    assert (part.weight, part.token_loss, part.patch_loss, part.eval_tokens) == (1, found.token_loss, found.patch_loss, found.labels)
    assert list(found.corpora) == ["one"] and found.notes == ()
