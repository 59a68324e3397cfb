"""pretrain: any number of runs in one process, the losses of the command line, and what own optimizers and models cannot do."""

from __future__ import annotations

import functools
import gc
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from megatron_patch.api import each_step, load_config, load_model, pretrain
from megatron_patch.errors import CheckpointError, ConfigError, DataError
from megatron_patch.exit_codes import ExitCode
from megatron_patch.training.callbacks.base import Callback
from megatron_patch.utils.console import in_notebook, line_width, make_console
from tests.api import own
from tests.api.runs import TINY, corpus_in, left_threads, process_state, without_launcher
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Run, train


def config(corpus, **options):
    return load_config(TINY, data_path=corpus, **options)


def refused(error: type[Exception], *words: str, **settings) -> None:
    """Checks the error of a run of its own: settings of `pretrain`, all others of `load_config`."""
    parts = {name: settings.pop(name) for name in ("model", "optimizer", "callbacks") if name in settings}
    with pytest.raises(error) as caught:
        pretrain(config(**settings), **parts)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not isinstance(caught.value, ConfigError) or (caught.value.allowed and caught.value.do)


class Fails:
    """Makes a callback raise an error at a step."""

    def __new__(cls, error, at=3):
        def step(record):
            if record.step == at:
                raise error

        return each_step(step)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpus_in(tmp_path_factory.mktemp("api"))


def many_runs(folder, corpus) -> list[list[float]]:
    without_launcher()
    state, threads = process_state(), set(threading.enumerate())

    def unchanged() -> None:
        now = process_state()
        assert {name for name in state if state[name] != now[name]} == set()
        assert left_threads(threads) == []

    results = [pretrain(config(corpus, save=folder / "one", zero_stage=1))]
    unchanged()
    refused(DataError, "nowhere", corpus=str(folder / "nowhere"))
    refused(ConfigError, "--fp16", corpus=corpus, fp16=True)
    unchanged()
    for error in (ZeroDivisionError("of the user"), KeyboardInterrupt()):
        refused(type(error), corpus=corpus, save=folder / "two", callbacks=[Fails(error)])
        error.__traceback__ = None  # its frames hold the trainer
        unchanged()
    assert not (folder / "two" / "lock").exists()
    stopped = pretrain(config(corpus, save=folder / "two"), callbacks=[each_step(lambda record: os.kill(os.getpid(), signal.SIGINT))])
    unchanged()
    assert (stopped.stop_reason, stopped.exit_code, stopped.finished) == ("SIGINT", ExitCode.PREEMPTED, False)
    assert stopped.checkpoint == folder / "two" / "step-00000001" and stopped.step == 1
    for zero in (1, 0, 3):
        results.append(pretrain(config(corpus, save=folder / "two" if zero == 1 else None, zero_stage=zero)))
        unchanged()
    assert [result.finished for result in results] == [True] * 4
    gc.collect()
    assert [one for one in gc.get_objects() if type(one).__name__ in ("GPTModel", "ProcessGroup", "DataParallelEngine")] == []
    again = pretrain(config(corpus, save=folder / "one", zero_stage=1))
    assert (again.step, again.training_loss, again.token_loss) == (results[0].step, results[0].training_loss, results[0].token_loss)
    return [[record["loss"] for record in result.records("step")] for result in results]


def test_runs_follow_each_other_also_after_failed_and_stopped_ones_and_leave_the_process_as_it_was(corpus, tmp_path):
    (runs,) = run_ranks(many_runs, 1, tmp_path / "logs", tmp_path, corpus)
    line = train(
        tmp_path / "line",
        1,
        *(word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))),
        "--data-path",
        corpus,
    )
    assert runs[0] == runs[1] == line.losses and len(line.losses) == 12
    for other_level in runs[2:]:  # whether other ZeRO levels round alike depends on the processor
        assert other_level == pytest.approx(line.losses, rel=1e-6)
    ends = [event for event in (tmp_path / "two" / "events.jsonl").read_text().splitlines() if '"end"' in event]
    assert "ZeroDivisionError" in ends[0] and "of the user" in ends[0] and "KeyboardInterrupt" in ends[1]


