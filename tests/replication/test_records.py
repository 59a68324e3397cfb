"""Records of runs: they survive a round trip, name what differs, and let a clone without run folders continue a study."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import yaml

from megatron_patch.cli import study
from megatron_patch.errors import ConfigError, DataError
from megatron_patch.programs import shipped
from megatron_patch.replication import origin
from megatron_patch.replication.arms import all_arms, select_arms
from megatron_patch.replication.devices import machine
from megatron_patch.replication.records import RunRecord, StudyHeader, StudyText, read_records, write_records
from megatron_patch.replication.results import Outcome
from megatron_patch.replication.study import Study
from megatron_patch.replication.switches import Switch

CONFIG = """
num-layers: 1
hidden-size: 16
num-attention-heads: 2
ffn-hidden-size: 32
train-tokens: 2048
seq-length: 16
micro-batch-size: 4
global-batch-tokens: 128
lr: 1e-2
min-lr: 1e-3
eval-tokens: 512
study:
  vocab-size: 300
  optimizers:
    adamw: {lr: 1e-2}
    muon: {lr: 2e-2, decoupled-lr: 1e-2}
  arms: [muon-superposition-k2-long]
"""
HEADER = StudyHeader({"lr": "1e-2"}, 2048, 300, 7000, StudyText(25, 9000, 300, "0123456789abcdef"))
OUTCOME = Outcome(
    "token-wsd-long", 2, 2048, 2048.0, 16, 4.25, 3.5, ((128.0, 5.5), (2048.0, 4.25)), Switch(600.0, 5.0, 4.9, 5.1), ((60, 5.0), (62, 4.5))
)
RECORD = RunRecord(OUTCOME, {"--recipe": "token-level"}, "0123abc", "2 CPU cores", "2026-11-30")


def test_records_survive_a_round_trip(tmp_path):
    path = tmp_path / "records" / "study.jsonl"
    runs = [RECORD, replace(RECORD, outcome=replace(OUTCOME, seed=3, switch=None, training=()))]
    write_records(path, HEADER, runs)
    assert read_records(path) == (HEADER, runs)
    for damage in (
        lambda text: text[:-30],
        lambda text: text.replace('"seed":2', '"seed":"2"'),
        lambda text: text.replace('"seed":3,', ""),
    ):
        write_records(path, HEADER, runs)
        path.write_text(damage(path.read_text()))
        with pytest.raises(DataError, match=r"study\.jsonl, line [23]: .*\n.*Allowed: a first line with the study"):
            read_records(path)
    path.write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_records(path)


def test_an_optimizer_is_an_axis_of_the_arms():
    arms = all_arms(1e-2, 128, optimizers={"adamw": {}, "muon": {"lr": 2e-2}}, min_lr_share=0.1)
    names = [arm.name for arm in arms]
    assert len(names) == len(set(names)) and {f"muon-{arm.name}" for arm in arms if arm.optimizer == "adamw"} <= set(names)
    token, patches = select_arms(["muon-superposition-k4-reset-long"], arms)
    assert (token.name, patches.baseline, token.baseline) == ("muon-token-wsd-long", "muon-token-wsd-long", "muon-token-wsd")
    assert patches.options["--optimizer"] == "muon" and (patches.options["--lr"], patches.options["--min-lr"]) == ("0.02", "0.002")
    assert [stage.get("optimizer") for stage in json.loads(patches.options["--stages"])] == [None, "reset"]
    # An arm about the learning rate scales that of its optimizer; an option of a name changes one arm and keeps its baseline.
    assert select_arms(["muon-token-lr-half"], arms)[-1].options["--lr"] == "0.01"
    plain, changed = select_arms(["muon-superposition-k2-long+lr=0.04+decoupled-lr=0.01"], arms, 0.1)
    assert changed.baseline == plain.name == "muon-token-wsd-long" and changed.way == "superposition-k2-long+lr=0.04+decoupled-lr=0.01"
    assert [changed.options[f"--{name}"] for name in ("lr", "min-lr", "decoupled-lr")] == ["0.04", "0.004", "0.01"]
    assert [arm.name for arm in select_arms(["token-wsd-long+lr=0.04"], arms)] == ["token-wsd-long", "token-wsd-long+lr=0.04"]
    for wrong in (
        "token+lr",
        "token+=3",
        "token+patch_size=8",
        "token+hidden-size=128",
        "token+optimizer=muon",
        "token+lr=fast",
        "token+lr=0",
    ):
        with pytest.raises(ConfigError, match="an option other than train-tokens, seed"):
            select_arms([wrong], arms)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with text, configuration and the records of a study of two arms, whose run folders were removed."""
    home = tmp_path_factory.mktemp("study")
    words = [f"the {name} of the {thing} went to the {place}" for name in "abcdefgh" for thing in "klmnop" for place in "qrstuvw"]
    lines = (json.dumps({"text": ". ".join(words[start:] + words[:start])}) + "\n" for start in range(0, 300, 12))
    (home / "text.jsonl").write_text("".join(lines))
    (home / "tiny.yaml").write_text(CONFIG)
    run(home, "first", "--text", home / "text.jsonl", "--seeds", "1", "--parallel", "2")
    shutil.copy(home / "first" / "study.md", home / "first.md")
    folder = home / "first" / "runs" / "muon-token-wsd-long-seed1"
    assert origin.read_origin(folder) == (origin.program_commit(), machine())
    shutil.rmtree(home / "first")
    return home


