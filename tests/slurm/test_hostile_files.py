"""Files, variables and names that others chose are text for examples/slurm/ranks.sh: it runs none of it, follows no link, and still counts.

Bash runs commands inside the text of a number: `a='x[$(touch X)]'; echo $((a + 1))` creates X.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.runs import ROOT
from tests.slurm.test_ends import DONE, STARTED, end

COMMAND = "$(touch ran)"
TEXTS = {
    "subscript": f"BASH_VERSINFO[{COMMAND}] step-00000001",
    "subscript, none": f"a[{COMMAND}] none",
    "both": f"a[{COMMAND}] a[{COMMAND}]",
    "sum": f"1+a[{COMMAND}] none",
    "backquotes": "a[`touch ran`] none",
    "variable": "BASHPID none",
    "huge": "99999999999999999999999999 none",
    "hexadecimal": "0x7f none",
    "base": "36#zz none",
    "negative": "-7 none",
    "option": "-n none",
    "escape": "\\x31 none",
    "format": "%d%n%s none",
    "glob": "* none",
    "empty": "",
    "newlines": "\n\n\n",
    "second line": f"x\na[{COMMAND}] none\n",
    "zeros": "\0\0\0",
    "not UTF-8": b"\xff\xfe\x80 none",
    "long": "1" * 100_000,
}


def content(path: Path, text: str | bytes) -> None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    """Links to a file that the user may write, outside of the run's folder."""
    (path.parent.parent / "elsewhere").write_text("precious\n")
    path.symlink_to(path.parent.parent / "elsewhere")


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def dangling(path: Path) -> None:
    path.symlink_to(path.parent.parent / "made-elsewhere")


KINDS: dict[str, Callable[[Path], None]] = {name: lambda path, text=text: content(path, text) for name, text in TEXTS.items()} | {
    made.__name__: made for made in (pipe, link, device, dangling)
}


