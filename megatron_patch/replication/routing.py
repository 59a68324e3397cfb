"""The routing of runs with experts: load and entropy before, at and after the switch. In: metrics of runs. Out: rows, Markdown.

A load is the number of choices of the expert that most positions chose, relative to the mean of its block's experts; it is averaged over
the blocks with experts, and over the steps of a window. 1 is perfect balance, and experts / chosen ones that all choose the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WINDOW_STEPS = 20
"""Steps of a window."""


@dataclass(frozen=True)
class RoutingWindow:
    """The routing in some steps, averaged over them and over the blocks with experts.

    Args:
        load: largest over mean load.
        dead: number of a block's experts that no position of a step chose.
        entropy: entropy of the router's scores divided by their sum, in nats.
    """

    load: float
    dead: float
    entropy: float


@dataclass(frozen=True)
class Routing:
    """The routing of one run.

    Args:
        patches: the last steps before the last switch to K = 1; None without such a switch.
        first: the first step after it; None without it.
        after: the first steps after it; None without it.
        end: the last steps of the run.
    """

    patches: RoutingWindow | None
    first: RoutingWindow | None
    after: RoutingWindow | None
    end: RoutingWindow


def read_routing(records: Sequence[Mapping[str, Any]]) -> Routing | None:
    """Returns the routing of a run from its metrics, or None for a run without experts."""
    steps = [record for record in records if record.get("type") == "step" and record.get("expert_load")]
    if not steps:
        return None
    switches = [record["step"] for record in records if record.get("type") == "switch" and record["to_patch_size"] == 1]
    end = _window(steps[-WINDOW_STEPS:])
    assert end is not None
    if not switches:
        return Routing(None, None, None, end)
    before = [record for record in steps if record["step"] <= switches[-1]]
    after = [record for record in steps if record["step"] > switches[-1]]
    return Routing(_window(before[-WINDOW_STEPS:]), _window(after[:1]), _window(after[:WINDOW_STEPS]), end)


def _window(steps: Sequence[Mapping[str, Any]]) -> RoutingWindow | None:
    def mean(name: str) -> float:
        values = [value for record in steps for value in record[name] if value is not None]
        return round(statistics.fmean(values), 5) if values else float("nan")

    if not steps:
        return None
    return RoutingWindow(mean("expert_load"), mean("dead_experts"), mean("router_entropy"))


def routing_markdown(routings: Mapping[str, Sequence[Routing]]) -> str:
    """Returns a table of the routing of each arm, averaged over its seeds.

    Args:
        routings: name of an arm -> the routing of each of its runs.
    """
    lines = [
        f"| arm | seeds | load, last {WINDOW_STEPS} patch steps | first token step | first {WINDOW_STEPS} | last {WINDOW_STEPS} | "
        "dead, patches | dead, end | entropy, patches | entropy, end |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm, runs in routings.items():
        cells = [_mean([run.patches for run in runs], "load", ".2f"), _mean([run.first for run in runs], "load", ".2f")]
        cells += [_mean([run.after for run in runs], "load", ".2f"), _mean([run.end for run in runs], "load", ".2f")]
        cells += [_mean([run.patches for run in runs], "dead", ".1f"), _mean([run.end for run in runs], "dead", ".1f")]
        cells += [_mean([run.patches for run in runs], "entropy", ".3f"), _mean([run.end for run in runs], "entropy", ".3f")]
        lines.append(f"| `{arm}` | {len(runs)} | {' | '.join(cells)} |")
    lines += [
        "",
        "Load: choices of the expert that most positions chose, relative to the mean of its block's experts, averaged over the blocks; 1",
        "is perfect balance. Dead: number of a block's experts that no position of a step chose. Entropy of the router's scores, in nats.",
        "",
    ]
    return "\n".join(lines)


def _mean(windows: Sequence[RoutingWindow | None], name: str, form: str) -> str:
    values = [getattr(window, name) for window in windows if window is not None]
    return format(statistics.fmean(values), form) if values else ""