def run(home, output, *words, config="tiny.yaml"):
    flags = ["--output", home / output, "--config", home / config, "--records", home / "records.jsonl", *words]
    study.main([str(word) for word in flags])


@pytest.mark.timeout(900)
def test_a_clone_continues_from_records(trained, tmp_path, capsys):
    records = trained / "records.jsonl"
    first = records.read_text()
    header, runs = read_records(records)
    assert [record.run for record in runs] == [("muon-token-wsd-long", 1), ("muon-superposition-k2-long", 1)]
    assert runs[1].options["--lr"] == "2e-2" and runs[1].options["--decoupled-lr"] == "1e-2" and header.text.documents == 25
    assert {(record.commit, record.machine) for record in runs} == {(origin.program_commit(), machine())} and len(first) < 10_000
    command = next(line for line in (trained / "first.md").read_text().splitlines() if line.startswith("python "))
    assert "--vocab-size" not in command
    run(trained, "clone", "--status")
    assert records.read_text() == first and "2 runs finished" in capsys.readouterr().out
    assert (trained / "clone" / "study.md").read_text() == (trained / "first.md").read_text().replace("runs/first", "runs/clone")
    assert (trained / "clone" / "switch.png").stat().st_size > 5_000
    run(trained, "clone", "--text", trained / "text.jsonl", "--seeds", "1", "--arms", "muon-token-wsd-long+lr=0.005")
    shown = capsys.readouterr().out
    assert "muon-token-wsd-long, seed 1" not in shown and "muon-token-wsd-long+lr=0.005, seed 1" in shown and "3 runs finished" in shown
    assert records.read_text().startswith(first) and len(records.read_text().splitlines()) == 4
    # The dataset that the clone tokenized is the recorded one; with another text nothing is trained.
    (tmp_path / "other.jsonl").write_text('{"text": "%s"}\n' % ("another text " * 3000))
    with pytest.raises(
        ConfigError, match=r"another study: text\.checksum is \w+ here and \w+ in the records; text\.documents is 1 here and 25"
    ):
        run(trained, "other", "--text", tmp_path / "other.jsonl", "--seeds", "3")


@pytest.mark.timeout(900)
def test_records_of_other_settings_name_what_differs(trained):
    (trained / "other.yaml").write_text(CONFIG.replace("hidden-size: 16", "hidden-size: 32").replace("ffn-hidden-size: 32\n", ""))
    with pytest.raises(
        ConfigError,
        match=r"another study: config\.ffn-hidden-size is not set here and 32 in the records; config\.hidden-size is 32 here and 16 in",
    ):
        run(trained, "clone", "--status", config="other.yaml")
    (trained / "rate.yaml").write_text(CONFIG.replace("muon: {lr: 2e-2", "muon: {lr: 4e-2"))
    with pytest.raises(
        ConfigError, match=r"arm muon-token-wsd-long, seed 1, has other options: --lr is 4e-2 now and was 2e-2 then; --min-lr is 0\.004 now"
    ):
        run(trained, "clone", "--status", config="rate.yaml")
    (trained / "wrong.yaml").write_text(CONFIG.replace("arms: [", "arm: ["))
    with pytest.raises(ConfigError, match=r"wrong\.yaml: study is .*\n.*Allowed: arms: a list of names; optimizers: a mapping"):
        run(trained, "clone", "--status", config="wrong.yaml")