def results(folder, corpus) -> None:
    without_launcher()
    seen = []
    saved = pretrain(config(corpus, save=folder / "run"), callbacks=[each_step(seen.append)])
    kept = pretrain(config(corpus))
    run = Run(folder / "run")
    assert saved.save == folder / "run" and saved.checkpoint == folder / "run" / "step-00000012" and kept.save is kept.checkpoint is None
    assert saved.records("step") == run.records("step") and [one.loss for one in seen] == run.losses
    without_times = [{name: value for name, value in one.items() if name in ("type", "step", "loss", "token_loss")} for one in kept.metrics]
    assert without_times == [
        {name: value for name, value in one.items() if name in ("type", "step", "loss", "token_loss")}
        for one in saved.metrics
        if one["type"] != "save"
    ]
    last = run.records("evaluation")[-1]
    assert (saved.training_loss, saved.token_loss, saved.patch_loss) == (run.losses[-1], last["token_loss"], last["patch_loss"])
    assert (saved.step, saved.tokens, saved.stop_reason, saved.exit_code) == (12, 1536, "done", ExitCode.DONE)
    early = pretrain(config(corpus, exit_interval=2, save=folder / "early"))
    assert (early.stop_reason, early.step, early.exit_code, early.finished) == ("exit interval", 2, ExitCode.DONE, False)


def test_a_result_has_the_losses_and_records_of_the_metrics_file(corpus, tmp_path):
    run_ranks(results, 1, tmp_path / "logs", tmp_path, corpus)


def in_a_thread(corpus) -> None:
    without_launcher()
    found: list[object] = []

    def target() -> None:
        def nested(record) -> None:
            with pytest.raises(ConfigError, match="another run is in progress in this process"):
                pretrain(config(corpus))

        try:
            found.append(pretrain(config(corpus), callbacks=[each_step(nested)]))
        except BaseException as error:
            found.append(error)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=target)
    thread.start()
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    thread.join(60)
    assert getattr(found[0], "finished", found[0]) is True


def test_a_run_works_in_another_thread_than_the_main_one_and_only_one_at_a_time(corpus, tmp_path):
    run_ranks(in_a_thread, 1, tmp_path / "logs", corpus)


def unchanged():
    return None


def optimizers(folder, corpus) -> None:
    without_launcher()
    at = {"corpus": corpus}
    sharded = pretrain(config(corpus, save=folder / "radam", zero_stage=1, exit_interval=6), optimizer=own.radam)
    assert (sharded.step, sharded.finished) == (6, False)
    refused(CheckpointError, "--optimizer", "radam", "adamw", save=folder / "radam", **at)
    refused(
        ConfigError, "--optimizer radam is not a known name", save=folder / "radam", **at, optimizer=None, args=["--optimizer", "radam"]
    )
    resumed = pretrain(config(corpus, save=folder / "radam", zero_stage=1), optimizer=own.radam)
    plain, adamw = pretrain(config(corpus, zero_stage=0), optimizer=own.radam), pretrain(config(corpus))
    assert resumed.training_loss == pytest.approx(plain.training_loss, rel=1e-6) and resumed.training_loss != adamw.training_loss
    assert pretrain(config(corpus, zero_stage=0), optimizer=own.ByNorm).finished
    refused(
        ConfigError,
        "ByNorm steps differently on a matrix than on its flattened parts",
        "--zero-stage 0",
        optimizer=own.ByNorm,
        zero_stage=1,
        **at,
    )
    momentum = [pretrain(config(corpus, zero_stage=zero), optimizer=own.sgd).training_loss for zero in (0, 1)]
    assert momentum[0] == pytest.approx(momentum[1], rel=1e-6) and momentum[0] not in (adamw.training_loss, plain.training_loss)
    refused(ConfigError, "NAdam keeps this state", "mu_product", "tensors with the parameter's shape", optimizer=own.nadam, **at)
    refused(ConfigError, "Adagrad does not start from zeros", "choose another --optimizer", optimizer=own.adagrad, **at)
    refused(ConfigError, "the optimizer first_group lacks 1 parameter", optimizer=own.first_group, zero_stage=1, **at)
    refused(ConfigError, "first_group lacks", optimizer=own.first_group, zero_stage=0, **at)
    refused(ConfigError, "other_weights lacks", "1 parameter of something else", optimizer=own.other_weights, **at)
    refused(ConfigError, "optimizer=unchanged takes ()", "called with (groups)", optimizer=unchanged, **at)
    refused(ConfigError, "the optimizer nothing is made as NoneType", optimizer=own.nothing, **at)
    refused(ConfigError, "optimizer= is a lambda, which has no name", optimizer=lambda groups: None, **at)
    refused(ConfigError, "optimizer=3 is not a function", optimizer=3, **at)
    assert pretrain(config(corpus), optimizer=functools.partial(own.radam)).finished


