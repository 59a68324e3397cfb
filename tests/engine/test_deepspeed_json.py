"""The JSON of --deepspeed_config: everything that a run would die of, or ignore, is found before it starts, and all of it at once."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import subprocess
import sys
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.config.resolve import load_config
from megatron_patch.engine import deepspeed_json
from megatron_patch.engine.accelerator import choose_accelerator
from megatron_patch.engine.deepspeed_config import EngineConfig, batch_settings, resolve_engine_config
from megatron_patch.engine.deepspeed_json import import_section_class
from megatron_patch.engine.deepspeed_keys import CLASSES, FIXED, PLAIN, REFUSED, VALUES, WITHOUT_EFFECT
from megatron_patch.errors import ConfigError
from megatron_patch.planning.layout import layout_of

RUN = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --train-tokens 8k --global-batch-size 8 --vocab-size 64"
FULL = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": 0.5,
    "communication_data_type": "fp32",
    "steps_per_print": 100,
    "wall_clock_breakdown": False,
    "memory_breakdown": False,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "log_level": "warning",
    "bf16": {"enabled": True, "immediate_grad_update": True, "check_grad_overflow": True},
    "fp16": {"enabled": False, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 5e8,
        "sub_group_size": 1e9,
        "stage3_param_persistence_threshold": "auto",
        "stage3_prefetch_bucket_size": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True, "buffer_count": 4},
        "offload_param": {"device": "nvme", "nvme_path": "/nvme", "buffer_size": 1e8},
        "leaf_module": {"names": []},
    },
    "aio": {"block_size": 1048576, "queue_depth": 8, "overlap_events": True},
    "flops_profiler": {"enabled": True, "profile_step": 1, "module_depth": -1, "output_file": None},
    "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
    "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
    "data_types": {"grad_accum_dtype": "fp32"},
    "timers": {"throughput": {"enabled": False, "synchronized": True}},
    "tensorboard": {"enabled": False},
}


@pytest.fixture(scope="module")
def engine_config(tmp_path_factory):
    """Returns a function from a JSON (text or value) and flags to the engine's configuration, as a dry run makes it."""
    path = tmp_path_factory.mktemp("json") / "ds.json"

    @cache
    def run_with(words):
        return load_config([*RUN.split(), "--dry-run", "--deepspeed_config", str(path), *words.split()], 1)

    def make(data, words=""):
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        run = run_with(words)
        engine = resolve_engine_config(run.options.engine, run.options.schedule, run.origins, run.plan, run.data_parallel_size)
        layout_of(run, engine)
        make.settings = {**engine.deepspeed, **batch_settings(run.plan.stages[0], 1)}
        return engine

    return make


def refused(engine_config, data, words="") -> ConfigError:
    with pytest.raises(ConfigError) as error:
        engine_config(data, words)
    assert error.value.exit_code == 2
    return error.value


def zero(**settings):
    return {"zero_optimization": settings}


ZERO_KEYS = "keys of zero_optimization that DeepSpeed knows"


