"""Flags and YAML read by one parser: precedence, units, origins, and errors that name the nearest option."""

from __future__ import annotations

import pytest

from megatron_patch.config.option_types import OptionalId
from megatron_patch.config.parsing import parse
from megatron_patch.config.values import OPTION_TYPES
from megatron_patch.errors import ConfigError

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


def test_numbers_with_commas_may_be_lists_in_yaml(tmp_path):
    options = parse(["--config", write(tmp_path, "split: [90, 10, 0]\nposition-weights: [2, 1]\n"), *SHAPE]).options
    assert options.data.split == "90,10,0" and options.stages.position_weights == "2,1"


def test_every_count_takes_units():
    """All whole numbers but those that are not amounts: an id, a seed, the launcher's rank."""
    plain = {name for name, hint in OPTION_TYPES.items() if hint in (int, OptionalId)}
    assert plain == {"eod_token_id", "seed", "local_rank"}
    assert parse([*SHAPE, "--shuffle-window-blocks", "2Ki", "--log-interval", "1k"]).options.data.shuffle_window_blocks == 2048


def test_none_takes_a_file_s_value_back(tmp_path):
    path = write(tmp_path, "save-interval: 5\npatch-fraction: 0.5\nexit-duration: 3h\n")
    options = parse(["--config", path, *SHAPE, "--save-interval", "None", "--patch-fraction", "None", "--exit-duration", "None"]).options
    assert options.checkpoint.save_interval is options.stages.patch_fraction is options.safety.exit_duration is None


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


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        parse(["--config", "nowhere.yaml", *SHAPE])


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--patch-size" in text and "--global-batch-tokens" in text and "--zero-stage" in text