def muon(groups):
    return torch.optim.AdamW(groups)


def muons(folder, corpus) -> None:
    without_launcher()
    settings = {"optimizer": "muon", "muon_lr": 2e-3}
    whole = pretrain(config(corpus, zero_stage=0, **settings))
    assert pretrain(config(corpus, save=folder / "muon", zero_stage=3, exit_interval=6, **settings)).step == 6
    resumed = pretrain(config(corpus, save=folder / "muon", zero_stage=1, **settings))
    assert resumed.finished and resumed.training_loss == pytest.approx(whole.training_loss, rel=1e-6)
    assert load_model(folder / "muon").loss([1, 2, 3, 4, 5]) > 0
    refused(ConfigError, "optimizer=muon has the name of a registered optimizer", "adamw, muon", corpus=corpus, optimizer=muon)
    refused(ConfigError, "optimizer=sgd, and the run has --optimizer muon", corpus=corpus, optimizer=own.sgd, args=["--optimizer", "muon"])


def test_muon_trains_resumes_and_its_model_is_used(corpus, tmp_path):
    run_ranks(muons, 1, tmp_path / "logs", tmp_path, corpus)


def test_an_own_optimizer_trains_and_resumes_by_its_name_and_what_zero_cannot_do_is_refused(corpus, tmp_path):
    run_ranks(optimizers, 1, tmp_path / "logs", tmp_path, corpus)


def models(folder, corpus) -> None:
    without_launcher()
    at, adamw = {"corpus": corpus}, pretrain(config(corpus))
    for zero in (0, 1, 3):
        assert pretrain(config(corpus, zero_stage=zero), model=own.same_model).training_loss == pytest.approx(adamw.training_loss, rel=1e-6)
    half = pretrain(config(corpus, save=folder / "own", zero_stage=1, exit_interval=6), model=own.feed_forward_only)
    assert half.step == 6
    refused(CheckpointError, "model= was feed_forward_only and is not given", save=folder / "own", **at)
    refused(CheckpointError, "model= was feed_forward_only and is same_model", save=folder / "own", model=own.same_model, **at)
    resumed = pretrain(config(corpus, save=folder / "own", zero_stage=1), model=own.feed_forward_only)
    plain = pretrain(config(corpus, zero_stage=0), model=own.feed_forward_only)
    assert resumed.training_loss == pytest.approx(plain.training_loss, rel=1e-6) and plain.training_loss != adamw.training_loss
    with pytest.raises(CheckpointError, match="trained with model=feed_forward_only, and model=None is given"):
        load_model(folder / "own")
    loaded = load_model(folder / "own", model=own.feed_forward_only)
    assert loaded.loss(range(40)) < 5 and loaded.generate([1, 2], 3, temperature=0) == loaded.generate([1, 2], 3, temperature=0)
    words = ("final_norm.weight [32] is missing", "router.weight [3, 4] is unknown", "head.weight is [3, 4] instead of [128, 32]")
    refused(ConfigError, "differ in 4 places", *words, "embedding.word.weight is frozen", model=own.other_parameters, **at)
    refused(ConfigError, "persistent buffers: average", model=own.stored_buffer, **at)
    refused(ConfigError, "a sum of losses without gradients", model=own.detached, **at)
    refused(ConfigError, "model=radam takes (groups)", "(shape, parallel)", model=own.radam, **at)
    refused(ConfigError, "already built, a Linear", model=torch.nn.Linear(2, 2), **at)
    refused(ConfigError, "returns ModelShape", "torch.nn.Module", model=own.no_module, **at)
    refused(ConfigError, "as the sum of weights of 128 scored labels", "return sums, not means", model=own.means, zero_stage=0, **at)
    refused(ConfigError, "--zero-stage 3", model=own.feed_forward_only, zero_stage=3, **at)
    refused(ConfigError, "--recompute-granularity full", model=own.same_model, recompute_granularity="full", **at)
    refused(ConfigError, "model=same_model with --num-experts 4", model=own.same_model, num_experts=4, **at)
    refused(ConfigError, "--compile with model=feed_forward_only", model=own.feed_forward_only, compile=True, **at)
    for flag, made in (("tensor", own.feed_forward_only), ("pipeline", own.same_model)):
        name = f"{flag}_model_parallel_size"
        refused(ConfigError, f"--{flag}-model-parallel-size 2", model=made, world_size=2, **{name: 2}, **at)


