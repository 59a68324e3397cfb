"""The effect of K and λ on the cost and time of a run. In: a plan. Out: rows, a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_patch.errors import ConfigError
from megatron_patch.planning.plan import Plan, token_stage
from megatron_patch.planning.timing import step_time
from megatron_patch.stages import Stage
from megatron_patch.utils.figures import save_figure

PATCH_SIZES = (2, 3, 4, 6, 8, 16)
FRACTIONS = (*(step / 20 for step in range(20)), 0.99)


@dataclass(frozen=True)
class SensitivityPoint:
    """Cost and time for one K and λ.

    Args:
        patch_size: K.
        fraction: λ, the share of tokens read as patches.
        cost: c = λ/K + 1 - λ, FLOPs relative to token-level training on the same tokens (arXiv 2407.12665, section 2.3); exact.
        hours: device hours for the plan's tokens; estimated.
    """

    patch_size: int
    fraction: float
    cost: float
    hours: float


def sensitivity(plan: Plan, patch_sizes: Sequence[int] = PATCH_SIZES, fractions: Sequence[float] = FRACTIONS) -> list[SensitivityPoint]:
    """Returns cost and device hours of two-stage runs over the plan's tokens, for every K and λ.

    Such a run reads a share λ of the tokens in patches of K, then single tokens. Both stages have samples of T positions and the same
    tokens per step.
    """
    token = token_stage(plan.plan, plan.layout, plan.plan.stages[-1].positions)
    token_rate = step_time(plan.shape, plan.layout, token, plan.hardware).total / token.tokens_per_step
    points = []
    for k in patch_sizes:
        samples = max(plan.layout.data * token.micro_batch_size, round(token.global_batch_size / k))
        stage = Stage("patch", k, token.positions, token.micro_batch_size, samples, 1)
        patch_rate = step_time(plan.shape, plan.layout, stage, plan.hardware).total / stage.tokens_per_step
        for share in fractions:
            seconds = plan.plan.tokens * (share * patch_rate + (1 - share) * token_rate)
            points.append(SensitivityPoint(k, share, share / k + 1 - share, seconds * plan.layout.ranks / 3600))
    return points


def plot_sensitivity(plan: Plan, output: Path) -> None:
    """Draws cost and device hours against λ, one curve per K, and marks the plan.

    Raises:
        ConfigError: the file cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    points = sensitivity(plan)
    patches = sum(stage.tokens for stage in plan.plan.stages if stage.patch_size > 1) / plan.plan.tokens
    for number, k in enumerate(PATCH_SIZES):
        mine = [point for point in points if point.patch_size == k]
        color = plt.get_cmap("viridis")(number / len(PATCH_SIZES))
        for axis, values in ((left, [point.cost for point in mine]), (right, [point.hours for point in mine])):
            axis.plot([point.fraction for point in mine], values, color=color, linewidth=1.8, label=f"K = {k}")
    left.plot([patches], [plan.run.flops / plan.token_level.flops], "o", color="#d1495b", markersize=8, label="this plan")
    right.plot([patches], [plan.run.device_hours], "o", color="#d1495b", markersize=8)
    left.set_ylabel("cost: FLOPs relative to token level (counted)")
    right.set_ylabel(f"{plan.hardware.name} device hours (estimated)")
    for axis in (left, right):
        axis.set_xlabel("λ: share of tokens read as patches")
        axis.set_ylim(bottom=0)
        axis.set_xlim(0, 1)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9)
    figure.suptitle(f"{plan.layout.ranks:,} x {plan.hardware.name}, {plan.layout.name()}", fontsize=11)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, output)
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror}", "a writable image file, such as cost.png", "change --plot") from error
    finally:
        plt.close(figure)
