"""Flags and YAML read by one parser: precedence, units, origins, and errors that name the nearest option."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_patch import __version__
from megatron_patch.config.option_types import OptionalId
from megatron_patch.config.parsing import option_values, parse
from megatron_patch.config.stage_spec import parse_stages
from megatron_patch.config.values import KINDS, OPTION_TYPES, Form
from megatron_patch.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
SHAPE = ["--num-layers", "2", "--hidden-size", "8", "--num-attention-heads", "2"]


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_megatron_flags_with_units():
    parsed = parse([*SHAPE, "--global-batch-tokens", "2M", "--train-tokens", "270B", "--seq-length", "4Ki", "--bf16"])
    assert parsed.options.stages.global_batch_tokens == 2_000_000
    assert parsed.options.stages.train_tokens == 270_000_000_000
    assert parsed.options.stages.seq_length == 4096
    assert parsed.options.engine.bf16


def test_flags_win_over_the_file_and_origins_say_so(tmp_path):
    path = write(tmp_path, "num-layers: 3\nhidden_size: 8\nnum_attention_heads: 2\nlr: 1e-3\ntrain-tokens: 5M\nbf16: true\n")
    parsed = parse(["--config", path, "--num-layers", "5", "--no-bf16"])
    assert parsed.options.model.num_layers == 5
    assert parsed.options.schedule.lr == 1e-3
    assert parsed.options.stages.train_tokens == 5_000_000
    assert not parsed.options.engine.bf16
    assert parsed.origins["num_layers"] == "flag" and parsed.origins["lr"] == path and parsed.origins["bf16"] == "flag"
    assert "seed" not in parsed.origins


def test_a_list_of_stages_in_yaml(tmp_path):
    path = write(tmp_path, "stages:\n  - {patch_size: 4, tokens: 1M}\n  - {patch_size: 1, tokens: 1M}\n")
    assert '"tokens": "1M"' in (parse(["--config=" + path, *SHAPE]).options.stages.stages or "")


def test_blends_in_yaml_and_on_the_command_line(tmp_path):
    path = write(tmp_path, "data-path: [0.7, web, 0.3, code]\n")
    assert parse(["--config", path, *SHAPE]).options.data.data_path == ("0.7", "web", "0.3", "code")
    assert parse([*SHAPE, "--data-path", "a", "b"]).options.data.data_path == ("a", "b")


def test_a_wrong_number_of_experts_is_not_as_none():
    with pytest.raises(ConfigError) as found:
        parse([*SHAPE, "--num-experts", "-3", "--moe-router-topk", "2"])
    assert "without --num-experts" not in str(found.value)


def test_numbers_with_commas_may_be_lists_in_yaml(tmp_path):
    options = parse(["--config", write(tmp_path, "split: [90, 10, 0]\nposition-weights: [2, 1]\n"), *SHAPE]).options
    assert options.data.split == "90,10,0" and options.stages.position_weights == "2,1"


def test_every_count_takes_units():
    """All whole numbers but those that are not amounts: an id, a seed, the launcher's rank."""
    plain = {name for name, hint in OPTION_TYPES.items() if hint in (int, OptionalId)}
    assert plain == {"eod_token_id", "seed", "local_rank"}
    assert parse([*SHAPE, "--shuffle-window-blocks", "2Ki", "--log-interval", "1k"]).options.data.shuffle_window_blocks == 2048


DEFAULTS = option_values(parse(SHAPE).options)


def other_value(name):
    """Returns a value of an option that is not its default."""
    kind = KINDS[name]
    if kind.form is Form.SWITCH:
        return not DEFAULTS[name]
    if kind.form is Form.CHOICE:
        return kind.choices[-1]
    return {Form.COUNT: 7, Form.DURATION: "7h", Form.INTEGER: 7, Form.NUMBER: 0.7, Form.TEXT: "x", Form.TEXTS: ["x"], Form.INTEGERS: [7]}[
        kind.form
    ]


def test_none_takes_back_every_value_of_a_file(tmp_path):
    """On the command line, and in the file itself: the default holds, and the option counts as not given."""
    default = DEFAULTS
    required = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
    for name in KINDS.keys() - required.keys():
        path = write(tmp_path, yaml.safe_dump({**required, name: other_value(name)}))
        given = parse(["--config", path])
        assert option_values(given.options)[name] != default[name] and name in given.origins, name
        taken_back = parse(["--config", path, f"--{name.replace('_', '-')}", "None"])
        assert option_values(taken_back.options) == default and name not in taken_back.origins, name
        for empty in None, "None":
            assert name not in parse(["--config", write(tmp_path, yaml.safe_dump({**required, name: empty}))]).origins
    assert parse(["--config", path, "--lr", "None", "--lr", "0.5"]).options.schedule.lr == 0.5


