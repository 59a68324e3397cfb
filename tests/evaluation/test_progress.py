"""The progress of an evaluation is on standard error; standard output has its result alone."""

from __future__ import annotations

from megatron_patch.cli.evaluation_progress import EvaluationProgress


def test_the_first_line_says_what_it_reads_and_later_ones_what_is_left(capsys):
    times = iter((0.0, 1.0, 2.0, 3.0, 11.0, 12.0))
    progress = EvaluationProgress(10_000, clock=lambda: next(times))
    progress.begin("evaluating 10k tokens at K = 1")
    for _ in range(5):
        progress.add(1000)
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [
        "evaluating 10k tokens at K = 1",
        "20.0%: 2k tokens in 2 s, 1k tokens/s, about 8 s left",
        "50.0%: 5k tokens in 12 s, 417 tokens/s, about 12 s left",
    ]


def test_an_amount_in_bytes_and_an_unknown_one(capsys):
    for total, line in ((400, "25.0%: 10 tokens in 4 s, 2.5 tokens/s, about 12 s left"), (None, "10 tokens in 4 s, 2.5 tokens/s")):
        progress = EvaluationProgress(total, clock=iter((0.0, 4.0)).__next__)
        progress.begin("evaluating text\nof others")
        progress.add(10, 100)
        assert capsys.readouterr().err == f"evaluating text\\nof others\n{line}\n"


def test_only_the_first_rank_prints(capsys):
    progress = EvaluationProgress(10, shown=False, clock=lambda: 0.0)
    progress.begin("evaluating")
    progress.add(10)
    assert capsys.readouterr() == ("", "")
