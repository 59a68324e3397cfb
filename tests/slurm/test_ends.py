"""The end of a job: examples/slurm/ranks.sh requeues or stops it. Slurm's commands are replaced, so this runs on any machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_patch.exit_codes import ExitCode
from tests.distributed.runs import ROOT

JOB = """
set -euo pipefail
source examples/slurm/ranks.sh
code=0
start_ranks program || code=$?
end_job "$code" "$SAVE"
"""
DONE = '{"type": "end", "time": 1.5, "reason": "done", "step": 9, "tokens": 90, "seconds": 1.0, "code": 0}'
STARTED = '{"type": "start", "time": 1.0, "step": 0}'


COMMANDS = {"srun": '[ "$1" != "--ntasks=1" ] || eval "$RANKS"', "scontrol": 'echo "$@"'}


def end(save: Path, ranks: str, **settings: str) -> tuple[int, str]:
    """Returns (exit code, output) of a job whose ranks run a line of bash."""
    commands = save / "commands"
    commands.mkdir(exist_ok=True)
    for name, line in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/bash\n{line}\n")
        (commands / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SAVE": str(save),
        "RANKS": ranks,
        "LAUNCHER": "srun",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_JOB_NODELIST": "n0",
        **settings,
    }
    done = subprocess.run(["bash", "-c", JOB], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("code", [1, 75, 76, 134, 137, 139, 143, 253])
def test_a_job_that_can_resume_is_requeued(tmp_path, code):
    assert end(tmp_path, f"exit {code}")[0] == 0
    assert "requeue 7" in end(tmp_path, f"exit {code}")[1]


@pytest.mark.parametrize("code", [code for code in ExitCode if 2 <= code <= 6])
def test_a_job_that_would_fail_again_stops_with_the_program_s_code(tmp_path, code):
    status, text = end(tmp_path, f"exit {code}")
    assert status == code and "requeue" not in text and "submit it again" in text


@pytest.mark.parametrize(("code", "limit", "words"), [(137, 3, "crashed 3 times"), (75, 10, "preempted 10 times")])
def test_a_job_without_progress_stops(tmp_path, code, limit, words):
    """A new checkpoint resets the count of starts without progress."""
    for latest in ("step-00000001", "step-00000002"):
        (tmp_path / "latest").write_text(latest)
        for _ in range(limit - 1):
            assert "requeue 7" in end(tmp_path, f"exit {code}")[1]
    status, text = end(tmp_path, f"exit {code}")
    assert status == code and words in text and "requeue" not in text
    assert end(tmp_path, f"echo step-00000003 >$SAVE/latest; exit {code}")[0] == 0


@pytest.mark.parametrize("before", ["", STARTED, DONE])
def test_the_run_s_metrics_decide_that_it_is_done_not_its_launcher(tmp_path, before):
    """DeepSpeed's launcher returns 0 when its srun was killed. A dry run writes no metrics, and is done all the same."""
    if before:
        (tmp_path / "events.jsonl").write_text(before + "\n")
    status, text = end(tmp_path, "exit 0")
    assert status == 0 and "requeue" not in text and text.rstrip().endswith("the run is finished")
    status, text = end(tmp_path, f"echo '{STARTED}' >>$SAVE/events.jsonl; exit 0")
    assert status == 0 and "code 1, a rank crashed or hung" in text and "requeue 7" in text
    status, text = end(tmp_path, f"echo '{STARTED}' >>$SAVE/events.jsonl; echo '{DONE}' >>$SAVE/events.jsonl; exit 0")
    assert status == 0 and "requeue" not in text and text.rstrip().endswith("the run is finished")