@pytest.mark.parametrize(
    ("data", "what", "allowed", "do"),
    [
        ({"bf16": {"enable": True}}, "bf16.enable is not a key that DeepSpeed knows", "enabled", "did you mean enabled?"),
        (zero(Stage=3), "zero_optimization.Stage is not a key that DeepSpeed knows", ZERO_KEYS, "did you mean stage?"),
        (zero(stage3_param_persitance_threshold=1), "persitance_threshold is not a key", ZERO_KEYS, "stage3_param_persistence_threshold"),
        (zero(offload_optimiser={"device": "cpu"}), "offload_optimiser is not a key", ZERO_KEYS, "did you mean offload_optimizer"),
        (
            zero(stage=3, offload_param={"device": "cpu", "buffer_sise": 1}),
            "offload_param.buffer_sise",
            "buffer_size",
            "did you mean buffer",
        ),
        (zero(offload_optimizer={"strict": True}), "offload_optimizer.strict is not a key", "device", ""),
        (zero(gradient_clipping=1.0), "zero_optimization.gradient_clipping is not a key", ZERO_KEYS, "move it out of the section"),
        ({"stage": 2}, "stage is not a key that DeepSpeed knows", "keys of the file", "move it into zero_optimization"),
        ({"zero_optimizaton": {}}, "zero_optimizaton is not a key", "keys of the file", "did you mean zero_optimization?"),
        (
            {"flops_profiler": {"profile_steps": 1}},
            "flops_profiler.profile_steps is not a key",
            "profile_step",
            "did you mean profile_step?",
        ),
        ({"timers": {"throughputs": {}}}, "timers.throughputs is not a key", "throughput", "did you mean throughput?"),
        ('{"bf16": {"enabled": true, "enabled": false}}', "bf16.enabled is given twice", "each key once", "remove one of them"),
        ('{"gradient_clipping": 1, "gradient_clipping": 2}', "gradient_clipping is given twice", "each key once", "remove one of them"),
        ('{"gradient_clipping": NaN}', "gradient_clipping is NaN", "finite numbers", "correct gradient_clipping"),
        ('{"zero_optimization": {"reduce_bucket_size": 1e999}}', "reduce_bucket_size is Infinity", "finite numbers", "correct"),
        (zero(reduce_bucket_size=0), "zero_optimization.reduce_bucket_size is 0", "numbers above 0", "correct zero_optimization.reduce"),
        (zero(reduce_bucket_size=-5), "zero_optimization.reduce_bucket_size is -5", "numbers above 0", "correct"),
        (zero(reduce_bucket_size=1.5), "zero_optimization.reduce_bucket_size is 1.5", "whole numbers", "correct"),
        (zero(reduce_bucket_size="1e9"), 'zero_optimization.reduce_bucket_size is "1e9"', "whole numbers", "correct"),
        (zero(reduce_bucket_size="500"), 'reduce_bucket_size is "500"', "numbers, without quotation marks", "write 500, or remove it"),
        (zero(reduce_bucket_size=True), "zero_optimization.reduce_bucket_size is true", "numbers", "correct zero_optimization.reduce"),
        (zero(reduce_bucket_size=None), "zero_optimization.reduce_bucket_size is null", "whole numbers", "or remove it"),
        (zero(overlap_comm="yes"), 'zero_optimization.overlap_comm is "yes"', "true or false", "write true, or remove it"),
        (zero(overlap_comm=1), "zero_optimization.overlap_comm is 1", "true or false", "correct zero_optimization.overlap_comm"),
        (zero(offload_optimizer={"device": "gpu"}), 'offload_optimizer.device is "gpu"', "none, cpu or nvme", "correct"),
        (zero(offload_optimizer="cpu"), 'zero_optimization.offload_optimizer is "cpu"', "a JSON object", "as an object"),
        ({"zero_optimization": None}, "zero_optimization is null", "a JSON object", "write zero_optimization as an object, or remove it"),
        ({"comms_logger": {"prof_ops": "all"}}, 'comms_logger.prof_ops is "all"', "a valid list", "correct comms_logger.prof_ops"),
        ({"fp16": {"loss_scale": -1}}, "fp16.loss_scale is refused by DeepSpeed: fp16.loss_scale must be >= 0", "accepts", "correct"),
        ({"aio": {"queue_depth": "deep"}}, 'aio.queue_depth is "deep"', "whole numbers from 1", "correct aio.queue_depth, or remove it"),
        ({"aio": {"thread_count": 2}}, "aio.thread_count cannot be used: it is the old name", "docs", "rename it to intra_op_parallelism"),
        (zero(stage=4), "zero_optimization.stage is 4", "0, 1, 2 or 3", "correct zero_optimization.stage"),
        ({"fp16": {"enabled": True, "initial_scale_power": 64}}, "fp16.initial_scale_power is 64", "0 to 62", "remove it"),
        ({"fp16": {"enabled": True, "initial_scale_power": -1}}, "fp16.initial_scale_power is -1", "0 to 62", "remove it"),
        ({"steps_per_print": 0}, "steps_per_print is 0", "whole numbers from 1, or null", "correct steps_per_print, or remove it"),
        ({"log_level": "loud"}, 'log_level is "loud"', "debug, info, warning, error, critical", "correct log_level"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast without a dtype", '"dtype": "bfloat16"', "or remove the section"),
        ({"torch_autocast": {"enabled": True, "dtype": "fp16"}}, 'torch_autocast.dtype is "fp16"', "bfloat16", "correct"),
        (zero(round_robin_gradients=True), "round_robin_gradients is true: it moves parameters", "false", "remove it"),
        (zero(stage=3, zero_hpz_partition_size=8), "zero_hpz_partition_size is 8: its second copy", "1", "remove it"),
        (zero(cpu_offload=True), "cpu_offload is true: it is an old name of offload_optimizer", "false", '"offload_optimizer": {"device"'),
        (zero(zenflow={"topk_ratio": 0.1}), "zero_optimization.zenflow is set: it would replace", "null", "remove it"),
        (
            {"elasticity": {"enabled": True}},
            "elasticity cannot be used: DeepSpeed no longer has it",
            "docs/parallelism.md",
            "--global-batch",
        ),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning cannot be used", "docs/parallelism.md", "stages:"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency cannot be used: the program reads the data itself", "docs", "stages:"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer cannot be used: the program makes the optimizer", "docs", "--lr"),
        ({"optimizer": {"type": "Muon"}}, "optimizer cannot be used: the program makes the optimizer", "docs", "for Muon --muon-lr"),
        (zero(save_muon_momentum_buffer_in_memory=True), "in_memory is true: it is for DeepSpeed's own Muon", "false", "--optimizer muon"),
        (zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), "offload_optimizer.ratio is 0.5: it would replace", "1", "remove it"),
    ],
)
def test_each_problem_has_three_parts(engine_config, data, what, allowed, do):
    error = refused(engine_config, data)
    assert what in error.what and error.what.startswith("--deepspeed_config"), error
    assert allowed in (error.allowed or "") and do in (error.do or ""), error


