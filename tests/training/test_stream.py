"""The data of a run: epochs of each corpus in each stage, their limits, and corpora that do not fit together."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from megatron_patch.cli import plan
from megatron_patch.config.resolve import load_config
from megatron_patch.data.dataset_metadata import DatasetMetadata, read_metadata, write_metadata
from megatron_patch.errors import ConfigError, DataError
from megatron_patch.parallel.grid import Grid
from megatron_patch.training.data import open_data
from megatron_patch.training.pretrain import main
from megatron_patch.training.stream import open_stream
from tests.data.streams import write_numbers

MODEL = [
    "--num-layers",
    "1",
    "--hidden-size",
    "32",
    "--num-attention-heads",
    "2",
    "--seq-length",
    "8",
    "--global-batch-size",
    "4",
    "--split",
    "1,0,0",
    "--vocab-size",
    "20000",
]
PATCHES = ["--patch-size", "4", "--patch-fraction", "0.5", "--train-tokens", "12800"]


@pytest.fixture
def corpora(tmp_path):
    """16,000 training tokens in one corpus, 4,000 in another, and 64 in each that are kept for labels."""
    return write_numbers(tmp_path / "web", 16_000 + 64), write_numbers(tmp_path / "code", 4_000 + 64)


def words(corpora, *more):
    return [*MODEL, *PATCHES, "--data-path", "0.5", corpora[0], "0.5", corpora[1], *more]


def metadata_file(prefix, tokens, eod=5, align=1):
    write_metadata(
        prefix, DatasetMetadata("NullTokenizer", "9", 20_000, eod, 1, tokens, "int32", True, False, align, 4 * tokens, 1, "", "")
    )


def test_a_dry_run_shows_the_epochs_of_each_corpus(corpora, capsys):
    assert main(words(corpora, "--dry-run")) == 0
    shown = capsys.readouterr().out
    table = [
        re.split(r"\s*│\s*", line.strip("│ ")) for line in shown[shown.index("Data") : shown.index("Ranks")].splitlines() if "│" in line
    ]
    read = [row[-4:] for row in table if re.fullmatch(r"\d\.\d+", row[-1])]
    assert [row[1:] for row in read] == [
        ["50.0%", "0.200", "0.200"],
        ["50.0%", "0.800", "0.800"],
        ["50.0%", "0.200", "0.400"],
        ["50.0%", "0.800", "1.600"],
    ]
    assert re.search(r"Note by the end of stage token the training part of \S+code\s+is\s+read\s+1\.60\s+times", shown)


def test_a_plan_shows_the_same(corpora, tmp_path, capsys):
    plan.main([*words(corpora), "--json"])
    rows = json.loads(capsys.readouterr().out)["data"]
    assert [(row["stage"], row["epochs"], row["epochs_by_end"]) for row in rows] == [
        ("patch", pytest.approx(0.2), pytest.approx(0.2)),
        ("patch", pytest.approx(0.8), pytest.approx(0.8)),
        ("token", pytest.approx(0.2), pytest.approx(0.4)),
        ("token", pytest.approx(0.8), pytest.approx(1.6)),
    ]
    assert [row["corpus"] for row in rows] == [*corpora, *corpora] and sum(row["tokens"] for row in rows) == 12_800
    plan.main(words(corpora))
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "epochs so far" in shown and "is read 1.60 times" in shown
    plan.main([*MODEL, *PATCHES, "--data-path", str(tmp_path / "none")])
    assert "epochs per corpus are unknown" in re.sub(r"\s+", " ", capsys.readouterr().out)
    with pytest.raises(DataError, match=r"read 1\.60 times"):
        plan.main(words(corpora, "--max-epochs", "1.5"))


def test_a_dry_run_needs_no_data(tmp_path, capsys):
    assert main([*MODEL, *PATCHES, "--data-path", str(tmp_path / "none"), "--dry-run"]) == 0
    assert "none.bin does not exist" in re.sub(r"\s+", " ", capsys.readouterr().out)
    assert main([*MODEL, *PATCHES, "--dry-run"]) == 0
    assert "no --data-path" in capsys.readouterr().out


@pytest.mark.parametrize(("limits", "refused"), [(["2"], False), (["1"], True), (["1", "{code}=1.6"], False), (["{code}=1.5"], True)])
def test_epoch_limits_are_checked(corpora, limits, refused):
    run = load_config(words(corpora, "--max-epochs", *(limit.format(code=corpora[1]) for limit in limits)), 1)
    if refused:
        with pytest.raises(DataError, match=r"stage token the training part of .*code is read 1\.60 times"):
            open_stream(run, run.plan)
    else:
        assert open_stream(run, run.plan).corpus_usage(1)[1].epochs_by_end == pytest.approx(1.6)


@pytest.mark.parametrize("limits", [["0"], ["two"], ["1", "2"], ["other=1"], ["nan"]])
def test_invalid_epoch_limits_are_refused(corpora, limits):
    with pytest.raises(ConfigError, match="--max-epochs"):
        load_config(words(corpora, "--max-epochs", *limits), 1)


def test_corpora_with_different_end_of_document_tokens_are_refused(corpora):
    metadata_file(corpora[0], 16_064, eod=5)
    metadata_file(corpora[1], 4_064, eod=6)
    run = load_config(words(corpora), 1)
    with pytest.raises(DataError, match="differ in eod_id: 5 and 6"):
        open_data(run, run.plan, Grid(0, 1, 1, 1))


def test_held_out_data_must_have_the_same_end_of_document_token(corpora):
    metadata_file(corpora[0], 16_064, eod=5)
    metadata_file(corpora[1], 4_064, eod=6)
    run = load_config([*MODEL, *PATCHES, "--data-path", corpora[0], "--valid-data-path", corpora[1]], 1)
    with pytest.raises(DataError, match="differ in eod_id: 5 and 6"):
        open_data(run, run.plan, Grid(0, 1, 1, 1))


def test_another_end_of_document_token_than_the_metadata_file_s_is_refused(corpora):
    metadata_file(corpora[0], 16_064, eod=5)
    for given, refused in ((5, False), (6, True)):
        run = load_config([*MODEL, *PATCHES, "--data-path", corpora[0], "--eod-token-id", str(given)], 1)
        if refused:
            with pytest.raises(DataError, match=r"--eod-token-id 6, but the documents of .*web end with 5"):
                open_data(run, run.plan, Grid(0, 1, 1, 1))
        else:
            assert open_data(run, run.plan, Grid(0, 1, 1, 1)).masking.eod_id == 5


def test_the_end_of_document_token_is_known_from_any_metadata_file(corpora):
    """The first corpus has no metadata file, and the second is padded with the token."""
    metadata_file(corpora[1], 4_064, eod=6, align=4)
    run = load_config(words(corpora), 1)
    masking = open_data(run, run.plan, Grid(0, 1, 1, 1)).masking
    assert (masking.eod_id, masking.ignore_repeated_eod) == (6, True)


def test_corpora_of_different_tokenizers_are_noted(corpora):
    for prefix, tokens, digest in ((corpora[0], 16_064, "a"), (corpora[1], 4_064, "b")):
        metadata_file(prefix, tokens)
        write_metadata(prefix, replace(read_metadata(prefix), tokenizer_model=f"{digest}.json", tokenizer_xxh64=digest))
    run = load_config(words(corpora), 1)
    assert [note for note in open_stream(run, run.plan).notes() if "was tokenized with a.json" in note and "with b.json" in note]
    write_metadata(corpora[1], replace(read_metadata(corpora[1]), tokenizer_xxh64="a"))
    assert not [note for note in open_stream(run, run.plan).notes() if "tokenized" in note]


@pytest.mark.parametrize(("align", "noted"), [(4, False), (8, False), (6, True)])
def test_patches_that_do_not_fit_the_alignment_are_noted(corpora, align, noted):
    metadata_file(corpora[0], 16_064, align=align)
    metadata_file(corpora[1], 4_064)
    run = load_config(words(corpora), 1)
    stream = open_stream(run, run.plan)
    assert [note for note in stream.notes() if "aligned" in note] == (
        [f"the documents of {corpora[0]} are aligned to 6 tokens, so patches of 4 in stage patch may contain tokens of two documents"]
        if noted
        else []
    )
    assert open_data(run, run.plan, Grid(0, 1, 1, 1)).masking.ignore_repeated_eod


def notes_of(*more):
    run = load_config([*MODEL, *PATCHES, *more], 1)
    data = open_data(run, run.plan, Grid(0, 1, 1, 1))
    return [(one.name, one.weight) for one in data.held_out], data.notes()


def test_a_corpus_without_enough_held_out_tokens_is_named_and_its_weight_goes_to_the_others(corpora, tmp_path):
    """An evaluation reads samples of 32 tokens, and 64 more for the last labels."""
    tiny = write_numbers(tmp_path / "tiny", 95)
    held_out, notes = notes_of("--data-path", corpora[0], "--valid-data-path", "0.25", tiny, "0.25", corpora[1], "0.5", corpora[0])
    assert held_out == [("code", 0.25), ("web", 0.5)]
    assert notes[-2].startswith(
        "tiny is not evaluated and its weight goes to the other corpora: it has 95 held-out tokens, and an evaluation"
    )
    assert "needs 96" in notes[-2] and "--valid-data-path" in notes[-2]
    assert notes[-1] == "the held-out loss is 0.3333 × code + 0.6667 × web"
    assert notes_of("--data-path", corpora[0], "--valid-data-path", tiny) == (
        [],
        ["no evaluation: the held-out part of the data is shorter than one sample (use --valid-data-path or another --split)"],
    )


def test_the_held_out_loss_has_the_weights_of_the_blend(corpora):
    held_out, notes = notes_of("--data-path", "3", corpora[0], "1", corpora[1], "--split", "80,20,0")
    assert held_out == [("web", 0.75), ("code", 0.25)] and notes[-1] == "the held-out loss is 0.75 × web + 0.25 × code"
    held_out, notes = notes_of("--data-path", *corpora, "--split", "80,20,0")
    assert held_out == [("web", None), ("code", None)]
    assert notes[-1] == "the held-out loss counts each evaluated token of web, code the same"


def test_a_corpus_that_only_a_stage_reads_is_not_evaluated_and_is_named(corpora):
    stages = json.dumps([{"patch_size": 4, "token_share": 0.5, "data_path": list(corpora)}, {"patch_size": 1}])
    plan = ["--stages", stages, "--train-tokens", "12800", "--split", "80,20,0"]
    run = load_config([*MODEL, *plan, "--data-path", corpora[0]], 1)
    data = open_data(run, run.plan, Grid(0, 1, 1, 1))
    assert [one.name for one in data.held_out] == ["web"]
    assert f"{corpora[1]} is not evaluated, because only a stage names it (use --valid-data-path)" in data.notes()


@pytest.mark.parametrize("flag", ["--data-path", "--valid-data-path", "data_path"])
def test_a_dataset_inside_of_another_corpus_is_named(corpora, tmp_path, flag):
    listed = tmp_path / "list"
    listed.write_text("./web\n./code\n")
    blend = ["0.5", f"@{listed}", "0.5", corpora[1]]
    stages = json.dumps([{"patch_size": 4, "token_share": 0.5, "data_path": blend}, {"patch_size": 1}])
    flags = {
        "--data-path": [*PATCHES, "--data-path", *blend],
        "--valid-data-path": [*PATCHES, "--data-path", corpora[0], "--valid-data-path", *blend],
        "data_path": ["--stages", stages, "--train-tokens", "12800", "--data-path", corpora[0]],
    }
    run = load_config([*MODEL, *flags[flag]], 1)
    notes = open_data(run, run.plan, Grid(0, 1, 1, 1)).notes()
    named = "--valid-data-path: " if flag.startswith("--valid") else ""
    assert [note for note in notes if note.startswith(f"{named}@{listed} and {corpora[1]} share the dataset ")]


def test_data_that_is_trained_on_and_held_out_is_named(corpora, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    linked = f"{tmp_path}/link/web"
    _, notes = notes_of("--data-path", corpora[0], "--valid-data-path", linked, corpora[1])
    assert f"{linked} is in the training data and in --valid-data-path {linked}" in notes[0]
    stages = json.dumps([{"patch_size": 4, "token_share": 0.5, "data_path": linked}, {"patch_size": 1}])
    run = load_config([*MODEL, "--stages", stages, "--train-tokens", "12800", "--data-path", corpora[0]], 1)
    notes = open_data(run, run.plan, Grid(0, 1, 1, 1)).notes()
    assert [note for note in notes if f"web and {linked} share the dataset {linked}" in note]
