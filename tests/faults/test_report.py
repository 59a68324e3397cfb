"""tools/inspect_checkpoint.py on a real run: what is there, whether it is valid, which settings wrote it."""

from __future__ import annotations

import json
import shutil

import pytest

from megatron_patch.checkpoint import commit as files
from tests.checkpoint.test_commit import flip
from tests.tools.test_tools import tool


@pytest.fixture
def copy(undisturbed, tmp_path):
    shutil.copytree(undisturbed.folder, tmp_path / "run")
    return tmp_path / "run"


def test_all_checkpoints_are_listed_and_the_newest_explained(copy, undisturbed):
    result = json.loads(tool("inspect_checkpoint", copy, "--verify", "--explain", "--json"))
    lines = result["checkpoints"]
    assert [line["step"] for line in lines] == [files.step_of(folder) for folder in files.list_checkpoints(copy)]
    assert all(line["valid"] and line["checked"] == "checksums" and line["problems"] == [] for line in lines)
    tokens = {record["step"]: record["tokens"] for record in undisturbed.records("step")}
    assert all(line["tokens"] == tokens[line["step"]] for line in lines)
    assert lines[0]["stage"] == "token" and lines[-1]["stage"] == "patch" and lines[-1]["patch_size"] == 3
    for line, folder in zip(lines, files.list_checkpoints(copy), strict=True):
        assert line["bytes"] == sum(path.stat().st_size for path in folder.iterdir() if path.name != files.MANIFEST)
    explanation = result["explanation"]
    assert explanation["folder"] == lines[0]["folder"] and explanation["model"]["hidden_size"] == 32
    assert explanation["written_under"] == {
        "world_size": 2,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "zero_stage": 1,
        "precision": "fp32",
    }
    assert [stage["patch_size"] for stage in explanation["stages"]] == [3, 1] and explanation["data"]["seed"] == 7
    assert explanation["given_options"]["save_interval"] == 2
    table = tool("inspect_checkpoint", copy, "--explain")
    assert "step-00000002" in table and "model.hidden_size" in table


def test_damage_is_found_by_checksums_and_sets_the_exit_code(copy):
    newest = files.list_checkpoints(copy)[0]
    flip(next(newest.glob("state-00001-*")))
    (files.list_checkpoints(copy)[1] / files.MANIFEST).unlink()
    assert "has no manifest" in tool("inspect_checkpoint", copy, code=4)
    assert json.loads(tool("inspect_checkpoint", files.list_checkpoints(copy)[2], "--json"))["checkpoints"][0]["checked"] == "sizes"
    assert "does not match its checksum" in tool("inspect_checkpoint", newest, "--verify", code=4)
    assert "contains no checkpoint" in tool("inspect_checkpoint", copy / "nothing", code=4)