def test_autocast_with_muon_is_refused_and_with_adamw_it_is_not(engine_config):
    data = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    error = refused(engine_config, data, "--optimizer muon")
    assert error.what.startswith("--deepspeed_config turns on torch_autocast with --optimizer muon") and "--bf16" in (error.do or "")
    assert engine_config(data).precision == "fp32"


def test_all_problems_are_stated_at_once(engine_config):
    data = {
        "bf16": {"enable": True},
        "elasticity": {"enabled": True},
        "zero_optimization": {"Stage": 3, "reduce_bucket_size": True, "allgather_bucket_size": "x", "offload_param": {"device": 1}},
        "gradient_clipping": 2.0,
        "train_batch_size": 99,
    }
    error = refused(engine_config, data, "--clip-grad 1.0")
    assert error.what.startswith("8 problems in --deepspeed_config ")
    for words in (
        "- bf16.enable is not a key",
        "- elasticity cannot be used",
        "- zero_optimization.Stage is not a key",
        "- zero_optimization.reduce_bucket_size is true",
        '- zero_optimization.allgather_bucket_size is "x"',
        "- zero_optimization.offload_param.device is 1",
        "--clip-grad is 1.0, but --deepspeed_config sets gradient_clipping = 2.0",
        "sets train_batch_size = 99, but the first stage of the plan has 8",
    ):
        assert words in error.what, words
    assert error.what.count("Allowed: ") == error.what.count("What to do: ") == 8


@pytest.mark.parametrize("path", REFUSED)
def test_what_this_program_would_ignore_is_refused_unless_it_is_off(engine_config, path):
    section, _, key = path.partition(".")
    if key:
        error = refused(engine_config, {section: {key: 1}})
    else:
        error = refused(engine_config, {path: {"enabled": True}})
        (note,) = engine_config({path: {"enabled": False}}).notes
        assert "without effect" in note and path in note
    assert REFUSED[path].why in error.what and error.do == REFUSED[path].do


@pytest.mark.parametrize("path", FIXED)
def test_values_that_would_break_a_run_are_refused(engine_config, path):
    *sections, key = path.split(".")

    def at_its_place(value):
        data = {key: value}
        for section in reversed(sections):
            data = {section: data}
        return data

    assert key not in json.dumps(dict(engine_config(at_its_place(FIXED[path].value)).deepspeed))
    other = not FIXED[path].value if isinstance(FIXED[path].value, bool) else {} if FIXED[path].value is None else 0.5
    assert FIXED[path].why in refused(engine_config, at_its_place(other)).what


@pytest.mark.parametrize(
    ("data", "words", "what"),
    [
        ({"prescale_gradients": True}, "--zero-stage 2", "prescale_gradients with ZeRO 2"),
        ({"gradient_predivide_factor": 2}, "--zero-stage 3", "gradient_predivide_factor with ZeRO 3"),
        ({"wall_clock_breakdown": True}, "--pipeline-model-parallel-size 2 --world-size 2", "wall_clock_breakdown with a pipeline"),
        ({"flops_profiler": {"enabled": True}}, "--pipeline-model-parallel-size 2 --world-size 2", "flops_profiler with a pipeline"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "--loss-scale 64", "fp16.loss_scale = 128"),
        ({"fp16": {"enabled": True, "initial_scale_power": 8}}, "--initial-loss-scale 1024", "fp16.initial_scale_power"),
    ],
)
def test_settings_that_do_not_run_with_the_flags_are_refused(engine_config, data, words, what):
    assert what in refused(engine_config, data, words).what