def test_none_leaves_required_options_missing(tmp_path):
    path = write(tmp_path, "num-layers: 2\nhidden-size: 8\nnum-attention-heads: 2\n")
    with pytest.raises(ConfigError, match="^--hidden-size missing"):
        parse(["--config", path, "--hidden-size", "None"])


def test_launcher_spelling_is_accepted():
    parsed = parse([*SHAPE, "--local_rank=1", "--deepspeed_config", "ds.json"])
    assert parsed.options.engine.local_rank == 1 and parsed.options.engine.deepspeed_config == "ds.json"


def test_three_state_flags():
    assert parse(SHAPE).options.model.qk_layernorm is None
    assert parse([*SHAPE, "--qk-layernorm"]).options.model.qk_layernorm is True
    assert parse([*SHAPE, "--no-qk-layernorm"]).options.model.qk_layernorm is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*SHAPE, "--num-layer", "2"], ["unknown flag --num-layer", "--help", "num-layers"]),
        ([*SHAPE, "--patchsize", "4"], ["--patchsize", "patch-size"]),
        ([*SHAPE, "--train-tokens", "3X"], ["train-tokens", "3X"]),
        ([*SHAPE, "--zero-stage", "5"], ["zero-stage", "5"]),
        (["--num-layers", "x", *SHAPE[2:]], ["num-layers", "'x'"]),
        (SHAPE[2:], ["--num-layers"]),
        ([*SHAPE, "stray"], ["stray"]),
        ([*SHAPE, "--config"], ["--config"]),
    ],
)
def test_wrong_flags_end_with_what_is_allowed(arguments, words):
    with pytest.raises(ConfigError) as error:
        parse(arguments)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert error.value.allowed


@pytest.mark.parametrize(
    ("arguments", "what", "allowed", "do"),
    [
        ("--lr fast", "--lr: 'fast' is not a number", "a number, as 0.5 or 3e-4", "correct --lr"),
        ("--spike-grad-norm abc", "--spike-grad-norm: 'abc' is not a number", "a number, as 0.5 or 3e-4", "correct --spike-grad-norm"),
        ("--seed 1.5", "--seed: '1.5' is not a whole number", "a whole number, as 1234", "correct --seed"),
        ("--exit-duration 3x", "--exit-duration: '3x' is not a duration", "numbers with d, h, min or s", "correct --exit-duration"),
        ("--zero-stage 5", "--zero-stage: '5' is not one of its values", "0, 1, 2, 3", "choose one of these values"),
        ("--on-spike skp", "--on-spike: 'skp' is not one of its values", "ignore, rewind, skip, stop", "did you mean skip?"),
        ("--save", "--save: a value is missing", "--save VALUE", "give a value after --save"),
        ("--bf16 true", "--bf16: 'true' belongs to no flag", "on-off flags", "remove it"),
        ("--patchsize 4", "unknown flag --patchsize", "the flags that --help lists", "did you mean --patch-size"),
    ],
)
def test_errors_of_the_command_line_have_three_parts(arguments, what, allowed, do):
    with pytest.raises(ConfigError) as error:
        parse([*SHAPE, *arguments.split()])
    assert error.value.what == what
    assert allowed in (error.value.allowed or "") and (error.value.do or "").startswith(do)


def test_all_wrong_values_are_reported_at_once(tmp_path):
    path = write(tmp_path, "num-layers: two\nlr: fast\nbf16: maybe\nsplit: {a: 1}\nzero_stage: 5\nexit-duration: 3x\n")
    with pytest.raises(ConfigError) as error:
        parse(
            [
                "--config",
                path,
                "stray",
                *["--hidden-size", "8", "--seed", "1.5", "--on-spike", "skp", "--fp16", "yes", "--adam-eps", "1", "2", "--save"],
            ]
        )
    found = {(problem.flag, problem.error.what) for problem in error.value.problems}
    where = f"--config {path}: "
    assert found == {
        ("num_layers in run.yaml", f"{where}num_layers: 'two' is not a count"),
        ("lr in run.yaml", f"{where}lr: 'fast' is not a number"),
        ("bf16 in run.yaml", f"{where}bf16: 'maybe' is no switch"),
        ("split in run.yaml", f"{where}split: the value is a mapping"),
        ("zero_stage in run.yaml", f"{where}zero_stage: '5' is not one of its values"),
        ("exit_duration in run.yaml", f"{where}exit_duration: '3x' is not a duration"),
        ("", "'stray' belongs to no flag"),
        ("--seed", "--seed: '1.5' is not a whole number"),
        ("--on-spike", "--on-spike: 'skp' is not one of its values"),
        ("--fp16", "--fp16: 'yes' belongs to no flag"),
        ("--adam-eps", "--adam-eps: '2' belongs to no flag"),
        ("--save", "--save: a value is missing"),
        ("--num-attention-heads", "--num-attention-heads missing"),
    }
    assert all(problem.error.allowed and problem.error.do for problem in error.value.problems)
    assert "13 problems" in error.value.what and "correct lr" in error.value.what


