"""The plan's table of learning rates, with every length in all units, and the rates of kinds of parameters."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from megatron_patch.config.resolve import load_config
from megatron_patch.training.dry_run import lr_table, rates_by_kind
from tests.distributed.runs import command

BASE = "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --vocab-size 64 --seq-length 16 --global-batch-size 4 --lr 0.01 --dry-run"
TWO = "--recipe token-superposition --patch-size 4 --patch-compute-share 0.3 --train-tokens 121600"  # 300 steps of 256, 700 of 64 tokens


def rows(words, width=80):
    """Returns the cells of the table as it is printed at a width."""
    console = Console(file=io.StringIO(), width=width)
    console.print(lr_table(load_config([*command(BASE), *words.split()], 1).plan))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return [tuple(cell.strip() for cell in line.strip("│").split("│")) for line in lines if line.startswith("│")]


@pytest.mark.parametrize("warmup", ["--lr-warmup-steps 400", "--lr-warmup-tokens 83200"])
@pytest.mark.parametrize("decay", ["--lr-wsd-decay-steps 100", "--lr-wsd-decay-tokens 6400", "--lr-wsd-decay-fraction 0.1"])
def test_the_same_lengths_in_any_unit_are_printed_in_all_units(warmup, decay):
    assert rows(f"{TWO} {warmup} {decay}") == [
        ("patch", "warm-up", "to 0.01", "400", "83.2k", "40.0%", "68.4%"),
        ("", "constant", "0.01", "500", "32k", "50.0%", "26.3%"),
        ("", "linear decay", "to 0", "100", "6.4k", "10.0%", "5.3%"),
    ]


def test_lengths_inside_of_steps_and_schedules_one_after_the_other():
    first = '{"patch_size":4,"steps":8,"lr_warmup_tokens":300,"lr_decay_style":"cosine","min_lr":0.001}'
    others = '{"steps":16,"lr_policy":"rewarm","lr_warmup_steps":4},{"steps":4,"lr_decay_style":"constant"}'
    found = rows(f"--batch constant-positions --stages [{first},{others}]")
    assert found == [
        ("1-patch-4", "warm-up", "to 0.01", "1.2", "300", "4.9%", "9.8%"),
        ("", "cosine decay", "to 0.001", "22.8", "2.77k", "95.1%", "90.2%"),
        ("2-token", "rewarm", "x 0 to 1", "4", "256", "16.7%", "8.3%"),
        ("3-token", "constant", "0.01", "4", "256", "100.0%", "100.0%"),
    ]


def test_a_decay_may_end_before_and_after_the_run():
    assert rows("--train-tokens 6400 --lr-decay-steps 40 --lr-decay-style linear")[1:] == [
        ("", "minimum", "0", "60", "3.84k", "60.0%", "60.0%")
    ]
    (row,) = rows("--train-tokens 6400 --lr-decay-steps 150 --lr-decay-style linear")
    assert row[1:] == ("linear decay", "toward 0", "150", "9.6k", "150.0%", "150.0%")
    (row,) = rows("--train-tokens 6400 --lr-decay-steps 100k --lr-decay-style linear")
    assert row[1:] == ("linear decay", "toward 0", "100,000", "6.4M", "100,000.0%", "100,000.0%")


def kinds(words):
    return rates_by_kind(load_config([*command(BASE), "--train-tokens", "6400", *words.split()], 1).options.schedule)


def test_rates_of_kinds_are_printed_where_they_differ():
    assert kinds("") == kinds("--optimizer muon --muon-lr 0.01 --decoupled-lr 0.01") == ""
    assert kinds("--optimizer muon --muon-lr 0.02 --decoupled-lr 0.005 --embedding-weight-decay 0") == (
        "hidden matrices: lr 0.02 (--muon-lr), 2 times that of the schedule; "
        "word embeddings and head: lr 0.005 (--decoupled-lr), 0.5 times that of the schedule, weight decay 0 (--embedding-weight-decay); "
        "the others: lr 0.01, weight decay 0.1"
    )
    assert re.match("hidden matrices: weight decay 0.2 ", kinds("--optimizer muon --muon-weight-decay 0.2"))


def test_the_table_in_the_documents_is_what_a_dry_run_prints():
    root = Path(__file__).parents[2]
    shown = (root / "docs" / "method.md").read_text().partition("Learning rates\n")[2].partition("```")[0]
    run = load_config(["--config", str(root / "examples" / "replicate" / "token_superposition_270m.yaml"), "--dry-run"], 8)
    console = Console(file=io.StringIO(), width=80)
    console.print(lr_table(run.plan))
    assert console.file.getvalue() == f"Learning rates\n{shown}"
