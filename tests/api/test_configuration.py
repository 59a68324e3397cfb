"""load_config and plan: the precedence of the command line, errors by name, and the same plan as the tool's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_patch.api import load_config, plan
from megatron_patch.cli import plan as tool
from megatron_patch.config import resolve
from megatron_patch.errors import ConfigError
from tests.api.runs import TINY, corpus_in

DRY = {**TINY, "dry_run": True}


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """Messages are wrapped at the width of the terminal."""
    monkeypatch.setenv("COLUMNS", "100")


def flags(options) -> list[str]:
    words = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def test_a_file_a_mapping_flags_and_keywords_give_the_run_of_the_command_line(tmp_path):
    expected = resolve.load_config(flags(DRY), 1)
    (tmp_path / "run.yaml").write_text(json.dumps({name.replace("_", "-"): value for name, value in DRY.items()}))
    for run in (load_config(tmp_path / "run.yaml"), load_config(DRY), load_config(args=flags(DRY)), load_config(**DRY)):
        assert (run.options, run.shape, run.plan) == (expected.options, expected.shape, expected.plan)


def test_keywords_override_flags_and_flags_override_the_source(tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(DRY))
    for source in (tmp_path / "run.yaml", str(tmp_path / "run.yaml"), DRY):
        assert load_config(source).options.model.num_layers == 2
        assert load_config(source, args=["--num-layers", "3"]).options.model.num_layers == 3
        run = load_config(source, args=["--num-layers", "3"], num_layers=4)
        assert run.options.model.num_layers == 4 and run.origins["num_layers"] == "load_config"
    assert load_config(DRY, kv_channels=16, args=["--kv-channels", "8"]).options.model.kv_channels == 16
    assert load_config({**DRY, "kv_channels": 16}, kv_channels=None).options.model.kv_channels is None


def test_values_of_python_are_values_of_flags(tmp_path):
    stages = [{"name": "patch", "patch_size": 4, "token_share": 0.5}, {"name": "token", "patch_size": 1}]
    dry = {name: value for name, value in DRY.items() if name != "patch_size"}
    run = load_config(dry, train_tokens=4e4, stages=stages, bf16=True, split=(80, 20, 0), save=tmp_path / "a b")
    assert [stage.patch_size for stage in run.plan.stages] == [4, 1] and run.options.stages.train_tokens == 40_000
    assert run.options.engine.bf16 and run.save_folder == tmp_path / "a b" and run.options.data.split == "80,20,0"
    assert [prefix for prefix, _ in load_config(dry, data_path=Path(corpus_in(tmp_path / "c d"))).blend] == [
        str(tmp_path / "c d" / "walks")
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_layer": 3}, ["load_config: unknown key 'num_layer'", "did you mean num_layers?"]),
        ({"num_layer": 3, "lrr": 1}, ["2 problems", "load_config", "did you mean num_layers?", "did you mean lr?"]),
        ({"bf16": "yes"}, ["load_config: bf16: 'yes' is no switch", "true or false"]),
        ({"num_layers": "two"}, ["load_config: num_layers: 'two' is not a count"]),
        ({"args": ["--help"]}, ["args contain --help", "megatron-patch pretrain --help"]),
        ({"world_size": 0}, ["world_size=0", "whole numbers from 1"]),
    ],
)
def test_wrong_settings_are_named(options, words):
    with pytest.raises(ConfigError) as caught:
        load_config(DRY, **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "--config" not in str(caught.value) and caught.value.do


def test_numbers_of_numpy_and_torch_are_numbers():
    stages = [{"name": "patch", "patch_size": np.int64(4), "token_share": np.float64(0.5)}, {"name": "token", "patch_size": 1}]
    dry = {name: value for name, value in DRY.items() if name not in ("patch_size", "split")}
    run = load_config(dry, stages=stages, bf16=np.bool_(True), split=np.array([80, 20, 0]), num_layers=torch.tensor(3), lr=np.float64(2e-3))
    assert [stage.patch_size for stage in run.plan.stages] == [4, 1] and run.options.engine.bf16
    assert (run.options.data.split, run.options.model.num_layers, run.options.schedule.lr) == ("80,20,0", 3, 2e-3)


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (DRY, {"args": "--num-layers 3"}, "args is not a list of texts"),
        (DRY, {"args": ["--num-layers", 3]}, "args is not a list of texts"),
        (DRY, {"args": None}, "args is not a list of texts"),
        (DRY, {"save": b"run"}, "save is given as bytes"),
        ({**DRY, "num-layers": 7}, {}, "the mapping has num_layers twice"),
        ([DRY], {}, "load_config of a value of type list"),
        (b"run.yaml", {}, "load_config of a value of type bytes"),
    ],
)
def test_values_of_a_wrong_kind_are_named(source, options, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(source, **options)
    assert caught.value.allowed and caught.value.do


def test_a_resolved_run_is_no_source():
    with pytest.raises(ConfigError, match="load_config of a run that is resolved"):
        load_config(load_config(DRY))


def test_a_text_that_looks_like_a_flag_is_a_value():
    run = load_config(DRY, save="--dry-run")
    assert run.options.checkpoint.save == "--dry-run"


def test_unknown_names_of_a_mapping_are_named_together():
    with pytest.raises(ConfigError) as caught:
        load_config({**DRY, "num-layer": 1, "hiden-size": 2})
    assert all(word in str(caught.value) for word in ("2 problems", "the mapping", "did you mean num_layers?", "did you mean hidden_size"))


def test_a_plan_is_that_of_the_tool(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(json.dumps(TINY))
    tool.main(["--config", str(tmp_path / "run.yaml"), "--world-size", "4", "--gpu", "A100", "--json"])
    expected = json.loads(capsys.readouterr().out)
    run = load_config(DRY)
    for found in (
        plan(TINY, world_size=4, gpu="A100"),
        plan(run, world_size=4, gpu="A100"),
        plan(Path(tmp_path / "run.yaml"), world_size=4, gpu="A100"),
    ):
        assert json.loads(json.dumps(found.to_json())) == expected
    assert plan(run).layout.ranks == 1 and plan(load_config(DRY, world_size=2)).layout.ranks == 2
    assert plan(TINY).layout.ranks == 8 and plan(TINY, zero_stage=3, world_size=2).layout.zero_level == 3
    with pytest.raises(ConfigError, match="options with a resolved run: num_layers"):
        plan(run, num_layers=3)
    with pytest.raises(ConfigError, match="H1000"):
        plan(run, gpu="H1000")