def test_a_wrong_value_that_a_later_flag_replaces_is_not_read(tmp_path):
    path = write(tmp_path, "lr: fast\n")
    assert parse(["--config", path, *SHAPE, "--lr", "0.5"]).options.schedule.lr == 0.5
    assert parse([*SHAPE, "--seed", "x", "--seed", "3"]).options.engine.seed == 3


def test_values_of_a_file_are_never_flags(tmp_path):
    path = write(tmp_path, 'sample-prompts: ["--bf16", "-h", "--help"]\nsave: "--load"\n')
    options = parse(["--config", path, *SHAPE]).options
    assert options.logging.sample_prompts == ("--bf16", "-h", "--help") and options.checkpoint.save == "--load"
    assert not options.engine.bf16 and options.checkpoint.load is None
    assert parse([*SHAPE, "--save=-x", "--lr=-1", "--min-lr", "-inf"]).options.schedule.lr == -1.0


def test_missing_required_flags_are_listed():
    with pytest.raises(ConfigError) as error:
        parse(SHAPE[:2])
    assert error.value.what == "--hidden-size and --num-attention-heads missing"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_layer: 3\n", ["unknown key", "num_layers"]),
        ("- 1\n- 2\n", ["list"]),
        ("lr: [\n", ["not valid YAML"]),
        ("bf16: maybe\n", ["bf16", "true or false"]),
        ("lr: {a: 1}\n", ["lr"]),
        ("num-layers: 2\nnum_layers: 3\n", ["twice"]),
        ("lr: fast\n", ["lr", "fast"]),
        ("lr: [1, 2]\n", ["lr: the value is a list", "one value"]),
        ("qk-layernorm: maybe\n", ["qk_layernorm: 'maybe' is no switch", "true or false"]),
    ],
)
def test_wrong_files_end_with_the_key(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        parse(["--config", write(tmp_path, text), *SHAPE])
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("text", "what", "allowed", "do"),
    [
        ("lr: 1\nseed: 3\nlr: 2\n", "'lr' is given twice (lines 1, 3)", "each key once in a mapping", "remove the other lines"),
        ("lr: 1\nlr: 2\nlr: 3\n", "'lr' is given 3 times (lines 1, 2, 3)", "each key once in a mapping", "remove"),
        ("stages:\n  - {patch_size: 4, steps: 3, patch_size: 2}\n", "'patch_size' is given twice (lines 2, 2)", "each key once", "remove"),
        ("stages:\n  - patch_size: 4\n    steps: 3\n    steps: 2\nlr: 1\nlr: 2\n", "'steps' is given twice (lines 3, 4)", "once", "remove"),
        ("{'lr': 1, \"lr\": 2}", "'lr' is given twice (lines 1, 1)", "each key once", "remove"),
        ("lr: 1\n'lr': 2\n", "'lr' is given twice (lines 1, 2)", "each key once", "remove"),
        ("num-layers: 2\nnum_layers: 3\n", "'num_layers' is given twice", "each option once", "remove one of the two lines"),
    ],
)
def test_repeated_keys_are_an_error_at_every_level(tmp_path, text, what, allowed, do):
    with pytest.raises(ConfigError) as error:
        parse(["--config", write(tmp_path, text), *SHAPE])
    assert what in error.value.what and allowed in (error.value.allowed or "") and do in (error.value.do or "")


@pytest.mark.parametrize(
    ("stages", "what"),
    [
        ('[{"patch_size": 4, "patch_size": 2, "steps": 3}]', "stages: 'patch_size' is given twice (lines 1, 1)"),
        (
            '[{"patch_size": 4, "patch-size": 2, "steps": 3}]',
            "stages: entry 1: patch_size is given twice, with a dash and with an underscore",
        ),
    ],
)
def test_repeated_keys_of_stages_on_the_command_line_are_an_error(stages, what):
    with pytest.raises(ConfigError) as error:
        parse_stages(stages)
    assert error.value.what == what and error.value.allowed and error.value.do


