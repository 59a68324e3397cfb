"""Comparison of studies: from records alone, by optimizer, and the number of steps from which an arm is level with token level."""

from __future__ import annotations

import pytest

from megatron_patch.cli import compare_studies
from megatron_patch.replication.comparison import crossing
from megatron_patch.replication.records import RunRecord, StudyHeader, StudyText, write_records
from megatron_patch.replication.results import Outcome


def records_of(path, budget, gaps, seeds=(1, 2)):
    """Writes the records of a study: token level at 4 + seed with AdamW and 3.5 + seed with Muon, patch arms at a distance."""
    header = StudyHeader({"global-batch-tokens": 1000}, budget, 300, 7000, StudyText(25, 9000, 300, "0123456789abcdef"))
    losses = {"token-wsd-long": 4.0, "muon-token-wsd-long": 3.5}
    losses |= {name: losses["muon-token-wsd-long" if name.startswith("muon") else "token-wsd-long"] + gap for name, gap in gaps.items()}
    runs = []
    for name, loss in losses.items():
        for seed in seeds:
            end, tokens = loss + seed + (0.01 * seed if "superposition" in name else 0.0), budget * (2 if "superposition" in name else 1)
            outcome = Outcome(name, seed, tokens, float(budget), budget // 1000, end, 60.0, ((float(budget), end),))
            runs.append(RunRecord(outcome, {}, "0123abc", "2 CPU cores", "2026-11-30"))
    write_records(path, header, runs)


def test_records_are_compared_by_optimizer_and_length(tmp_path, capsys):
    k4, muon = "superposition-k4-long", "muon-superposition-k4-long"
    records_of(tmp_path / "short.jsonl", 1_000_000, {k4: 0.3, muon: 0.1, f"{muon}+decoupled-lr=0.1": 0.0})
    records_of(tmp_path / "long.jsonl", 10_000_000, {k4: 0.1, muon: -0.115, f"{muon}+decoupled-lr=0.1": 0.0})
    docs = tmp_path / "docs.md"
    docs.write_text("<!-- optimizers -->\n<!-- end of optimizers -->\n")
    words = [tmp_path / "long.jsonl", tmp_path / "short.jsonl", "--output", tmp_path / "out", "--docs", docs, "--docs-name", "optimizers"]
    compare_studies.main([str(word) for word in words])
    shown = capsys.readouterr().out
    assert f"| `{muon}` | +0.115 ± 0.005 (n = 2) | -0.100 ± 0.005 (n = 2) |" in shown and "decoupled" not in shown
    # Between 1,000 and 10,000 steps, +0.115 and -0.100 are level 0.535 of the way on a logarithmic scale.
    assert f"| `{muon}` | 7k | 1k | +0.115 at 1,000 (n = 2), -0.100 at 10,000 (n = 2) | about 3,400 |" in shown
    assert f"| `{k4}` | 7k | 1k | +0.315 at 1,000 (n = 2), +0.115 at 10,000 (n = 2) | more than 10,000 |" in shown
    assert "![held-out loss minus the baseline's at equal cost, by steps of the run](optimizers.png)" in docs.read_text()
    assert (tmp_path / "optimizers.png").stat().st_size > 10_000


def test_studies_of_one_length_are_compared_without_a_crossing(tmp_path, capsys):
    arms = {"superposition-k4-long": 0.3, "mine": 0.0, "mine+lr=0.1": 0.0}
    for name in ("one.jsonl", "two.jsonl"):
        records_of(tmp_path / name, 1_000_000, arms)
    compare_studies.main([str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl"), "--output", str(tmp_path / "out")])
    shown = capsys.readouterr()
    assert shown.out.count("+0.315 ± 0.005 (n = 2)") == 2 and "level from steps" not in shown.out
    for name in ("one.jsonl", "two.jsonl"):
        assert f"{tmp_path / name}: left out, as this program has no such arm: mine, mine+lr=0.1\n" in shown.err


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([(100, -0.1), (1000, -0.2)], "100 or fewer"),
        ([(100, 0.1), (1000, -0.1)], "about 320"),
        ([(100, -0.1), (1000, 0.1), (10_000, 0.0)], "about 10,000"),
        ([(100, 0.1), (1000, 0.2)], "more than 1,000"),
    ],
)
def test_a_crossing_is_where_the_last_gap_above_zero_closes(points, words):
    assert crossing(points) == words
