"""The quick start without its long parts: the corpus, the commands, a second start, and the report."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.console import Console

from examples.quickstart import gather_corpus, run
from megatron_patch.config.resolve import load_config
from megatron_patch.training.callbacks.metrics import read_metrics
from megatron_patch.training.pauses import Interval
from tests.distributed.runs import make_corpus, train

EVALUATION = json.dumps({"loss": 4.2, "perplexity": 66.7, "tokens": 1234})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    plan = "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 3 --train-tokens 4200 --lr 3e-3 --eval-interval 4"
    return train(folder / "patch", 1, plan, "--data-path", make_corpus(folder / "walks"))


@pytest.fixture
def commands(monkeypatch):
    """Records the commands of the quick start instead of running them."""
    ran: list[tuple[str, list[str]]] = []

    def note(self, title, *words, capture=False):
        ran.append((title, [str(word) for word in words]))
        return {"Evaluate": EVALUATION, "Generate": "def main(args):\n    pass"}.get(title, "")

    monkeypatch.setattr(run.Steps, "run", note)
    return ran


def start(monkeypatch, home, *flags):
    """Starts the quick start and returns its output."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["run.py", "--output", str(home), *flags])
    monkeypatch.setattr(run, "make_console", lambda **_: Console(file=out, width=200, highlight=False))
    assert run.main() == 0
    return out.getvalue()


def test_complete_files_are_held_out_and_long_ones_are_split(tmp_path):
    root = tmp_path / "lib"
    (root / "site-packages").mkdir(parents=True)
    for number in range(40):
        (root / f"m{number}.py").write_text(
            f"# file {number}\n" + f"def f{number}():\n    return {number}\n" * (2000 if number == 0 else 20)
        )
    (root / "site-packages" / "left_out.py").write_text("x = 1\n" * 100)
    counts = gather_corpus.gather(root, tmp_path / "data")
    parts = {name: [json.loads(line) for line in (tmp_path / "data" / f"{name}.jsonl").open()] for name in ("train", "held_out")}
    files = {name: {row["path"] for row in rows} for name, rows in parts.items()}
    assert not files["train"] & files["held_out"] and len(files["train"] | files["held_out"]) == 40 and len(files["held_out"]) == 2
    assert counts["train_documents"] == len(parts["train"]) > 38, "the long file is several documents"
    assert all(len(row["text"]) < 2 * gather_corpus.MAX_CHARACTERS for rows in parts.values() for row in rows)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["held_out.jsonl", "train.jsonl"]


def test_the_first_start_prepares_trains_evaluates_and_plots(trained, tmp_path, monkeypatch, commands):
    pretrain = run.pretrain

    def finishing(steps, folders, name, title, *flags):
        save = pretrain(steps, folders, name, title, *flags)
        save.mkdir(parents=True)
        for file in ("metrics.jsonl", "latest"):
            (save / file).write_text((trained.folder / file).read_text())
        return save

    monkeypatch.setattr(run, "pretrain", finishing)
    text = start(monkeypatch, tmp_path, "--compare")
    scripts = [next((word for word in words if word.endswith(".py")), "") for _, words in commands]
    assert scripts == [
        "examples/quickstart/gather_corpus.py",
        "tools/train_tokenizer.py",
        *["tools/preprocess_data.py"] * 2,
        *["pretrain_gpt_patch.py"] * 2,
        "tools/evaluate.py",
        "tools/generate.py",
        "tools/plot.py",
        "tools/report.py",
    ]
    patch, token = (words[words.index("pretrain_gpt_patch.py") + 1 :] for _, words in commands if words[0] == "deepspeed")
    plans = [load_config([*words, "--vocab-size", "4096"], 2).plan for words in (patch, token)]
    assert [[stage.patch_size for stage in plan.stages] for plan in plans] == [[4, 1], [1]]
    spent = [record for record in read_metrics(trained.folder / "metrics.jsonl") if record["type"] == "step"][-1]["cost_tokens"]
    assert token[token.index("--train-tokens") + 1] == str(round(spent)), "the baseline has the compute of the run that it is compared with"
    assert "At equal cost" in text and "nats" in text


def test_the_switch_is_saved_once():
    """An interval that ended right after the switch would save almost the same weights again."""
    run_config = load_config(["--config", str(run.ROOT / run.CONFIG), "--vocab-size", "4096", "--dry-run"], 1)
    plan, options = run_config.plan, run_config.options.checkpoint
    every = Interval(options.save_interval, options.save_interval_tokens)
    near = plan.stages[0].steps // 20
    assert every.count(plan, 0, plan.stages[0].steps - near) == 1, "only at its end"
    assert every.count(plan, 1, 0) == every.count(plan, 1, near) == 2


def test_a_second_start_skips_finished_steps_and_reports_the_results(trained, monkeypatch, commands):
    home = trained.folder.parent
    text = start(monkeypatch, home)
    assert "is finished" in text and not [words for _, words in commands if words[0] == "deepspeed"]
    rows = run.stage_rows(trained.folder)
    steps = [record for record in read_metrics(trained.folder / "metrics.jsonl") if record["type"] == "step"]
    assert [row[0] for row in rows] == ["patch", "token", "total"] and [row[1] for row in rows] == ["3", "1", ""]
    assert sum(int(row[3]) for row in rows[:2]) == int(rows[2][3]) == len(steps)
    assert [row[7] for row in rows[:2]] == ["0.333", "1.000"] and rows[2][7] == f"{steps[-1]['cost']:.3f}"
    for row in rows:
        assert all(cell in text for cell in row)
    evaluation = [record for record in read_metrics(trained.folder / "metrics.jsonl") if record["type"] == "evaluation"][-1]
    text = " ".join(text.split())
    for words in (
        "loss 4.2000, perplexity 66.70, on 1,234 tokens",
        f"it was {evaluation['token_loss']:.3f} on {evaluation['eval_tokens']:,} tokens",
        "report.html (open it in a browser)",
        "def main(args):",
        "loss.png",
        (trained.folder / "latest").read_text().strip(),
        "make compare",
    ):
        assert words in text
