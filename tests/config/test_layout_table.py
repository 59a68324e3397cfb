"""The table of combinations in docs/parallelism.md agrees with the program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_patch.config.resolve import load_config
from megatron_patch.errors import ConfigError
from megatron_patch.training.pretrain import make_engine_config

DOCS = Path(__file__).parent.parent.parent / "docs" / "parallelism.md"
RUN = "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --vocab-size 64 --seq-length 16 --train-tokens 10k --lr 1e-3 --dry-run"
RUN += " --patch-size 4 --micro-batch-size 1 --global-batch-size 8 --world-size 4"
PIPELINE, TENSOR, SEQUENCE = "--pipeline-model-parallel-size 2", "--tensor-model-parallel-size 2", "--sequence-parallel"
ROWS = {
    "float32": "",
    "bfloat16": "--bf16",
    "bfloat16 with recomputation": "--bf16 --recompute-granularity full",
    "float16 (GPU)": "--fp16",
    "tensor parallel": TENSOR,
    "tensor and sequence parallel": f"{TENSOR} {SEQUENCE}",
    "pipeline": PIPELINE,
    "pipeline, tensor and sequence parallel, bfloat16": f"{PIPELINE} {TENSOR} {SEQUENCE} --bf16",
    "experts divided by data-parallel ranks": "--num-experts 4 --expert-model-parallel-size 2",
    "compiled blocks": "--compile",
    "compiled blocks, tensor and sequence parallel": f"--compile {TENSOR} {SEQUENCE}",
    "optimizer offloaded to the CPU": "offload_optimizer",
    "optimizer offloaded to the CPU, with a pipeline": f"offload_optimizer {PIPELINE}",
    "weights offloaded to the CPU": "offload_param",
    "optimizer offloaded to NVMe": "offload_optimizer:nvme",
    "weights offloaded to NVMe": "offload_param:nvme",
}


def table() -> dict[str, list[str]]:
    section = DOCS.read_text().split("\n## Supported combinations\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    named = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}
    return {name: cells for name, cells in named.items() if set(cells) <= {"yes", "no"}}


def test_the_table_has_these_rows():
    assert set(table()) == set(ROWS)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ROWS)
def test_the_table_is_true(tmp_path, name, zero):
    words = [*RUN.split(), "--zero-stage", str(zero)]
    for word in ROWS[name].split():
        if word.startswith("offload"):
            path = tmp_path / "deepspeed.json"
            part, _, device = word.partition(":")
            path.write_text(json.dumps({"zero_optimization": {part: {"device": device or "cpu", "nvme_path": "/nvme"}}}))
            words += ["--deepspeed_config", str(path)]
        else:
            words.append(word)
    try:
        make_engine_config(load_config(words, 1))
        runs, error = "yes", ""
    except ConfigError as refused:
        runs, error = "no", str(refused)
    assert table()[name][zero] == runs, error
    assert runs == "yes" or ("Allowed: " in error and "What to do: " in error)
