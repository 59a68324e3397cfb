"""The machine code of the loss kernels on every architecture: instructions for each logit, registers, no spills, wide loads and stores.

The kernels are bound by instructions before they are bound by memory: these numbers are their speed, as far as it can be known without a GPU.
Where there is nvcc, cuobjdump and nvdisasm must be there, too (PyPI has both): their absence fails.
"""

from __future__ import annotations

import re
import shutil

import pytest

from tests.cuda_on_cpu.kernels import SOURCES
from tests.ops import machine_code
from tests.ops.machine_code import ARCHITECTURES, KERNELS, TYPES, Kernel

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
# The most instructions a logit of the loops that read, and of those that write; the exact exponential of float32 takes more.
LIMITS = {"bfloat16": (8.0, 7.2), "float16": (8.0, 7.2), "float32": (24.0, 21.0)}


@pytest.fixture(scope="module")
def code() -> dict[str, dict[str, Kernel]]:
    """Architecture -> kernel's mangled name -> its machine code."""
    return machine_code.compile_all(SOURCES / "multi_token_loss.cu")


def loops(code: dict[str, dict[str, Kernel]]) -> list[tuple[str, str, str, Kernel]]:
    """(architecture, kernel, dtype, machine code) of all but float64."""
    found = []
    for architecture in ARCHITECTURES:
        for name, pattern in KERNELS.items():
            if "cluster" in name and architecture == "sm_80":
                continue  # it has no clusters, and the kernel no more than its refusal
            for mangled, (dtype, _) in TYPES.items():
                (kernel,) = (each for key, each in code[architecture].items() if re.search(pattern.format(mangled), key))
                found.append((architecture, name, dtype, kernel))
    return found


def test_a_thread_has_32_registers_and_spills_none_of_them(code):
    """More than 32, and two blocks of 1,024 threads no longer share a processor."""
    for architecture, name, dtype, kernel in loops(code):
        assert kernel.registers <= 32, (architecture, name, dtype)
        assert kernel.spilled_bytes == 0, (architecture, name, dtype)


def test_a_logit_costs_few_instructions(code):
    for architecture, name, dtype, kernel in loops(code):
        reading, writing = LIMITS[dtype]
        width = dict(TYPES.values())[dtype]
        assert kernel.loops
        for loop in kernel.loops:
            if loop.vectors == 2:
                limit = writing if loop.writes else reading
                assert len(loop.instructions) <= limit * loop.vectors * width, (architecture, name, dtype, loop)


def test_reading_and_writing_a_bfloat16_logit_on_sm_90_costs_17_instructions_at_most(code):
    (kernel,) = (each for arch, name, dtype, each in loops(code) if (arch, name, dtype) == ("sm_90", "loss and gradient", "bfloat16"))
    turns = [kernel.main_loop(writes, from_shared=True) for writes in (False, True)]
    assert [loop.vectors for loop in turns] == [2, 2]
    assert sum(len(loop.instructions) / 16 for loop in turns) <= 17
    # One exponential for each logit, and one more for what was summed before.
    assert [loop.count("MUFU.EX2") for loop in turns] == [17, 16]


def test_what_the_loops_move_is_moved_16_bytes_at_a_time_and_two_loads_are_in_flight(code):
    for architecture, name, dtype, kernel in loops(code):
        wanted = [False] if name == "statistics" else [True] if name == "gradient" else [False, True]
        for writes in wanted:
            assert kernel.main_loop(writes).vectors == 2, (architecture, name, dtype)
        for loop in kernel.loops:
            moves = [x for x in loop.instructions if re.match(r"(LDG|STG|LDS|STS)\b", x)]
            assert all(".128" in x for x in moves), (architecture, name, dtype, moves)
            # Both loads of a turn come before what is computed of the first; only float32 has no registers for that where it writes.
            kinds = [x for x in loop.instructions if re.match(r"LDG\b|MUFU", x)]
            if loop.count("LDG") and not (loop.writes and dtype == "float32"):
                assert all(x.startswith("LDG") for x in kinds[: loop.vectors]), (architecture, name, dtype, kinds)


def test_merging_the_results_of_1024_threads_takes_few_instructions(code):
    """Were all 32 warps to shuffle, it could not be fewer than 800: a shuffle and an operation for each of two numbers at each of five steps,
    and what rescales a sum."""
    for architecture, name, dtype, kernel in loops(code):
        if "loss" in name and dtype != "float32":
            assert kernel.merge is not None
            assert kernel.merge.merging_warps == 4
            # On sm_100 every warp computes the start of shared memory again.
            assert kernel.merge.instructions(1024) <= (700 if architecture == "sm_100" else 600), (architecture, name, dtype, kernel.merge)
