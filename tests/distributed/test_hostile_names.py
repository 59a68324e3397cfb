"""A whole run with hostile names on an output in ASCII: names are text, and no character ends the run."""

from __future__ import annotations

import json
import re
import sys

from tests.distributed.runs import make_corpus, printed, train

PLAN = "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --train-tokens 2400 --lr 3e-3 --eval-interval 4 --log-interval 3"
NAME = "a[/b]\x1b[2J\nexit code 0: done\u202eλ"
SHOWN = r"a[/b]\x1b[2J\nexit code 0: done\u202elambda"


def start_in_ascii(argv):
    """Runs the program with standard output in ASCII, as in an old terminal or a job without a locale."""
    from megatron_patch.training.pretrain import main

    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    sys.stdout.reconfigure(encoding="ascii", errors="strict")
    try:
        return main(argv)
    finally:
        sys.stdout.reconfigure(encoding=encoding, errors=errors)


def test_a_run_with_hostile_names_prints_them_as_text(tmp_path):
    corpus = tmp_path / "mk[/x]\n[link=evil]" / NAME
    corpus.parent.mkdir(parents=True)
    stages = [{"name": NAME, "patch_size": 3, "token_share": 0.5}, {"name": "t]\\", "patch_size": 1, "lr_policy": "continue"}]
    run = train(
        tmp_path / f"[bold]x[\n]{NAME.replace('/', '')}",
        1,
        PLAN,
        ["--data-path", "0.5", make_corpus(corpus), "0.5", make_corpus(tmp_path / "plain"), "--stages", json.dumps(stages)],
        main=start_in_ascii,
    )
    text = printed(run.folder)
    assert text.isascii() and not re.search(r"\x1b|^exit code", text, re.M)
    lines = text.splitlines()
    assert sum(f"switch: stage {SHOWN} (K = 3) -> t]\\ (K = 1)" in line for line in lines) == 1
    assert sum(rf"saved {tmp_path}/[bold]x[\n]" in line for line in lines) == 2
    assert any(line.startswith("Data ") and rf"mk[/x]\n[link=evil]/{SHOWN} (50.0%)" in line for line in lines)
    assert any("lambda/K + 1 - lambda" in line for line in lines) and any(line.startswith("| ") for line in lines)
    assert any(re.match(r" {8} b\]\\x1b\[2J\\nexit code 0: done\\u202elambda +50\.0%  token loss", line) for line in lines)
    assert any(line.startswith("  report ") and "--output " in line for line in lines)
