"""The CUDA kernels compiled for the CPU (see cuda_on_cpu.h), called with torch tensors like the operators.

Outputs are between guards, so that a kernel that writes outside of its result is noticed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from megatron_patch.ops.plain import accumulation_dtype

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "csrc" / "cuda"
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ORDERS = {"forward": 0, "backward": 1, "shuffled": 2, "warps": 3}
TILE = 64
OPTIONS = (
    *("-O1", "-std=c++20", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-clobbered"),
    *("-U_FORTIFY_SOURCE", "-ffp-contract=off", "-fsanitize=alignment", "-DMEGATRON_PATCH_CUDA_ON_CPU"),
)
_GUARD = 64


@cache
def cuda_include() -> Path | None:
    """Returns the folder of CUDA's headers, from nvcc; None without nvcc."""
    if shutil.which("nvcc") is None:
        return None
    said = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    folder = Path(top[1].strip()) / "include" if top else Path("/nowhere")
    return folder.resolve() if (folder / "cuda_bf16.h").is_file() else None


def _compile(*command: str | Path) -> None:
    done = subprocess.run(["g++", "-fPIC", *OPTIONS, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compile_kernels(sources: Path, library: Path, *options: str) -> None:
    """Compiles a folder of .cu files with the C++ compiler."""
    _compile(
        *("-shared", "-Werror", *options, "-I", HERE, "-I", sources, "-isystem", str(cuda_include())),
        *("-x", "c++", *sorted(sources.glob("*.cu")), "-o", library),
    )


def precompile_header(folder: Path) -> None:
    """Copies cuda_on_cpu.h to a folder and precompiles it, for `compile_mutant`."""
    shutil.copy(HERE / "cuda_on_cpu.h", folder)
    _compile("-w", "-isystem", str(cuda_include()), "-x", "c++-header", folder / "cuda_on_cpu.h", "-o", folder / "cuda_on_cpu.h.gch")


def compile_mutant(header: Path, file: str, text: str, replacement: str, folder: Path) -> Path:
    """Compiles one .cu file in which a text of it, or of a header, is replaced.

    Args:
        header: a folder that `precompile_header` filled.
        file: the file that holds the text; a mutant of a header is compiled with the loss kernels.
        text: the text to replace, wherever the file has it.
        replacement: the new text.
        folder: a new folder for the mutant.

    Returns:
        The library, for float32 and bfloat16 only.
    """
    shutil.copytree(SOURCES, folder)
    source = (folder / file).read_text()
    assert source.count(text) >= 1, f"{file} no longer contains the text of this mutant; update the mutant"
    (folder / file).write_text(source.replace(text, replacement))
    common = (folder / "common.cuh").read_text()
    fewer = re.sub(r"    case NumberType::k(Double|Half): .*\n", "", common)
    assert len(fewer) < len(common)
    (folder / "common.cuh").write_text(fewer)
    kernels = folder / ("multi_token_loss.cu" if file.endswith(".cuh") else file)
    library = folder / "mutant.so"
    _compile(
        *("-shared", "-w", "-include", "cuda_on_cpu.h", "-I", header, "-I", folder, "-isystem", str(cuda_include())),
        *("-x", "c++", kernels, "-o", library),
    )
    return library


class Trapped(Exception):
    """A kernel trapped; the message is the text that it printed."""


@dataclass(frozen=True)
class Guarded:
    """A tensor between guards that a kernel must not change."""

    whole: torch.Tensor
    value: torch.Tensor

    def checked(self) -> torch.Tensor:
        """Returns a copy of the tensor, after checking that its guards are unchanged."""
        before, after = self.whole[:_GUARD], self.whole[_GUARD + self.value.numel() :]
        assert bool((before == 77).all()) and bool((after == 77).all()), "a kernel wrote outside of its result"
        return self.value.clone()


def guarded(shape: tuple[int, ...], dtype: torch.dtype, fill: float = float("nan"), shift: int = 0) -> Guarded:
    """Allocates a result between guards, `shift` elements off the alignment of vectors."""
    count = 1
    for size in shape:
        count *= size
    whole = torch.full((count + 2 * _GUARD + shift,), 77.0, dtype=dtype)
    value = whole[_GUARD + shift : _GUARD + shift + count]
    value.fill_(fill)
    return Guarded(whole[shift:], value.view(shape))


@dataclass(frozen=True)
class CudaOnCpu:
    """The kernels, and the order in which their threads run.

    Args:
        library: compiled by `compile_kernels`.
        order: one of ORDERS.
        seed: of the shuffled order.
        shared_limit: bytes of shared memory that a block may ask for.
        shift: elements that inputs and results lie off the alignment of vectors.
        gap: elements, NaN, between the rows of logits that are only read.
        clusters: whether blocks may share a row, as from sm_90 on.
    """

    library: ctypes.CDLL
    order: str = "forward"
    seed: int = 1
    shared_limit: int = 64 * 1024
    shift: int = 0
    gap: int = 0
    clusters: bool = False

    def _call(self, name: str, *arguments: object) -> None:
        values = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                values.append(ctypes.c_void_p(argument.data_ptr()))
            elif isinstance(argument, bool):
                values.append(ctypes.c_bool(argument))
            elif isinstance(argument, float):
                values.append(ctypes.c_double(argument))
            elif isinstance(argument, torch.dtype):
                values.append(ctypes.c_int(TYPES[argument]))
            else:
                values.append(ctypes.c_void_p(None) if argument is None else ctypes.c_int64(argument))
        self.library.cuda_on_cpu_prepare(ORDERS[self.order], self.seed, self.shared_limit, self.clusters)
        error = self.library[name](*values, ctypes.c_void_p(None))
        self.library.cuda_on_cpu_message.restype = ctypes.c_char_p
        if error:
            raise Trapped(self.library.cuda_on_cpu_message().decode())

    def _shifted(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a copy, `shift` elements off the alignment of vectors."""
        room = guarded(tuple(tensor.shape), tensor.dtype, 0.0, self.shift)
        room.value.copy_(tensor)
        return room.value

    def _apart(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns a copy with gaps between its rows, `shift` elements off the alignment of vectors."""
        rows, vocab = logits.shape
        room = guarded((rows, vocab + self.gap), logits.dtype, shift=self.shift)
        room.value[:, :vocab] = logits
        return room.value[:, :vocab]

    def patch_embedding(self, weight: torch.Tensor, ids: torch.Tensor, vocab_start: int | None = None) -> torch.Tensor:
        """Returns the embeddings [P, H] of patches [P, K]."""
        out = guarded((len(ids), weight.shape[1]), weight.dtype, shift=self.shift)
        self._call(
            "mp_patch_embedding_forward",
            *(weight.dtype, self._shifted(weight), ids, len(ids), ids.shape[1], weight.shape[1]),
            *(vocab_start or 0, len(weight), vocab_start is None, out.value),
        )
        return out.checked()

    def patch_embedding_backward(
        self,
        grad: torch.Tensor,
        ids: torch.Tensor,
        rows: int,
        vocab_start: int | None = None,
        accumulator: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the gradient [rows, H], or the sum of it and an accumulator; sorts first, as the operator on a GPU does."""
        count, hidden = ids.numel(), grad.shape[1]
        row_of_id = guarded((count,), torch.int32, 0)
        self._call("mp_patch_embedding_rows", ids, count, vocab_start or 0, rows, row_of_id.value)
        sorted_rows, order = row_of_id.checked().sort(stable=True)
        partial = guarded((-(-count // TILE), 2, hidden), accumulation_dtype(grad.dtype))
        out = guarded((rows, hidden), grad.dtype if accumulator is None else accumulator.dtype, 0.0, self.shift)
        if accumulator is not None:
            out.value.copy_(accumulator)
        self._call(
            "mp_patch_embedding_backward",
            *(grad.dtype, self._shifted(grad), sorted_rows, order, count, ids.shape[1], hidden, rows),
            *(partial.value, out.value, accumulator is not None),
        )
        partial.checked()
        return out.checked()

    def statistics(self, logits: torch.Tensor, labels: torch.Tensor, vocab_start: int | None = None) -> torch.Tensor:
        """Returns the statistics [N, 2 + K]."""
        out = guarded((len(logits), 2 + labels.shape[1]), accumulation_dtype(logits.dtype))
        source = self._apart(logits)
        self._call(
            "mp_loss_statistics",
            *(logits.dtype, source, source.stride(0), labels, len(logits), labels.shape[1], vocab_start or 0, logits.shape[1]),
            *(vocab_start is None, out.value),
        )
        return out.checked()

    def gradient(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        normalizer: torch.Tensor,
        grad_nll: torch.Tensor,
        grad_lse: torch.Tensor,
        vocab_start: int | None = None,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Returns the gradient [N, V], computed in place, or in a tensor that may have another alignment."""
        rows, vocab = logits.shape
        out = guarded((rows, vocab), logits.dtype, shift=self.shift)
        if in_place:
            out.value.copy_(logits)
        source = out.value if in_place else dataclasses.replace(self, shift=0)._apart(logits)
        self._call(
            "mp_loss_gradient",
            *(logits.dtype, source, source.stride(0), labels, rows, labels.shape[1], vocab_start or 0, vocab),
            *(normalizer, grad_nll, grad_lse, out.value, vocab),
        )
        return out.checked()

    def loss_and_gradient(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, z_loss: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (losses [N], gradient [N, V])."""
        rows, vocab = logits.shape
        target = guarded((rows, vocab), logits.dtype, shift=self.shift)
        target.value.copy_(logits)
        losses = guarded((rows,), accumulation_dtype(logits.dtype))
        self._call(
            "mp_loss_and_gradient",
            *(logits.dtype, target.value, vocab, labels, rows, labels.shape[1], vocab, weights, float(z_loss), losses.value),
        )
        return losses.checked(), target.checked()
