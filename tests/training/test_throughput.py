"""The warning about waiting for data: printed once, above the threshold, with the cause that the loader's times show."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_patch.data.collate import DocumentMasking
from megatron_patch.data.corpus import TokenCorpus
from megatron_patch.data.loader import LoadingTimes, PatchLoader
from megatron_patch.data.token_stream import TrainStream
from megatron_patch.training.throughput import DataWaitMonitor, peak_resident_bytes
from tests.data.streams import plan_of, write_numbers

ROOT = Path(__file__).parent.parent.parent


def warnings(steps, **times):
    wait = DataWaitMonitor(LoadingTimes(**times), window=4)
    return [warning for seconds, waited in steps if (warning := wait.update(seconds, waited)) is not None]


def test_the_warning_comes_once_and_only_above_two_percent():
    assert warnings([(1.0, 1.0)] + [(1.0, 0.02)] * 20, preparing=1.0) == []
    found = warnings([(1.0, 1.0)] + [(1.0, 0.05)] * 20, preparing=1.0, cpu_seconds=1.0)
    assert len(found) == 1 and found[0].startswith("training waits for data 5.0% of the time (more than 2%): ")


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ({"preparing": 10.0, "cpu_seconds": 1.0, "reading": 9.0}, "disk or the network file system is slow"),
        ({"preparing": 10.0, "cpu_seconds": 1.0, "reading": 9.0, "remote": True}, "over the network"),
        ({"preparing": 10.0, "cpu_seconds": 1.0, "reading": 2.0}, "waits for a free CPU core"),
        ({"preparing": 10.0, "cpu_seconds": 9.0, "reading": 1.0}, "preparing a batch takes longer"),
        ({"preparing": 10.0, "cpu_seconds": 9.0, "reading": 1.0, "prefetching": False}, "--num-workers 2"),
    ],
)
def test_the_cause_is_named(times, words):
    (warning,) = warnings([(1.0, 1.0)] + [(1.0, 0.5)] * 4, **times)
    assert words in warning


class SlowCorpus(TokenCorpus):
    """A slow disk."""

    def read_into(self, out, start):
        time.sleep(0.01)
        super().read_into(out, start)


def test_the_loader_measures_where_its_time_goes(tmp_path):
    corpus = SlowCorpus([write_numbers(tmp_path / "x", 9000)])
    stream = TrainStream(plan_of([(2, 5, "both")]), {"x": corpus}, (("x", 1.0),), "1,0,0", 1)
    loader = PatchLoader(stream, 0, 0, 1, DocumentMasking(), prefetch=1)
    try:
        for _ in range(5):
            loader.next_step()
    finally:
        loader.close()
    times = loader.times
    assert times.preparing >= times.reading >= 5 * 6 * 0.01 and times.preparing > times.cpu_seconds > 0
    assert "disk" in times.bottleneck()


def test_the_peak_of_a_process_is_its_own():
    """A process begins with the peak of the one that started it, in the kernel's `ru_maxrss`: a large launcher would be reported as the rank."""
    held = bytearray(b"x") * (1 << 30)
    program = "from megatron_patch.training.throughput import peak_resident_bytes; print(peak_resident_bytes())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert peak_resident_bytes() > len(held)
    assert 1 << 26 < int(done.stdout) < len(held)
