"""Passwords and tokens in addresses: no program stores or shows them, wherever they were given."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from megatron_patch import credentials
from megatron_patch.checkpoint.trainer_state import TrainerState
from megatron_patch.cli.command_line import run_tool
from megatron_patch.config.checks import check_text
from megatron_patch.credentials import cleaned_record, has_credentials, without_credentials
from megatron_patch.data.dataset_paths import expand_prefixes
from megatron_patch.errors import DataError
from megatron_patch.training import pretrain
from megatron_patch.training.faults.exit_protocol import report_error
from tests.distributed.runs import DATA, MODEL, ROOT, start_program
from tests.faults.conftest import PLAN

SECRET = "sesame1d7c"
ADDRESSES = [
    f"http://user:{SECRET}@127.0.0.1:9/web",
    f"HTTPS://{SECRET}@127.0.0.1:9/web",
    f"http://user:a/{SECRET}@127.0.0.1:9/web",
    f"http://user:a?{SECRET}@127.0.0.1:9/web",
    f"http://user:b@{SECRET}/c@127.0.0.1:9/web",
    f"http://user:two {SECRET}@127.0.0.1:9/web",
    f"http:/user:{SECRET}@127.0.0.1:9/web",
    f"//user:{SECRET}@127.0.0.1:9/web",
    f"ftp://user:{SECRET}@127.0.0.1:9/web",
    f"s3://key:{SECRET}@bucket/web",
    f"https://127.0.0.1:9/web?X-Amz-Algorithm=A&X-Amz-Signature={SECRET}",
    f"https://127.0.0.1:9/web?sig={SECRET}",
    f"abfs://container@account/web?sig={SECRET}",
    f"https://127.0.0.1:9/web#access_token={SECRET}",
    f"simplecache::http://user:{SECRET}@127.0.0.1:9/web",
    f"zip://web::http://user:{SECRET}@127.0.0.1:9/a.zip",
    f"unknown://user:{SECRET}@host/web",
    f"az://container/web;AccountKey={SECRET}",
    f"az://container/web?a=b;SharedAccessKey={SECRET};c=d",
    f"az://container/web?a=b;sig={SECRET}",
    f"az://container/web?a=x,http://user:{SECRET}@host/b",
]
HARMLESS = [
    *(
        "s3://bucket/user@host/web",
        "http://host:8080/a@b",
        "/tmp/a@b:c//d@e",
        "hdfs://user@name/x",
        "http://[::1]:80/x@1",
        "file:///a:b/c@d",
    ),
    *("abfs://container@account/x", "see http://x, y@z", "memory://corpus/*?x", "s3://bucket/x?versionId=3", "10://", "a ratio of 1:/2"),
]


def tool(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a tool in this process."""
    module = importlib.import_module(f"megatron_patch.cli.{name}")
    monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *words])
    return run_tool(module.main)


def written(folder: Path, but: tuple[Path, ...] = ()) -> str:
    return "".join(path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file() and path not in but)


@pytest.mark.parametrize("address", ADDRESSES)
def test_credentials_are_found_and_removed(address):
    for text in (address, f"@{address}", f"cannot read {address}: no route, as {address} is down", json.dumps([{"data_path": address}])):
        assert has_credentials(text)
        assert SECRET not in without_credentials(text)
    assert SECRET not in str(DataError(f"{address} is wrong", f"not {address}", f"remove {address}"))
    assert SECRET not in json.dumps(cleaned_record({address: [{"a": (address, 1)}]}))


@pytest.mark.parametrize("address", HARMLESS)
def test_other_addresses_and_paths_are_kept(address):
    assert not has_credentials(address) and without_credentials(address) == address


def test_a_removed_user_leaves_the_address_and_a_removed_token_its_name():
    assert without_credentials("a http://user:pw@host:80/web b") == "a http://host:80/web b"
    assert without_credentials("x https://host/web?file=a&sig=b#c: no") == "x https://host/web?file=…&sig=… no"


@pytest.mark.parametrize("separator", [" ", ",", "\n"])
@pytest.mark.parametrize("part", ["http://user:pw@h/x?sig=a", "http://h:a/x", "http://h/x", "?a", "?a=", "a", "key", "://"])
def test_a_long_text_is_cleaned_in_linear_time(part, separator, monkeypatch):
    """Counted by what is scanned: the text, and pieces of it no longer than a few times its length in all."""
    scanned = 0

    class Counted(str):
        def __getitem__(self, where):
            nonlocal scanned
            found = super().__getitem__(where)
            scanned += len(found)
            return found

    text = "//" + separator.join([part] * 10_000)
    for line in text.splitlines(keepends=True):
        credentials._cleaned(Counted(line), every_web_value=True)
    assert scanned < 60 * len(text)


