"""Reads the machine code of the CUDA kernels: registers, spilled bytes, and the instructions of the inner loops.

It needs `nvidia-cuda-cuobjdump` and `nvidia-cuda-nvdisasm` from PyPI, or those of the toolkit. As a program it prints the tables of
docs/performance.md:

    python -m tests.ops.machine_code [--baseline FOLDER]     FOLDER holds the .cu files to compare with
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# Mangled name of a number type -> (its name, numbers in 16 bytes).
TYPES = {"f": ("float32", 4), "13__nv_bfloat16": ("bfloat16", 8), "6__half": ("float16", 8)}


@dataclass(frozen=True)
class Loop:
    """An innermost loop over 16-byte vectors.

    Attributes:
        instructions: of one turn, by their full names (such as "LDG.E.128"), in order.
    """

    instructions: tuple[str, ...]

    def count(self, pattern: str) -> int:
        """Returns the number of instructions whose names start with a pattern."""
        return sum(re.match(pattern, name) is not None for name in self.instructions)

    @property
    def vectors(self) -> int:
        """The number of 16-byte vectors of one iteration: each is stored once, or, in a loop that only reads, loaded once."""
        return self.count(r"STG\S*\.128") or self.count(r"LDG\S*\.128")

    @property
    def writes(self) -> bool:
        """Whether the loop writes to global memory."""
        return self.count("STG") > 0

    @property
    def from_shared(self) -> bool:
        """Whether the loop loads vectors from shared memory or stores them there."""
        return self.count("LDS") + self.count("STS") > 0


@dataclass(frozen=True)
class Merge:
    """The merge of the results of a block's threads: numbers of instructions of a warp, barriers included.

    Attributes:
        each: of every warp: it stores its threads' results, comes to the barrier and goes on where it belongs.
        merging: more of each merging warp, up to the barrier of those alone and the branch after it.
        first: more of the first warp, which merges what the merging warps found.
        merging_warps: how many there are.
    """

    each: int
    merging: int
    first: int
    merging_warps: int

    def instructions(self, threads: int) -> int:
        """Returns the number of warp-instructions for one row, in a block of this number of threads."""
        return self.each * (threads // 32) + self.merging * self.merging_warps + self.first


@dataclass(frozen=True)
class Kernel:
    """One kernel's machine code.

    Attributes:
        registers: of a thread.
        spilled_bytes: that a thread stores for want of registers.
        loops: the innermost loops over vectors, longest turns first.
        merge: of a kernel that merges what its block's threads found.
    """

    registers: int
    spilled_bytes: int
    loops: tuple[Loop, ...]
    merge: Merge | None

    def main_loop(self, writes: bool, from_shared: bool | None = None) -> Loop:
        """Returns the loop with the most vectors in an iteration, among those that write or do not, and that use shared memory or do not."""
        found = [x for x in self.loops if x.writes == writes and from_shared in (None, x.from_shared)]
        return max(found, key=lambda loop: loop.vectors)


def tool(name: str) -> str:
    """Returns the path of cuobjdump or nvdisasm.

    Raises:
        FileNotFoundError: neither the package nor the toolkit has it.
    """
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name and (path := Path(str(file.locate()))).is_file():
            return str(path)
    if found := shutil.which(name):
        return found
    raise FileNotFoundError(f"{name} is missing; install it: pip install nvidia-cuda-{name}")


def parse(text: str) -> tuple[list[str], dict[str, int]]:
    """Parses the disassembly of one function: its instructions, and label -> index of the instruction after it."""
    lines = re.findall(r"^(\.L_x_\d+):|^\s*/\*([0-9a-f]+)\*/\s+(.*?);", text, re.MULTILINE)
    places: dict[str, int] = {}
    code: list[str] = []
    for label, _, instruction in lines:
        if label:
            places[label] = len(code)
        else:
            code.append(instruction.strip())
    return code, places


def longest_path(code: list[str], places: dict[str, int], start: int, end: int) -> int:
    """Returns the length of the longest path from one instruction to another, both included, without repeating a loop, for a warp whose
    lanes do not diverge (BRA.DIV is not taken)."""
    most = {end: 1}
    for place in range(end - 1, start - 1, -1):
        instruction = code[place]
        target = re.search(r"\bBRA\b(?!\.DIV).*?`\((\.L_x_\d+)\)", instruction)
        always = re.match(r"BRA(?!\.DIV)\S* `|EXIT\b", instruction) is not None
        following = ([] if always else [place + 1]) + ([places[target[1]]] if target else [])
        found = [most[x] for x in following if x > place and x in most]
        if found:
            most[place] = 1 + max(found)
    return most[start]


def block_merge(text: str) -> Merge | None:
    """Returns the cost of the merge in one function's disassembly, if the function merges in a full block of 16-bit numbers.

    It counts the store of a thread's result and the computation of its address (without the thread's index, which all of the kernel uses),
    the instructions between the nearest labels or branches around the first barrier, the longest path from there through the barrier of
    the merging warps, and everything up to the last sum of the first warp, including unrelated instructions that the compiler interleaves.
    It does not count the barrier at which every thread waits for the result, which the kernel needs with any merge.
    """
    code, places = parse(text)
    barriers = [place for place, x in enumerate(code) if re.match(r"BAR\.SYNC\S* (0x0|R\d+, R\d+)$", x)]
    own = [(place, found) for place, x in enumerate(code) if (found := re.match(r"BAR\.SYNC\S* 0x1, (0x[0-9a-f]+)$", x))]
    if not barriers or not own:
        return None
    (second, found), first = own[0], barriers[0]
    branch = next(place for place in range(first, len(code)) if "BRA" in code[place])
    ends = set(places.values()) | {place + 1 for place, x in enumerate(code) if "BRA" in x}
    start = max(place for place in ends if place <= first)
    each = branch - start + 1
    store = max(place for place in range(first) if re.match(r"STS\S*\.64 ", code[place]))
    if store < start:
        each += 1
        wanted = set(re.findall(r"\bU?R\d+", code[store].partition("]")[0]))
        for place in range(store - 1, max(x for x in ends if x <= store) - 1, -1):
            operands = code[place].partition(" ")[2]
            result = re.match(r"U?R\d+", operands)
            if result and result[0] in wanted and "SR_TID" not in operands:
                each += 1
                wanted |= set(re.findall(r"\bU?R\d+", operands[result.end() :]))
    after = next(place for place in range(second, len(code)) if "BRA" in code[place])
    powers = [place for place in range(after, len(code)) if code[place].startswith("MUFU.EX2")][:4]
    (result,) = re.findall(r"MUFU\.EX2 (R\d+)", code[powers[-1]])
    last = next(place for place in range(powers[-1] + 1, len(code)) if re.match(rf"FFMA R\d+,.*\b{result}\b", code[place]))
    return Merge(each, longest_path(code, places, branch + 1, after), last - after, int(found[1], 16) // 32)


def inner_loops(text: str) -> tuple[Loop, ...]:
    """Returns the innermost loops over vectors in one function's disassembly."""
    code, places = parse(text)
    loops = []
    for end, instruction in enumerate(code):
        target = re.search(r"\bBRA\b.*?`\((\.L_x_\d+)\)", instruction)
        if target and places.get(target[1], end + 1) <= end:
            loops.append((places[target[1]], end))
    innermost = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    found = [Loop(tuple(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in code[a : b + 1])) for a, b in innermost]
    return tuple(sorted((loop for loop in found if loop.vectors), key=lambda loop: -len(loop.instructions)))