def test_settings_that_run_are_kept(engine_config):
    assert engine_config({"prescale_gradients": True}, "--zero-stage 1").deepspeed["prescale_gradients"]
    off = {"prescale_gradients": True, "zero_optimization": {"stage": 2, "reduce_scatter": False}}
    assert engine_config(off).deepspeed["prescale_gradients"]
    assert engine_config({"fp16": {"enabled": True}}, "--loss-scale 64").deepspeed["fp16"]["loss_scale"] == 64
    assert engine_config(zero(prefetch_bucket_size=7)).deepspeed["zero_optimization"] == {"stage3_prefetch_bucket_size": 7, "stage": 1}


def test_a_full_file_is_accepted_by_deepspeed(engine_config):
    from deepspeed.runtime.config import DeepSpeedConfig

    engine = engine_config(FULL)
    DeepSpeedConfig(copy.deepcopy(engine_config.settings))
    merged = engine.deepspeed["zero_optimization"]
    assert (engine.precision, engine.zero_level) == ("bf16", 3)
    assert merged["reduce_bucket_size"] == 500_000_000 and isinstance(merged["reduce_bucket_size"], int)
    automatic, dropped = engine.notes
    assert "train_micro_batch_size_per_gpu, zero_optimization.stage3_param_persistence_threshold" in automatic
    assert "stage3_gather_16bit_weights_on_model_save" in dropped and "tensorboard" in dropped


def _automatic(value):
    return {key: _automatic(item) for key, item in value.items()} if isinstance(value, dict) else "auto"


def test_auto_is_accepted_everywhere_with_one_note(engine_config):
    data = _automatic(FULL)
    del data["tensorboard"]
    engine = engine_config(data)
    plain = engine_config("{}")
    assert (engine.precision, engine.zero_level, engine.clip_grad) == (plain.precision, plain.zero_level, plain.clip_grad)
    assert '"auto"' not in json.dumps(engine.deepspeed)
    assert len([note for note in engine.notes if '"auto"' in note]) == 1
    assert engine_config({"zero_optimization": "auto", "bf16": "auto"}).zero_level == 1


class _Recorder(dict):
    """A dictionary that records which keys are asked for."""

    def __init__(self, data=()):
        super().__init__(data)
        self.seen = set()

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.seen.add(key)
        return super().__contains__(key)

    def keys(self):
        return self

    def __iter__(self):
        return iter([])


def test_the_tables_have_exactly_the_keys_that_deepspeed_reads():
    choose_accelerator()
    from deepspeed.runtime.config import (
        _REMOVED_TOP_LEVEL_CONFIG_KEYS,
        _REMOVED_ZERO_CONFIG_KEYS,
        DeepSpeedConfig,
    )

    plain = {section: _Recorder() for section in (*PLAIN, "checkpoint", "activation_checkpointing")}
    recorder = _Recorder({"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, **plain})
    DeepSpeedConfig(recorder)
    sections = {section for section in CLASSES if "." not in section}
    accepted, read = {*VALUES, *PLAIN, *sections}, recorder.seen - {"zero_optimization", "tp"}
    assert read - accepted - set(REFUSED) == set()
    assert accepted - read <= {"zero_optimization"}
    for section in PLAIN:
        known = {*PLAIN[section], *(path.partition(".")[2] for path in {*REFUSED, *CLASSES} if path.startswith(f"{section}."))}
        assert plain[section].seen <= known and set(PLAIN[section]) <= plain[section].seen | known, section
    assert set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(REFUSED)
    assert {f"zero_optimization.{key}" for key in _REMOVED_ZERO_CONFIG_KEYS} <= set(REFUSED)


def test_the_constants_of_plain_sections_are_those_of_deepspeed():
    from deepspeed.profiling import constants as profiler
    from deepspeed.runtime import constants
    from deepspeed.runtime.swap_tensor import constants as aio

    def names(module, prefix):
        found = {getattr(module, name) for name in dir(module) if name.startswith(prefix) and not name.endswith(("_DEFAULT", "_FORMAT"))}
        return found - {prefix.rstrip("_").lower()}

    assert names(aio, "AIO_") == set(PLAIN["aio"])
    assert names(profiler, "FLOPS_PROFILER_") == set(PLAIN["flops_profiler"])
    autocast = {path.partition(".")[2] for path in REFUSED if path.startswith("torch_autocast.")}
    assert names(constants, "TORCH_AUTOCAST_") == set(PLAIN["torch_autocast"]) | autocast
    types = {constants.GRAD_ACCUM_DTYPE, constants.PARAM_DTYPE, constants.BUFFER_DTYPE, constants.KEEP_IN_FP32_MODULES}
    assert types == set(PLAIN["data_types"]) | {path.partition(".")[2] for path in REFUSED if path.startswith("data_types.")}


def test_paths_in_the_tables_exist_in_deepspeed_s_classes():
    known = set()
    for section in CLASSES:
        for name, field in deepspeed_json._fields(import_section_class(section)).items():
            known |= {f"{section}.{name}"}
            if field.model is not None:
                known |= {f"{section}.{name}.{inner}" for inner in deepspeed_json._fields(field.model)}
    assert {*FIXED, *WITHOUT_EFFECT} <= known


ODD = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        1.5,
        5e8,
        1e300,
        math.nan,
        math.inf,
        "",
        "auto",
        "1e9",
        "7",
        "fp32",
        "cpu",
        "x",
        [],
        {},
        [1],
        {"a": 1},
    ]
)