def given(address: str, folder: Path) -> dict[str, list[str]]:
    """The ways in which the training program gets an address."""
    (folder / "list.txt").write_text(f"# shards\n{address}\n")
    (folder / "data.yaml").write_text(json.dumps({"data_path": [0.5, "web", 0.5, address]}))
    (folder / "stages.yaml").write_text(json.dumps({"stages": [{"patch_size": 2, "token_share": 0.5, "data_path": [address]}, {}]}))
    (folder / "key.yaml").write_text(json.dumps({address: 1}))
    (folder / "broken.yaml").write_text(f'data_path: "{address}\nlr: [1')
    return {
        "flag": ["--data-path", address],
        "held-out": ["--data-path", "web", "--valid-data-path", address],
        "joined": [f"--data-path={address}"],
        "weight": ["--data-path", "0.5", "web", "0.5", address],
        "list": ["--data-path", f"@{folder}/list.txt"],
        "remote list": ["--data-path", f"@{address}"],
        "config": ["--config", str(folder / "data.yaml")],
        "stages": ["--data-path", "web", "--config", str(folder / "stages.yaml")],
        "key": ["--config", str(folder / "key.yaml")],
        "broken": ["--config", str(folder / "broken.yaml")],
        "config address": ["--config", address],
        "number": ["--data-path", "web", "--lr", address],
        "unknown flag": ["--data-path", "web", f"--dat-path={address}"],
        "epochs": ["--data-path", "web", "--max-epochs", f"{address}=3"],
        "tokenizer": ["--data-path", "web", "--tokenizer-model", address],
    }


@pytest.mark.parametrize("address", ADDRESSES[::4])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_the_training_program_stores_and_shows_no_credentials(tmp_path, address, dry, capsys):
    for number, (name, words) in enumerate(given(address, tmp_path).items()):
        save = tmp_path / f"run-{number}"
        code = start_program([*MODEL, *DATA, *PLAN, "--vocab-size", "32", *words, "--save", str(save), *dry])
        output = "".join(capsys.readouterr())
        assert code in (2, 3) and "Traceback" not in output, (name, output)
        assert "What to do" in output or dry, (name, output)
        assert SECRET not in output + written(save), (name, output)


def tool_lines(address: str, folder: Path) -> list[list[str]]:
    """Commands of all tools, as (name, words)."""
    (folder / "list.txt").write_text(f"{address}\n")
    (folder / "data.yaml").write_text(json.dumps({"data_path": address, "num_layers": 1}))
    model = ["--num-layers", "1", "--hidden-size", "8", "--num-attention-heads", "1"]
    out, here = str(folder / "out"), str(folder / "none")
    return [
        ["inspect_dataset", address],
        ["inspect_dataset", here, "--diff", address],
        ["inspect_dataset", here, "--tokenizer-model", address],
        ["inspect_dataset", here, "--config", str(folder / "data.yaml")],
        ["merge_datasets", "--input", address, "--output-prefix", out],
        ["merge_datasets", "--input", f"@{folder}/list.txt", "--output-prefix", out],
        ["merge_datasets", "--input", here, "--output-prefix", address],
        ["evaluate", "--load", address, "--data-path", here],
        ["evaluate", "--load", here, "--data-path", address],
        ["evaluate", "--load", here, "--text", address],
        ["generate", "--load", address, "--prompt", "a"],
        ["generate", "--load", here, "--tokenizer-model", address],
        ["show_step", address],
        ["plan", *model, "--data-path", address],
        ["plan", *model, "--data-path", f"@{folder}/list.txt"],
        ["plan", "--config", str(folder / "data.yaml")],
        ["plan", *model, "--ceilings", address],
        ["inspect_checkpoint", address],
        ["report", address, "--output", f"{folder}/report.html"],
        ["report", here, "--title", address, "--output", f"{folder}/report.html"],
        ["plot", address, "--output", f"{folder}/plot.png"],
        ["preprocess_data", "--input", address, "--output-prefix", out, "--tokenizer-type", "ByteLevelTokenizer"],
        ["preprocess_data", "--input", here, "--output-prefix", address, "--tokenizer-type", "ByteLevelTokenizer"],
        ["train_tokenizer", "--input", address, "--vocab-size", "300", "--output", out],
        ["convert_checkpoint", "from-hf", "--input", address, "--output", out],
    ]