def compile_for(source: Path, architecture: str, folder: Path, *options: str) -> dict[str, Kernel]:
    """Compiles a .cu file for one architecture and returns mangled name of a kernel -> its machine code."""
    cubin = folder / f"{source.stem}_{architecture}.cubin"
    command = ["nvcc", "-cubin", "-O3", "-std=c++17", f"-arch={architecture}", "-Xptxas", "-v", *options, source, "-o", cubin]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = {name: int(stored) for name, stored in re.findall(r"properties for (\S+)\n.*?(\d+) bytes spill stores", said)}
    usage = subprocess.run([tool("cuobjdump"), "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    text = subprocess.run([tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True).stdout
    parts = dict(re.findall(r"^\.text\.(\S+):$(.*?)(?=^\t?\.section|\Z)", text, re.MULTILINE | re.DOTALL))
    registers = re.findall(r"Function (\S+):\s+REG:(\d+)", usage)
    return {
        name: Kernel(
            int(count), spilled[name], inner_loops(parts[name]), block_merge(parts[name]) if "16" in name or "half" in name else None
        )
        for name, count in registers
    }


def compile_all(source: Path, *options: str) -> dict[str, dict[str, Kernel]]:
    """Compiles a .cu file and returns architecture -> mangled name of a kernel -> its machine code."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda name: compile_for(source, name, Path(folder), *options), ARCHITECTURES)
        return dict(zip(ARCHITECTURES, found, strict=True))


KERNELS = {
    "statistics": r"\dstatistics_kernelI{}E",
    "gradient": r"\dgradient_kernelI{}E",
    "loss and gradient": r"\dloss_and_gradient_kernelI{}(Lb0)?E",
    "loss and gradient, in a cluster": r"\dloss_and_gradient_kernelI{}Lb1E",
}


def costs(kernel: Kernel, width: int) -> str:
    """Returns table cells: registers; instructions for each logit to read a row and to write its gradient; warp-instructions of the merge in
    a full block, where they can be separated."""
    turns = []
    for writes in (False, True):
        found = [loop for loop in kernel.loops if loop.writes == writes]
        most = max((loop.vectors for loop in found), default=0)
        each = [len(loop.instructions) / (loop.vectors * width) for loop in found if loop.vectors == most]
        turns.append(f"{max(each):.1f}" if each else "")
    total = f" = {sum(map(float, turns)):.1f}" if all(turns) else ""
    merge = kernel.merge.instructions(1024) if kernel.merge and all(turns) else ""
    return f"{kernel.registers} | {' + '.join(filter(None, turns))}{total} | {merge}"


def main() -> None:
    """Prints a Markdown table of registers, instructions for each logit and of the merge, for every loss kernel and architecture."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--baseline", type=Path, help="a folder of .cu files to compare with")
    args = parser.parse_args()
    folders = [args.baseline] if args.baseline else []
    folders.append(Path(__file__).parent.parent.parent / "csrc" / "cuda")
    compiled = [compile_all(folder / "multi_token_loss.cu") for folder in folders]
    names = ["before: registers", "instructions a logit", "of a merge"] if args.baseline else []
    names += ["registers", "instructions a logit (read + write)", "warp-instructions of a merge, 1,024 threads"]
    print("| kernel | dtype | architecture | " + " | ".join(names) + " |")
    print("| --- | --- | --- |" + " ---: |" * len(names))
    for (name, pattern), (mangled, (dtype, width)), architecture in itertools.product(KERNELS.items(), TYPES.items(), ARCHITECTURES):
        if architecture == "sm_80" and "cluster" in name:
            continue
        cells = []
        for code in compiled:
            found = [kernel for key, kernel in code[architecture].items() if re.search(pattern.format(mangled), key)]
            cells.append(costs(found[0], width) if found else " | | ")
        print(f"| {name} | {dtype} | {architecture} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
