"""Reads what nvcc and ptxas make of the CUDA kernels: registers, spilled bytes, and the instructions of the inner loops.

`nvidia-cuda-cuobjdump` and `nvidia-cuda-nvdisasm` from PyPI do the reading; the toolkit's own serve as well. As a program it prints the tables of
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
    """An innermost loop that goes through 16-byte vectors.

    Attributes:
        instructions: of one turn, by their full names (such as "LDG.E.128"), in order.
    """

    instructions: tuple[str, ...]

    def count(self, pattern: str) -> int:
        """How many instructions begin with the pattern."""
        return sum(re.match(pattern, name) is not None for name in self.instructions)

    @property
    def vectors(self) -> int:
        """The 16-byte vectors of one turn: each is stored once, or, where nothing is written, loaded once."""
        return self.count(r"STG\S*\.128") or self.count(r"LDG\S*\.128")

    @property
    def writes(self) -> bool:
        """Whether it writes to global memory."""
        return self.count("STG") > 0

    @property
    def from_shared(self) -> bool:
        """Whether its vectors come from shared memory, or go there."""
        return self.count("LDS") + self.count("STS") > 0


@dataclass(frozen=True)
class Merge:
    """How the results of a block's threads become one: instructions of a warp, barriers included.

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
        """Warp-instructions of a row in a block of so many threads."""
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
        """The loop with the most vectors in a turn that reads alone, or writes too; of those that use shared memory or do not."""
        found = [x for x in self.loops if x.writes == writes and from_shared in (None, x.from_shared)]
        return max(found, key=lambda loop: loop.vectors)


def tool(name: str) -> str:
    """Path of cuobjdump or nvdisasm.

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
    """One function's disassembly: its instructions, and label -> the place of the instruction that follows it."""
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
    """The most instructions from one place to another, both included, that a warp executes which goes through no loop twice and whose lanes
    stay together (so that BRA.DIV is not taken)."""
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
    """What merging the results of a block's threads takes in one function's disassembly, if it does that in a full block of 16-bit numbers.

    Counted are the store of a thread's result with what its address takes (not the thread's index, which the whole kernel uses), the barrier
    with all that stands between the nearest labels or branches around it, the longest way from there through the merging warps' barrier,
    and all up to the last sum of the first warp. What the compiler mixed in of other work counts, too. The barrier at which every thread
    waits for what follows from the result is not among them: the kernel needs it whatever the merge.
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
    """The innermost loops over vectors in one function's disassembly."""
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
    """Compiles a .cu file for one architecture: kernel's mangled name -> its machine code."""
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
    """Architecture -> kernel's mangled name -> its machine code."""
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
    """Registers; instructions a logit where a row is read, and where its gradient is written; warp-instructions of a full block's merge, where
    they stand apart from others."""
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
    """Prints registers, instructions a logit and those of a full block's merge of every loss kernel, for every architecture, in Markdown."""
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