def test_all_problems_of_stages_are_reported_at_once():
    first = '{"patch_size": "a", "token_share": "b", "x": 1}'
    second = '{"context_parallel_size": [1], "side": "up", "lr_warmup_steps": 1, "lr-warmup-tokens": 3}'
    with pytest.raises(ConfigError) as error:
        parse_stages(f"[{first}, {second}]")
    what = str(error.value)
    assert what.startswith("6 problems in stages:\n  - entry 1: patch_size: 'a' is not a count\n    Allowed: ")
    named = (
        "1: token_share is 'b'",
        "1: x is not",
        "2: context_parallel_size: [1]",
        "2: side is 'up'",
        "2: lr_warmup_tokens together with",
    )
    assert all(f"  - entry {one}" in what for one in named)


def test_anchors_and_merge_keys_are_no_repetition(tmp_path):
    text = "stages:\n  - &a {patch_size: 4, steps: 3, lr: 0.1}\n  - {<<: *a, patch_size: 1}\n  - <<: *a\n    lr: 0.2\n"
    first, second, third = parse_stages(parse(["--config", write(tmp_path, text), *SHAPE]).options.stages.stages or "")
    assert (first.patch_size, second.patch_size, second.lr, third.patch_size, third.lr) == (4, 1, 0.1, 4, 0.2)


def test_an_emoji_in_the_name_of_a_stage_is_one_character(tmp_path):
    """JSON writes it as two escapes, and the list of a file reaches the stages as JSON."""
    text = 'stages:\n  - {name: "😀 first", patch_size: 4, steps: 3}\n  - {patch_size: 1}\n'
    assert (parse_stages(parse(["--config", write(tmp_path, text), *SHAPE]).options.stages.stages or "")[0].name) == "😀 first"
    assert parse_stages('[{"name": "\\ud83d\\ude00", "patch_size": 4}]')[0].name == "😀"


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        parse(["--config", "nowhere.yaml", *SHAPE])


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in KINDS:
        assert f"--{name.replace('_', '-')}" in text
    for words in ("--config FILE.yaml", '"train-tokens: 10B"', "--NAME None", "--version"):
        assert words in text, words


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        parse([*SHAPE, "--version"])
    first, torch, deepspeed, python = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    assert first == f"megatron_patch {__version__}" and torch.startswith("torch ") and deepspeed.startswith("deepspeed ")
    assert python == f"Python {sys.version.split()[0]}"


@pytest.mark.parametrize(
    "program",
    ["pretrain_gpt_patch.py --help", "pretrain_gpt_patch.py --version", "-m megatron_patch plan --help", "-m megatron_patch schema"],
)
def test_a_reader_that_leaves_ends_the_program_without_a_message(program):
    process = subprocess.Popen(
        [sys.executable, *program.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() in (0, 141)  # argparse itself ignores that its text cannot be written


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('save: ""', "save: the value is empty"),
        ("tensorboard-dir: ' '", "tensorboard_dir: the value is empty"),
        ("data-path: [0.5, a, 0.5, '']", "data_path: the value is empty"),
        ("wandb-project: off", "wandb_project: YAML reads a value as false"),
        ("data-path: [a, on]", "data_path: YAML reads a value as true"),
        ("data-path: yes", "data_path: YAML reads a value as true"),
        ("train-tokens: 1:30", "train_tokens: '1:30' is not a count"),
        ("exit-duration: 1:30:00", "exit_duration: '1:30:00' is not a duration"),
    ],
)
def test_values_that_yaml_or_an_empty_variable_changes_are_refused(tmp_path, line, what):
    path = tmp_path / "run.yaml"
    path.write_text(f"num-layers: 2\nhidden-size: 64\nnum-attention-heads: 4\n{line}\n")
    with pytest.raises(ConfigError) as error:
        parse(["--config", str(path)])
    assert error.value.what == f"--config {path}: {what}" or error.value.what.startswith(f"--config {path}: {what},")


def test_a_leading_zero_makes_no_number_to_base_8(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("num-layers: 012\nhidden-size: 64\nnum-attention-heads: 4\nsave: 007\nseed: 0\nlr: 0.5\n")
    options = parse(["--config", str(path)]).options
    assert (options.model.num_layers, options.checkpoint.save, options.engine.seed, options.schedule.lr) == (12, "007", 0, 0.5)


def test_an_empty_value_on_the_command_line_is_refused():
    with pytest.raises(ConfigError, match="--save: the value is empty") as error:
        parse([*["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--save"], ""])
    assert error.value.do == "write a value, or leave save out; a variable may be empty"