@pytest.fixture
def save(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    yield folder
    assert not [path for place in (tmp_path, ROOT) for path in place.glob("**/ran" if place == tmp_path else "ran")]
    assert not (tmp_path / "made-elsewhere").exists()
    if (tmp_path / "elsewhere").exists():
        assert (tmp_path / "elsewhere").read_text() == "precious\n"


def call(function: str, *words: str | Path, **variables: str) -> tuple[int, str]:
    """Returns (exit status, output) of one function of ranks.sh."""
    script = 'set -euo pipefail; source examples/slurm/ranks.sh; events_before=0; "$@"'
    done = subprocess.run(
        ["bash", "-c", script, "bash", function, *map(str, words)],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        check=False,
        timeout=20,
    )
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


@pytest.mark.parametrize("kind", KINDS)
def test_a_counter_is_text(save, kind):
    KINDS[kind](save / "crashes-7")
    for expected in ("1 none", "2 none"):
        assert call("without_progress", save / "crashes-7", save, "3") == (1, "")
        assert (save / "crashes-7").read_text().strip() == expected and not (save / "crashes-7").is_symlink()
    assert call("without_progress", save / "crashes-7", save, "3") == (0, "")


@pytest.mark.parametrize("kind", KINDS)
def test_latest_is_text(save, kind):
    KINDS[kind](save / "latest")
    assert call("without_progress", save / "idle-7", save, "2") == (1, "")
    assert (save / "idle-7").read_text() == "1 none\n"
    assert call("without_progress", save / "idle-7", save, "2") == (0, "")


@pytest.mark.parametrize("kind", KINDS)
def test_events_are_text(save, kind):
    KINDS[kind](save / "events.jsonl")
    assert call("started_but_not_finished", save)[0] in (0, 1)
    assert call("size_of", save / "events.jsonl")[1].strip().isdigit()


def test_counting_goes_on_where_the_file_left_it(save):
    """A zero in front does not make the number octal: 08 would be an error, and 010 would be eight."""
    (save / "latest").write_text("step-00000005\n")
    for before, after in (("1 step-00000005", "2"), ("08 step-00000005", "9"), ("010 step-00000005", "11"), ("5 step-00000004", "1")):
        (save / "crashes-7").write_text(before)
        assert call("without_progress", save / "crashes-7", save, "100") == (1, "")
        assert (save / "crashes-7").read_text() == f"{after} step-00000005\n"
    assert sorted(path.name for path in save.iterdir()) == ["crashes-7", "latest"]


def test_a_job_whose_ends_cannot_be_counted_stops(save):
    (save / "crashes-7" / "full").mkdir(parents=True)
    status, text = end(save, "exit 137")
    assert status == 137 and "cannot write" in text and "requeue" not in text
    assert sorted(path.name for path in save.iterdir()) == ["commands", "crashes-7"]


@pytest.mark.parametrize("code", [75, 137])
def test_a_job_in_a_hostile_folder_is_requeued_and_stops_in_time(save, code):
    for name in ("idle-7", "crashes-7", "latest"):
        (save / name).write_text(f"a[{COMMAND}] a[{COMMAND}]")
    (save / "events.jsonl").write_text(f"a[{COMMAND}]\n")
    assert "requeue 7" in end(save, f"exit {code}", MAX_IDLE="2", MAX_CRASHES="2")[1]
    status, text = end(save, f"exit {code}", MAX_IDLE="2", MAX_CRASHES="2")
    assert status == code and "requeue" not in text and "2 times" in text


@pytest.mark.parametrize(
    "name", ["SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "MAX_IDLE", "MAX_CRASHES"]
)
@pytest.mark.parametrize("value", [f"a[{COMMAND}]", f"1+a[{COMMAND}]", "-1", "0x3", "1/e touch ran;", "\x1b[2J", "1 2", "9" * 40])
def test_a_variable_that_is_no_number_is_refused_before_the_ranks_start(save, name, value):
    status, text = end(save, "touch ran", **{name: value})
    assert status == 2 and f"{name}=" in text and "is not a whole number" in text and "\x1b" not in text
    assert not list(save.glob("*-*"))


def test_limits_with_a_zero_in_front_are_decimal(save):
    assert "requeue 7" in end(save, "exit 137", MAX_CRASHES="08", SLURM_NNODES="01", SLURM_NTASKS_PER_NODE="01")[1]


@pytest.mark.parametrize("name", ["LAUNCHER", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT"])
def test_variables_are_printed_without_control_characters(save, name):
    _, text = end(save, "exit 0", **{name: f"a[{COMMAND}]\x1b]0;title\x07"})
    assert "touch" in text and "\x1b" not in text and "\x07" not in text


@pytest.mark.parametrize("name", ["-n", "$(touch ran)", "a; touch ran", "`touch ran`", "a[$(touch ran)]", "with space", "%s"])
def test_the_folder_may_have_any_name(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    for _ in range(2):
        assert "requeue 7" in end(folder, "exit 137")[1]
    assert (folder / "crashes-7").read_text() == "2 none\n"
    (folder / "events.jsonl").write_text(STARTED + "\n" + "x" * 9000 + "\n" + DONE + "\n")
    assert call("started_but_not_finished", folder)[0] == 1
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("template", ["one_node", "many_nodes"])
def test_every_word_of_data_becomes_one_argument_and_none_is_expanded(tmp_path, template):
    """DATA may have several lines; `read` alone would take the first, and drop the other datasets."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / "examples" / "slurm").mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "slurm" / f"{template}.sbatch", tmp_path)
    (tmp_path / "examples" / "slurm" / "ranks.sh").write_text("start_ranks() { printf '%s\\n' \"$@\"; }\nend_job() { :; }\n")
    variables = {"CONFIG": "c.yaml", "SAVE": "a b", "DATA": "0.7 /a_$(touch ran)\n0.3\t/b* `touch ran`\n", "VENV": ".venv"}
    done = subprocess.run(
        ["bash", f"{template}.sbatch"], cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()
    at = words.index("--data-path")
    assert words[at + 1 : at + 9] == ["0.7", "/a_$(touch", "ran)", "0.3", "/b*", "`touch", "ran`", "--save"] and words[at + 9] == "a b"
    assert not (tmp_path / "ran").exists()


def test_make_lint_checks_every_shell_script():
    """shellcheck gets each file that a shell runs, found here by its first line and its name."""
    done = subprocess.run(["make", "-n", "shellcheck"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = subprocess.run(["bash", "-c", done.stdout.rpartition("|")[0]], cwd=ROOT, capture_output=True, check=True).stdout
    scripts = set()
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in {".git", ".venv", "build", "runs", "__pycache__"}]
        for path in (Path(folder, name) for name in names if not Path(folder, name).is_symlink()):
            first = path.open("rb").readline(200)
            if path.suffix in {".sh", ".bash", ".sbatch"} or re.match(rb"#!.*\b(ba|da|k)?sh\b", first):
                scripts.add(os.fsencode(path.relative_to(ROOT)))
    assert set(found.split(b"\0")) - {b""} == scripts
    assert b".ci/run" in scripts and b"examples/slurm/ranks.sh" in scripts