def test_wrong_rates_of_a_configuration_are_named_at_once(tmp_path):
    (tmp_path / "wrong.yaml").write_text(CONFIG.replace("\nlr: 1e-2", "\nlr: fast").replace("min-lr: 1e-3", "min-lr: -1"))
    with pytest.raises(ConfigError, match=r"wrong.yaml: lr is 'fast' and min-lr is -1\n.*\n.*correct the file"):
        study.main(["--plan", "--config", str(tmp_path / "wrong.yaml"), "--output", str(tmp_path / "study")])


def test_a_plan_does_not_read_the_folder_which_may_hold_another_study(tmp_path, capsys):
    (tmp_path / "study.yaml").write_text(CONFIG.replace("min-lr: 1e-3", "min-lr: 0"))
    (tmp_path / "settings.json").write_text('{"text": ["another.jsonl"], "budget": 7}')
    words = ["--config", str(tmp_path / "study.yaml"), "--output", str(tmp_path)]
    study.main([*words, "--plan"])
    assert "2 arms x 3 seeds = 6 runs" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="holds a study with another"):
        study.main([*words, "--status"])


def test_all_wrong_options_of_optimizers_are_named_at_once(tmp_path):
    optimizers = "{moun: {lr: 0.1}, muon: {lr: fast, momentum: [1]}, adamw: {lr: null, seed: 3, patch_size: 8, min-lr: 0}}"
    (tmp_path / "wrong.yaml").write_text(f"{CONFIG.partition('study:')[0]}study:\n  optimizers: {optimizers}\n")
    with pytest.raises(ConfigError) as error:
        study.main(["--plan", "--config", str(tmp_path / "wrong.yaml"), "--output", str(tmp_path / "study")])
    assert error.value.what.endswith(
        "wrong.yaml, optimizers of the section study: moun is not an optimizer, did you mean muon?; lr of muon is 'fast'; momentum of muon is "
        "[1], which is not one value; lr of adamw is None; adamw has seed, which must be the same in all arms; adamw has patch_size, which "
        "must be the same in all arms"
    )
    assert "adamw, muon; lr: a number above 0" in error.value.allowed


def test_the_printed_command_repeats_a_vocabulary_that_was_given(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    monkeypatch.setattr(Study, "print_plan", lambda study: print(study.command(2)))
    for given, shown in (
        ([], "--config tiny.yaml --seeds 2"),
        (["--vocab-size", "1024"], "--config tiny.yaml --vocab-size 1024 --seeds 2"),
    ):
        study.main(["--plan", "--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "study"), *given])
        assert shown in capsys.readouterr().out


def test_a_run_is_recorded_with_the_programs_that_trained_it(tmp_path, monkeypatch):
    assert origin.read_origin(tmp_path) == ("unknown", "unknown")
    for commit, devices in (("0123abc", "2 CPU cores"), ("0123abc", "2 CPU cores"), ("4567def", "2 CPU cores")):
        monkeypatch.setattr(origin, "program_commit", lambda commit=commit: commit)
        monkeypatch.setattr(origin, "machine", lambda devices=devices: devices)
        origin.note_origin(tmp_path / "run")
    assert origin.read_origin(tmp_path / "run") == ("0123abc, then 4567def", "2 CPU cores")
    (tmp_path / "run" / origin.ORIGIN).write_text("[[")
    assert origin.read_origin(tmp_path / "run") == ("unknown", "unknown")


def test_the_study_for_a_gpu_fits_into_its_quarter_of_an_hour_and_can_be_planned(tmp_path, capsys):
    config = shipped("examples/replicate/study_gpu.yaml")
    study.main(["--plan", "--gpu", "H200", "--config", str(config), "--output", str(tmp_path / "study"), "--seeds", "1"])
    shown = capsys.readouterr().out
    arms = yaml.safe_load(config.read_text())["study"]["arms"]
    assert all(f"│ {arm} " in shown for arm in arms) and f"{len(arms)} arms x 1 seed = {len(arms)} runs" in shown
    (minutes,) = re.findall(r"estimated on one H200, run by run: (\d+) min", shown)
    assert int(minutes) < 12 and not (tmp_path / "study").exists()
    with pytest.raises(ConfigError, match="--gpu H200 without --plan"):
        study.main(["--gpu", "H200"])
