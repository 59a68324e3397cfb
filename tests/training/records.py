"""Records of a run for tests of callbacks."""

from __future__ import annotations

from megatron_patch.training.callbacks.base import EvaluationRecord, RunEnd, RunStart, StepRecord

START = RunStart(0, 20, 2000, ((1000, "token"),), 0, "cpu", 1, None, 1e6, 0.5)
STEP = StepRecord(1, "patch", 0, 4, 100, 25.0, 0.25, 5.5, 1e-3, 0.9, 1000.0, 250.0, 0.1, None, 1.5, 0.01, 0.1)
EVALUATION = EvaluationRecord(1, "patch", 0, 4, 100, 25.0, "valid", 6.5, 5.25, 1000, 2.0)
END = RunEnd("done", 20, 2000, 100.0)
EXPERTS = {"expert_blocks": (1, 12), "expert_load": (1.25, 3.8), "dead_experts": (0, 5), "router_entropy": (2.0, 0.5)}
"""Fields of a step of a model with experts in two blocks."""
