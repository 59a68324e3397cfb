"""Runs the examples of docs/extending.md as they are written, one after another in one folder, and checks what each did."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest

from megatron_patch.checkpoint.safetensors_io import read_header
from megatron_patch.data.dataset_metadata import read_metadata
from megatron_patch.data.indexed_dataset import IndexedDataset
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Run

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
SENTENCES = ["Once upon a time there was a cat. ", "The dog sat on the log, ", "and the cat sat on the mat. "]


def section(title: str) -> str:
    """The text of a section."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]


def files(text: str) -> dict[str, str]:
    """The code blocks whose first line names a file: its name and its text."""
    return dict(re.findall(r"^```\w+\n# (\w+\.(?:py|yaml))\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def commands(text: str) -> list[str]:
    """The commands of a section, with continued lines joined."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line[2:] for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def _python(folder: str, argv: list[str]) -> int | str | None:
    """What `python FILE …` does in a folder, on a rank of one; the exit code."""
    import os

    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The reader's folder: all files of the page, some text, and the repository's programs."""
    home = tmp_path_factory.mktemp("reader")
    for name, text in files(PAGE).items():
        (home / name).write_text(text)
    for name in ("tools", "examples"):
        (home / name).symlink_to(ROOT / name)
    lines = ["".join(SENTENCES[(n + m) % 3] for m in range(5 + n % 4)) for n in range(200)]
    (home / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return home


@pytest.fixture(scope="module")
def run(folder):
    """Runs a section's commands once; returns what they printed."""

    @cache
    def run_section(title: str) -> str:
        printed = []
        for number, line in enumerate(commands(section(title))):
            words = shlex.split(line)
            assert words[0] == "python", line
            logs = folder / "logs" / f"{title} {number}"
            assert run_ranks(_python, 1, logs, str(folder), words[1:]) == [0], (logs / "rank-0.log").read_text()
            printed.append((logs / "rank-0.log").read_text())
        return "\n".join(printed)

    # Everything but the first section reads the data that it makes.
    run_section("A tokenizer")
    return run_section


def first_plan(folder: Path, save: str) -> list[dict]:
    """The stages in the first checkpoint of a run."""
    return json.loads(min((folder / save).glob("step-*/trainer_state.json")).read_text())["plan"]["stages"]


def test_every_section_has_code_a_command_and_says_where_the_code_is():
    titles = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert len(titles) == 7
    for title in titles:
        text = section(title)
        assert any(name.endswith(".py") for name in files(text)) and commands(text), title
        assert "- **Code**: " in text and "- **Tests to add upstream**: " in text, title


def test_a_tokenizer(folder, run):
    run("A tokenizer")
    prefix = str(folder / "my_text_document")
    dataset, metadata = IndexedDataset(prefix), read_metadata(prefix)
    first = json.loads((folder / "text.jsonl").read_text().splitlines()[0])["text"]
    assert dataset[0].tolist() == [*first.encode(), 256]
    assert (metadata.tokenizer_type, metadata.vocab_size, metadata.eod_id) == ("Bytes", 257, 256)


def test_a_callback(folder, run):
    run("A callback")
    last = Run(folder / "runs" / "callback").records("step")[-1]
    written = json.loads((folder / "runs" / "callback" / "heartbeat.json").read_text())
    assert {name: written[name] for name in ("step", "stage")} == {"step": last["step"], "stage": "token"}
    assert written["loss"] == last["loss"]


def test_an_optimizer(folder, run):
    run("A callback")
    run("An optimizer")
    adamw, lion = (Run(folder / "runs" / name).losses for name in ("callback", "optimizer"))
    assert lion[0] == adamw[0] and lion[-1] < lion[0] and lion[-1] != pytest.approx(adamw[-1], rel=1e-6)
    state = read_header(next((folder / "runs" / "optimizer").glob("step-*/state-*.safetensors")))
    assert {name.partition("/")[0] for name in state} == {"exp_avg", "weight"}


def test_position_weights(folder, run):
    run("Position weights")
    raw = [(k + 1) ** -0.5 for k in range(4)]
    assert first_plan(folder, "runs/weights")[0]["position_weights"] == pytest.approx([4 * weight / sum(raw) for weight in raw])


def test_a_recipe(run):
    printed = run("A recipe")
    assert re.findall(r"\bK[421]\b", printed)[:3] == ["K4", "K2", "K1"]


def test_a_model_family(folder, run):
    run("A model family")
    config = json.loads((folder / "exported" / "config.json").read_text())
    assert config["architectures"] == ["SeedOssForCausalLM"] and config["attention_bias"] is True and config["rms_norm_eps"] == 1e-6
    assert list((folder / "exported").glob("*.safetensors"))


def test_an_arm_of_the_study(run):
    printed = run("An arm of the study")
    assert "20.6M" in printed and "patches of 6 for half of the tokens" in printed and "2 arms x 3 seeds" in printed
