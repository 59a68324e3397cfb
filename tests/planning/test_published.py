"""The plan against published runs: the table in the docs, the fit of the efficiencies, the sizes of the models, the memory of devices."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import pytest

from megatron_patch.model.flops import parameter_count
from megatron_patch.planning.hardware import DEVICES, Hardware
from megatron_patch.planning.published import PUBLISHED, SHAPES, calibration, planned_error, planned_speed, published_table
from megatron_patch.planning.traffic import Traffic

ROOT = Path(__file__).parent.parent.parent
FITTED = [run for run in PUBLISHED if run.fitted]


def test_the_docs_show_what_the_plan_says_now():
    text = (ROOT / "docs/planning.md").read_text()
    shown = text.split("<!-- published -->\n")[1].split("\n<!-- end of published -->")[0]
    assert shown == "\n".join(published_table()), "replace the table by the output of: python tools/plan.py --published"


def test_the_docs_show_the_figures_of_the_devices():
    text = (ROOT / "docs/planning.md").read_text()
    for name, device in DEVICES.items():
        mebibytes = f"{device.memory_gib * 1024:,.0f} MiB = {device.memory_gib:.1f} GiB"
        assert f"| {name}{' (80 GB)' if name == 'A100' else ''} | {mebibytes} | {device.usable_gib:.1f} GiB |" in text
    shown = json.loads(text.split("```json\n")[1].split("```")[0])
    known = dataclasses.asdict(DEVICES["H100"])
    assert set(shown) == set(known) - {"name"}
    for key in shown:
        assert shown[key] == pytest.approx(known[key], rel=1e-3), key


@pytest.mark.parametrize(
    ("gpu", "devices", "speed"), [("H100", 8, 6667), ("H100", 128, 6514), ("A100", 64, 2904), ("A100", 64, 331), ("H100", 128, 109)]
)
def test_torchtitan_s_speeds_are_planned_within_six_percent(gpu, devices, speed):
    (run,) = (run for run in PUBLISHED if (run.gpu, run.devices, run.speed) == (gpu, devices, speed))
    assert run.source.name == "torchtitan" and run.fitted and abs(planned_error(run)) < 0.06


@pytest.mark.parametrize("gpu", ["A100", "H100"])
def test_nine_of_ten_fitted_runs_are_planned_within_a_tenth(gpu):
    errors = [planned_error(run) for run in FITTED if run.gpu == gpu]
    assert sum(abs(error) < 0.1 for error in errors) >= 0.9 * len(errors)


def test_held_out_runs_of_megatron_were_faster_than_planned_by_at_most_a_quarter():
    errors = [planned_error(run) for run in PUBLISHED if run.source.name == "NeMo" and run.gpu == "H100"]
    assert len(errors) == 9 and all(-0.25 < error < 0 for error in errors)


def squared_error(changed):
    """The sum of squared logarithms that the efficiencies minimize; each source weighs the same on each device."""
    runs = Counter((run.source.name, run.gpu) for run in FITTED)
    errors = ((run, math.log(1 + planned_error(run, changed(DEVICES[run.gpu])))) for run in FITTED)
    return sum(error**2 / runs[run.source.name, run.gpu] for run, error in errors)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        *((name, gpu) for name in ("matmul_efficiency", "attention_efficiency") for gpu in ("A100", "H100")),
        ("memory_passes", None),
        ("overlap", None),
    ],
)
def test_the_efficiencies_are_the_least_squares(name, gpu):
    least = squared_error(lambda device: device)
    for factor in (0.93, 1.07):

        def changed(device, factor=factor):
            return dataclasses.replace(device, **{name: getattr(device, name) * factor}) if gpu in (None, device.name) else device

        assert squared_error(changed) > least


def test_devices_that_no_run_was_fitted_to_have_the_h100_s_efficiencies():
    for name in ("H200", "B200"):
        same = ("matmul_efficiency", "attention_efficiency", "memory_passes", "compiled_passes", "overlap", "link_efficiency")
        assert all(getattr(DEVICES[name], field) == getattr(DEVICES["H100"], field) for field in same)
        assert "assume the H100's efficiencies" in calibration(DEVICES[name])
    assert "fitted to 22 published runs of other programs on H100" in calibration(DEVICES["H100"])
    assert "not timed on a GPU" in calibration(DEVICES["A100"])
    assert calibration(dataclasses.replace(DEVICES["H100"], overlap=0.9)) == "Times follow from the figures of --ceilings."


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        # llm-foundry's table gives these numbers for 2,048 positions.
        ("MPT 1B", 1315950592),
        ("MPT 3B", 2651837440),
        ("MPT 7B", 6658859008),
        ("MPT 13B", 12853954560),
        ("MPT 30B", 29975214080),
        ("MPT 70B", 64862437376),
        ("Llama 3 8B", 8030261248),
        ("Llama 3 70B", 70553706496),
        ("Llama 3 405B", 405853388800),
        ("Llama 2 13B", 13015864320),
        ("Llama 2 70B", 68976648192),
        ("GPT-3 175B", 174.6e9),
        ("Nemotron-4 340B", 341.0e9),
    ],
)
def test_models_have_the_published_number_of_parameters(model, parameters):
    shape = dataclasses.replace(SHAPES[model], max_positions=2048)
    assert parameter_count(shape).total == pytest.approx(parameters, rel=2e-3)


def test_memory_is_what_the_driver_reports_less_what_a_run_cannot_use():
    assert {name: round(device.memory_gib, 1) for name, device in DEVICES.items()} == {
        "A100": 80.0,
        "H100": 79.6,
        "H200": 140.4,
        "B200": 179.1,
    }
    # What torch reports as the total memory of these devices.
    total = {"A100": 79.15, "H100": 79.1, "H200": 139.72, "B200": 178.35}
    for name, device in DEVICES.items():
        assert total[name] - 2.1 < device.usable_gib < total[name] - 1.5
    assert DEVICES["H100"].usable_text() == "the 77.1 GiB that are usable on one H100 of 79.6 GiB"


def test_a_group_s_ranks_in_a_node_share_their_network_ports():
    device = Hardware("one", 1, 1, 1, node_gb_per_second=400, network_gb_per_second=50, link_efficiency=0.5)
    assert Traffic("data", "network", 1e9).seconds(device) == pytest.approx(1 / 25)
    assert Traffic("data", "network", 1e9, ports=4, ranks=8).seconds(device) == pytest.approx(1 / 100)
    assert Traffic("data", "network", 1e9, ports=16, ranks=32).seconds(device) == pytest.approx(1 / 200), "the links of the node limit"
    assert Traffic("data", "node", 1e9, ports=8, ranks=8).seconds(device) == pytest.approx(1 / 200)
    # Two passes through 16 ranks of 2 nodes: 14 hops in nodes, one between them.
    hops = Traffic("data", "network", 0.0, ports=8, ranks=16, rounds=2).seconds(device)
    assert hops == pytest.approx(2 * (14 * 3.4e-6 + 14e-6))


def test_interleaving_and_recomputation_enter_a_published_run():
    (run,) = (run for run in PUBLISHED if run.model == "GPT-3 175B" and run.devices == 128)
    assert planned_speed(dataclasses.replace(run, chunks=1)) < planned_speed(run)
    assert planned_speed(dataclasses.replace(run, recomputed=1)) < planned_speed(dataclasses.replace(run, recomputed=0.5))
