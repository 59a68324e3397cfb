"""Numbers and names that no run can have: refused with their bound within a moment, or planned as quickly as others."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import os
import typing

import pytest
from rich.console import Console

from megatron_patch.cli import command_line
from megatron_patch.config.checks import LARGEST
from megatron_patch.config.parsing import ParsedOptions, parse
from megatron_patch.config.resolve import load_config, resolve
from megatron_patch.config.values import OPTION_TYPES, without_annotations
from megatron_patch.errors import ConfigError
from megatron_patch.exit_codes import ExitCode
from megatron_patch.training.dry_run import print_plan
from megatron_patch.training.pretrain import main, make_engine_config

BASE = {
    "num_layers": "2",
    "hidden_size": "32",
    "num_attention_heads": "4",
    "seq_length": "16",
    "train_tokens": "8k",
    "global_batch_size": "8",
    "vocab_size": "64",
}
PLAIN = {name: without_annotations(hint) for name, hint in OPTION_TYPES.items()}
KINDS = {name: {hint, *typing.get_args(hint)} for name, hint in PLAIN.items()}
NUMERIC = [name for name, kinds in KINDS.items() if {int, float} & kinds]
WHOLE = [0, -1, 10**5, 10**9, 10**18, 10**18 + 1, 10**99, -(10**400)]
REAL = [0.0, -1.0, 1e-308, 1e18, 1e99, 1e308, -1e308, math.nan, math.inf]
PATCHES = {"recipe": "token-superposition", "patch_size": "4"}


def words(**values):
    options = {**BASE, **values}
    if "global_batch_tokens" in values:
        del options["global_batch_size"]
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def parsed():
    return [parse([*words(**recipe), "--dry-run"]) for recipe in ({}, PATCHES)]


@pytest.mark.parametrize("name", NUMERIC)
def test_any_number_is_planned_or_refused_in_three_parts(name, parsed):
    values = WHOLE if int in KINDS[name] else REAL
    refusals = []
    for given, value in itertools.product(parsed, values):
        groups = {group.name: getattr(given.options, group.name) for group in dataclasses.fields(given.options)}
        (group,) = (key for key, part in groups.items() if hasattr(part, name))
        change = {"global_batch_size": None} if name == "global_batch_tokens" else {}
        options = dataclasses.replace(given.options, **{group: dataclasses.replace(groups[group], **change, **{name: value})})
        try:
            run = resolve(ParsedOptions(options, {}), options.logging.world_size or 1)
            settings = make_engine_config(run)
        except ConfigError as error:
            refusals.append(error)
        else:
            if given is parsed[0]:
                print_plan(run, settings, Console(file=io.StringIO(), width=180))
    assert all(error.allowed and error.do and len(str(error)) < 500 for error in refusals)


@pytest.mark.parametrize("flag", ["--train-tokens", "--lr", "--seed", "--exit-duration"])
@pytest.mark.parametrize("value", ["-1", "1e99", "nan", "9" * 400, "9" * 5000])
def test_any_text_is_read_as_a_number_or_refused_in_three_parts(flag, value, capsys):
    code = main([*words(), "--dry-run", flag, value])
    printed = capsys.readouterr().err
    accepted = (flag, value) in {("--seed", "-1"), ("--lr", "1e99")}
    assert code == (ExitCode.DONE if accepted else ExitCode.CONFIG)
    assert accepted or ("Allowed: " in printed and "What to do: " in printed and len(printed) < 1000)


@pytest.mark.parametrize("name", LARGEST)
def test_a_larger_value_is_refused_with_the_bound(name):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} |a number of ranks of ") as refused:
        load_config([*words(**{name: str(LARGEST[name] + 1)}), "--dry-run"], 1)
    assert f"up to {LARGEST[name]:,}" in refused.value.allowed


def test_the_largest_model_on_the_most_ranks_has_a_plan(capsys):
    """Nothing compares all layers with all ranks, or walks over the steps or tokens."""
    model = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size")
    ranks = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "world_size")
    values = {name: str(LARGEST[name]) for name in (*model, *ranks, "train_tokens")}
    values |= {
        "global_batch_tokens": "1B",
        "kv_channels": "100",
        "recipe": "patch-train",
        "patch_size": "8",
        "seq_length": "8192",
        "micro_batch_size": "1",
    }
    assert main([*words(**values), "--dry-run"]) == 0, capsys.readouterr().err
    assert "10,000 layers x 1000000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "entry",
    [
        {"steps": "1e99"},
        {"steps": 10**400},
        {"tokens": "1e99"},
        {"patch_size": 10**9, "steps": 1},
        {"micro_batch_size": "1e99", "steps": 1},
        {"steps": 10**18, "micro_batch_size": 10**6},
        {"steps": 1, "lr": 10**400},
        {"token_share": 1e308},
        {"steps": 1, "patch_size": 2, "position_weights": [1e308, 1e308]},
        {"steps": 1, "name": "\udcff"},
        {"steps": 1, "data_path": ["a\0b"]},
    ],
    ids=lambda entry: str(entry)[:30],
)
def test_entries_of_stages_are_bounded_too(entry):
    with pytest.raises(ConfigError) as refused:
        load_config([*words(), "--dry-run", "--stages", json.dumps([entry])], 1)
    assert refused.value.allowed and refused.value.do and len(str(refused.value)) < 1000


def test_the_number_of_stages_is_bounded():
    with pytest.raises(ConfigError, match="201 entries"):
        load_config([*words(), "--dry-run", "--stages", json.dumps([{"steps": 1}] * 201)], 1)


@pytest.mark.parametrize(
    "flags",
    [["--split", "1e308,1e308"], ["--data-path", "1e308", "x", "1e308", "y"], ["--patch-size", "2", "--position-weights", "1e308,1e308"]],
)
def test_weights_whose_sum_is_infinite_are_refused(flags):
    with pytest.raises(ConfigError):
        load_config([*words(), "--dry-run", *flags], 1)


ODD = os.fsdecode(b"run-\xff\xfe")


@pytest.mark.parametrize("flag", ["--save", "--load", "--data-path", "--config", "--tensorboard-dir", "--kill-switch", "--wandb-project"])
def test_a_name_that_is_not_utf_8_is_refused_at_the_start(flag, capsys, tmp_path):
    for given in ([flag, ODD], [f"{flag}={ODD}"]):
        assert main([*words(), "--dry-run", *given]) == ExitCode.CONFIG
        printed = capsys.readouterr().err
        assert f"{flag}{'=' if len(given) == 1 else ' '}run-\\udcff\\udcfe is not text in UTF-8" in printed
        assert "Allowed: " in printed and "What to do: rename" in printed


def test_a_name_in_a_configuration_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    for written in ('save: "a\\0b"', 'data-path: ["\\ud800"]'):
        path.write_text(written)
        with pytest.raises(ConfigError):
            load_config([*words(), "--dry-run", "--config", str(path)], 1)


def test_tools_refuse_names_that_are_not_utf_8(monkeypatch, capsys):
    monkeypatch.setattr(command_line.sys, "argv", ["tool", "--output-prefix", ODD])
    assert command_line.run_tool(lambda argv: None) == ExitCode.CONFIG
    assert "--output-prefix run-" in capsys.readouterr().err


def test_other_scripts_are_still_names(capsys):
    assert main([*words(), "--dry-run", "--save", "Läufe/走る 🏃"]) == 0, capsys.readouterr().err