@pytest.mark.parametrize("address", ADDRESSES[::8])
def test_the_tools_store_and_show_no_credentials(tmp_path, address, monkeypatch, capsys):
    for name, *words in tool_lines(address, tmp_path):
        given_files = (tmp_path / "list.txt", tmp_path / "data.yaml")
        code = tool(name, words, monkeypatch)
        output = "".join(capsys.readouterr())
        assert code in (2, 3, 4) and "What to do" in output and "Traceback" not in output, (name, words, code, output)
        assert SECRET not in output + written(tmp_path, given_files), (name, words, output)


def test_what_an_earlier_version_recorded_is_shown_without_credentials(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "tests/distributed/written_by_0_1/run", tmp_path / "run")
    path = next((tmp_path / "run").glob("step-*/trainer_state.json"))
    state = json.loads(path.read_text())
    state["config"]["options"]["data_path"] = [ADDRESSES[0]]
    state["config"]["origins"]["data_path"] = "flag"
    state["data_fingerprint"][ADDRESSES[0]] = {}
    path.write_text(json.dumps(state))
    with (tmp_path / "run" / "events.jsonl").open("a") as file:
        file.write(
            json.dumps({"type": "end", "time": 1.0, "step": 5, "reason": "DataError", "message": f"cannot read {ADDRESSES[0]}"}) + "\n"
        )
    tool("inspect_checkpoint", [str(tmp_path / "run"), "--explain"], monkeypatch)
    tool("inspect_checkpoint", [str(tmp_path / "run"), "--explain", "--json"], monkeypatch)
    assert tool("report", [str(tmp_path / "run"), "--output", str(tmp_path / "report.html")], monkeypatch) == 0
    assert SECRET not in "".join(capsys.readouterr()) + (tmp_path / "report.html").read_text()
    assert "http://127.0.0.1:9/web" in (tmp_path / "report.html").read_text()


def test_the_pattern_of_a_recorded_tokenizer_is_kept():
    path = next((ROOT / "tests/distributed/written_by_0_1/run").glob("step-*/trainer_state.json"))
    data = json.loads(path.read_text())
    pattern = r"https?://\S+:\S+@\S+|http://a:b@c\?key=x|."
    state = TrainerState.from_json(
        {
            **data,
            "extra": {**data.get("extra", {}), "data_info": {"tiktoken_pattern": pattern}},
            "data_metadata": {"tiktoken_pattern": pattern},
        },
        "here",
    )
    assert state.data_metadata == {"tiktoken_pattern": pattern}


def test_tracebacks_have_no_credentials(tmp_path, monkeypatch, capsys):
    """An error that no code of this program expects, with what a library put into its message."""

    def fail(*words: object) -> None:
        raise RuntimeError(f"cannot connect to {ADDRESSES[0]}")

    monkeypatch.setattr(sys, "argv", ["x"])
    assert run_tool(fail) == 1
    monkeypatch.setattr(pretrain, "load_config", fail)
    assert start_program([]) == 1
    assert report_error(RuntimeError(ADDRESSES[1]), 0, 0, tmp_path) == 1
    output = "".join(capsys.readouterr())
    assert output.count("RuntimeError: ") == 3 and SECRET not in output + written(tmp_path)


def test_a_prompt_may_be_any_text():
    check_text(["--prompt", ADDRESSES[0], "--sample-prompts", "a", ADDRESSES[1]])
    with pytest.raises(DataError):
        check_text(["--prompt", "a", "--load", ADDRESSES[0]])


def test_the_line_of_a_list_is_named(tmp_path):
    (tmp_path / "list").write_text(f"\ufeffweb\n# none\n{ADDRESSES[0]}\n")
    with pytest.raises(DataError, match=rf"@{tmp_path}/list, line 3: http://127.0.0.1:9/web contains a password"):
        expand_prefixes(f"@{tmp_path}/list")


@pytest.mark.parametrize("address", ["zip://x::/nope.zip", "reference://a", "data://text/plain,x", "a::http://h/x", "memory://a::b"])
def test_addresses_that_combine_others_are_refused_wherever_they_are_given(tmp_path, address, monkeypatch, capsys):
    for name, words in given(address, tmp_path).items():
        if name not in ("key", "broken", "config address", "number", "unknown flag", "tokenizer", "epochs"):
            plan = ["--train-tokens", "3000", "--global-batch-size", "12", "--lr", "3e-3"] if name == "stages" else PLAN
            assert start_program([*MODEL, *DATA, *plan, "--vocab-size", "32", *words, "--dry-run"]) == 3, name
    for name, *words in tool_lines(address, tmp_path)[:6]:
        assert tool(name, words, monkeypatch) == 3, words
    output = "".join(capsys.readouterr())
    assert "Traceback" not in output and output.count("does not name a file on a server") > 10