@given(data=st.data())
def test_any_file_is_refused_here_or_accepted_by_deepspeed(engine_config, data):
    """Random changes of a full file: other values, other names, objects in place of values, keys in other sections."""
    choose_accelerator()
    from deepspeed.runtime.config import DeepSpeedConfig

    file = copy.deepcopy(FULL)
    for _ in range(data.draw(st.integers(1, 3))):
        place, keys = file, list(file)
        while True:
            key = data.draw(st.sampled_from(keys))
            if isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
                place, keys = place[key], list(place[key])
            else:
                break
        kind = data.draw(st.sampled_from(["value", "remove", "rename", "move", "refuse"]))
        if kind == "value":
            place[key] = data.draw(ODD)
        elif kind == "rename":
            place[data.draw(st.sampled_from([key.upper(), key[:-1], key + "s", key.replace("_", "-"), "self", "strict"]))] = place.pop(key)
        elif kind == "move":
            file[key] = place.pop(key)
        elif kind == "refuse":
            place[data.draw(st.sampled_from([*REFUSED, *FIXED, *WITHOUT_EFFECT])).rpartition(".")[2]] = data.draw(ODD)
        else:
            del place[key]
        if not file:
            file = {"bf16": {}}
    zero_level = data.draw(st.sampled_from(["", "--zero-stage 0", "--zero-stage 2", "--zero-stage 3 --bf16"]))
    try:
        engine_config(file, zero_level)
    except ConfigError:
        return
    DeepSpeedConfig(copy.deepcopy(engine_config.settings))


@given(
    st.recursive(
        ODD, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from([*VALUES, *CLASSES, "x"]), inner, max_size=3)
    )
)
def test_no_json_ends_with_a_traceback(engine_config, value):
    with contextlib.suppress(ConfigError):
        engine_config(value if not isinstance(value, str) else json.dumps(value))


def test_without_deepspeed_only_a_file_needs_it(engine_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    error = refused(engine_config, {"bf16": {"enabled": True}})
    assert error.what == "--deepspeed_config needs DeepSpeed, which is not installed" and "megatron_patch[train]" in (error.do or "")
    run = load_config([*RUN.split(), "--dry-run"], 1)
    assert resolve_engine_config(run.options.engine, run.options.schedule, run.origins, run.plan, 1).zero_level == 1


def test_quantized_communication_is_refused_on_cpus(engine_config):
    engine: EngineConfig = engine_config({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}})
    engine.require_device("cuda")
    with pytest.raises(ConfigError, match="zero_quantized_weights, but the ranks run on CPUs"):
        engine.require_device("cpu")
    engine_config("{}").require_device("cpu")


def test_a_dry_run_prints_nothing_of_deepspeed_s_own(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"bf16": {"enable": true}}')
    done = subprocess.run(
        [sys.executable, "pretrain_gpt_patch.py", *RUN.split(), "--dry-run", "--deepspeed_config", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("ConfigError: --deepspeed_config: bf16.enable is not a key")
    assert "Traceback" not in done.stderr and "WARNING" not in done.stderr + done.stdout