def test_an_own_model_trains_and_resumes_by_its_name_and_what_it_cannot_do_is_refused(corpus, tmp_path):
    run_ranks(models, 1, tmp_path / "logs", tmp_path, corpus)


def test_what_is_no_run_of_this_job_is_refused(corpus):
    refused(ConfigError, "the configuration is for 2 ranks, but this job has 1 rank", corpus=corpus, world_size=2)
    refused(ConfigError, "pretrain with dry_run", "plan(config)", corpus=corpus, dry_run=True)


def factories(corpus) -> None:
    without_launcher()
    refused(ConfigError, "makes list", "each_step(function)", corpus=corpus, callbacks=[lambda context: []])
    refused(ConfigError, "cannot be called", corpus=corpus, callbacks=[3])
    refused(ConfigError, "uses loss", "each_step(function)", corpus=corpus, callbacks=[lambda record: record.loss])
    refused(ConfigError, "give an object of the class: Callback", corpus=corpus, callbacks=[Callback])
    refused(ConfigError, "is not a list", corpus=corpus, callbacks=each_step(print))
    for wrong, words in ((None, "each_step(None)"), (lambda step, loss: None, "takes (step, loss)")):
        with pytest.raises(ConfigError) as caught:
            each_step(wrong)
        assert words in str(caught.value)


def test_a_callback_that_is_none_is_refused(corpus, tmp_path):
    run_ranks(factories, 1, tmp_path / "logs", corpus)


def test_a_notebook_gets_plain_lines_of_100_columns(monkeypatch, capsys):
    """Kernels set FORCE_COLOR, by which rich takes their output for a terminal."""
    kernel = type("ZMQInteractiveShell", (), {})
    monkeypatch.setattr("builtins.get_ipython", lambda: kernel(), raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = make_console()
    console.print("[a]", style="bold")
    console.rule()
    assert capsys.readouterr().out == "[a]\n" + "─" * 100 + "\n"
    assert not console.is_terminal and (line_width(console, 160), in_notebook()) == (100, True)
    monkeypatch.delattr("builtins.get_ipython")
    assert (make_console().is_terminal, in_notebook()) == (True, False)


def test_without_a_required_package_importing_the_api_says_how_to_install_it():
    code = "import sys; sys.modules['orjson'] = None; import megatron_patch.api"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ConfigError" in run.stderr and "lacks 1 required package: orjson" in run.stderr, run.stderr


def test_without_deepspeed_the_error_has_the_command_that_installs_it(corpus, monkeypatch):
    monkeypatch.setattr("megatron_patch.requirements.is_missing", lambda module: module == "deepspeed")
    refused(ConfigError, "pip install", "megatron_patch[train]", corpus=corpus)
