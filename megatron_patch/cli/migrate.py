"""Turns a command line of Megatron into a YAML file for `--config`.

In: a shell script, a file with arguments, or arguments after `--`; a DeepSpeed JSON. Out: a YAML file with a comment on each line that is
not the same as in Megatron, the part of the JSON that stays, and on standard error what is left out or to be filled in. Nothing of the
script is run.
"""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_patch.cli.command_line import ArgumentParser, count_from_one
from megatron_patch.cli.migrate_deepspeed import DEEPSPEEDS_JSON, DeepSpeedParts, divide
from megatron_patch.cli.migrate_defaults import MEGATRONS_DEFAULT, with_defaults
from megatron_patch.cli.migrate_yaml import Line, lines_of, render
from megatron_patch.cli.shell_script import UNRESOLVED, Script, evaluate
from megatron_patch.config.megatron.command_line import problems_of_rows, split
from megatron_patch.config.megatron.flags import Kind, key_of
from megatron_patch.config.megatron.muon import other_updates
from megatron_patch.config.megatron.page import markdown
from megatron_patch.config.megatron.translate import translate
from megatron_patch.config.megatron.translator import MEGATRON_FLAGS, Given, Row
from megatron_patch.config.parsing import parse
from megatron_patch.config.problems import one_error, problem_table
from megatron_patch.config.resolve import resolve
from megatron_patch.config.values import KEYS
from megatron_patch.errors import ConfigError
from megatron_patch.training.dry_run import architecture
from megatron_patch.training.pretrain import make_engine_config
from megatron_patch.utils.console import for_terminal, print_line, print_lines
from megatron_patch.utils.files import read_small, reason
from megatron_patch.utils.units import plural

_MOST_BYTES = 1 << 22
_DECISIVE = ("num-layers", "hidden-size", "num-attention-heads", "train-tokens", "train-iters", "train-samples", "global-batch-size")
_WARMUPS = tuple(f"lr-warmup-{unit}" for unit in ("iters", "samples", "tokens", "steps", "fraction"))
_PLACEHOLDER = re.compile(r"(?<![<&0-9])<([A-Za-z](?:[^<>|&;$()\n]*[^<>|&;$()\n\s])?)>(?!>)")
"""A part that the reader of a public script is to fill in, such as <PATH TO DATA>; bash would read it as redirections."""
_NEEDS_EOD = {"reset-attention-mask", "reset-position-ids", "eod-mask-loss"}
_DESCRIPTION = """\
Turns a command line of Megatron into a YAML file for --config.

megatron-patch migrate pretrain.sh --output run.yaml
megatron-patch migrate arguments.txt --output run.yaml \\
    --deepspeed-config ds_config.json --deepspeed-output ds.json
megatron-patch migrate --output run.yaml -- --num-layers 24 …

Understands Megatron-LM and Megatron-DeepSpeed. Reads assignments, arrays,
conditions and here-documents of a bash script; runs nothing.
"""


@dataclass
class _Source:
    """What was read.

    Args:
        name: how messages call it.
        words: the arguments of the training program.
        script: the script's variables and files, if it is one.
        folder: the folder of the script, in which paths are looked up.
        ranks: number of ranks, if the launcher's arguments give it.
        remarks: what could not be evaluated.
    """

    name: str
    words: list[str]
    script: Script
    folder: Path
    ranks: int | None = None
    remarks: list[str] = field(default_factory=list)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=_DESCRIPTION)
    parser.add_argument("script", nargs="?", help="a bash script that starts Megatron, or a file with its arguments; or give them after --")
    parser.add_argument("--deepspeed-config", type=Path, metavar="JSON", help="DeepSpeed's JSON, if the script does not write it")
    parser.add_argument("--output", type=Path, metavar="YAML", help="the file to write; by default standard output")
    parser.add_argument("--deepspeed-output", type=Path, metavar="JSON", help="the file for the part of DeepSpeed's JSON that stays")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="value of a variable of the script, or 1=VALUE of its first argument",
    )
    parser.add_argument("--world-size", type=count_from_one, help="number of ranks; by default that of the script's launcher")
    parser.add_argument("--table", action="store_true", help="print the table of Megatron's flags as Markdown, and stop")
    return parser


def main(argv: Sequence[str]) -> None:
    """Runs the tool.

    Args:
        argv: its arguments, and after `--` those of Megatron.

    Raises:
        ConfigError: the model does not exist here, the arguments cannot be read, or the file that was written does not resolve.
    """
    words = list(argv)
    after = words[words.index("--") + 1 :] if "--" in words else None
    args = _parser().parse_args(words if after is None else words[: words.index("--")])
    if args.table:
        print_lines(markdown())
        return
    source = _read(args.script, after, args.set)
    ranks = args.world_size or source.ranks
    given = split(source.words)[1]
    parts = _deepspeed(args.deepspeed_config, given, source)
    unresolved = [flag for flag in given if UNRESOLVED.search(" ".join((flag.key, *flag.words)))]
    known = [flag for flag in given if flag not in unresolved and flag.key != "deepspeed-config"]
    absent = {flag.key for flag in unresolved}
    completed = with_defaults(_with_json(known, parts, source), absent, ranks)
    batch = next((flag for flag in completed if flag.key == "global-batch-size"), None)
    if parts.accumulation and batch is not None and batch.source == MEGATRONS_DEFAULT:
        source.remarks.append(
            f"neither the script nor DeepSpeed's JSON gives the global batch, so it is {batch.words[0]}, Megatron's micro-batch size x data"
            f"-parallel ranks; if the JSON's gradient_accumulation_steps = {parts.accumulation} counts, add --global-batch-size "
            f"{int(batch.words[0]) * parts.accumulation}"
        )
    source.remarks += parts.remarks
    translation = translate(completed, KEYS)
    refused = [row for row in translation.problems if row.other_model]
    if refused:
        error = one_error(problems_of_rows(refused))
        raise ConfigError(
            f"{source.name} trains another model than this program has: {error.what}",
            "decoders with LayerNorm or RMSNorm, GELU or SwiGLU, learned or rotary positions, with or without biases",
            "train it with Megatron, or change the model",
        )
    lines = _with_zero_1(lines_of(translation, parts))
    source.remarks += _muons_differences(lines)
    filled_in = [_to_fill_in(flag) for flag in unresolved if flag.key != "deepspeed-config" and not _without_effect(flag)]
    if parts.left:
        path = args.deepspeed_output
        if path is None:
            source.remarks.append(f"a part of DeepSpeed's JSON stays; give --deepspeed-output FILE for it: {json.dumps(parts.left)}")
        else:
            _write(path, json.dumps(parts.left, indent=2) + "\n")
            lines.append(Line("deepspeed-config", str(path), "what stays of DeepSpeed's JSON"))
    if not any(line.key == "data-path" for line in [*lines, *filled_in]):
        filled_in.append(Line("data-path", "PREFIX", "the script names no data"))
    keys = {line.key for line in [*lines, *filled_in]}
    if keys & _NEEDS_EOD and "eod-token-id" not in keys:
        filled_in.append(Line("eod-token-id", "ID", "token at the end of each document, 50256 for GPT-2's tokenizer"))
    if not any(line.key == "vocab-size" for line in lines):
        source.remarks.append(
            "the script gives no --vocab-size; data that Megatron preprocessed has no metadata file, so add vocab-size, for example 50257 "
            "for GPT-2's tokenizer"
        )
    left_out = [*_shown(translation.problems), *((f"DeepSpeed's JSON: {key}", why) for key, why in parts.dropped)]
    ignored = [*_shown(translation.ignored), *((f"DeepSpeed's JSON: {key}", why) for key, why in parts.ignored)]
    ignored += [
        (flag.text, "Megatron-LM reads it only with --group-query-attention")
        for flag in known
        if flag.key == "num-query-groups" and flag not in completed
    ]
    text = render(lines, filled_in, left_out, ignored, source.name, ranks or _fewest_ranks(lines))
    if args.output is None:
        print(for_terminal(text), end="")
    else:
        _write(args.output, text)
    _say(left_out, filled_in, source, args.output)
    _check(lines, filled_in, parts, ranks)


def _with_zero_1(lines: list[Line]) -> list[Line]:
    """Returns the lines with ZeRO 1 in place of 0 where DeepSpeed cannot run 0, which changes no result."""
    values = {line.key: line.value for line in lines}
    recomputes = values.get("recompute-granularity", "none") != "none"
    if values.get("zero-stage") != "0" or not (values.get("fp16") or (values.get("bf16") and recomputes)):
        return lines
    why = "0 in the script, which does not run here with " + ("fp16" if values.get("fp16") else "bf16 and recomputation")
    one = Line("zero-stage", "1", f"{why}; results are the same")
    return [one if line.key == "zero-stage" else line for line in lines]


def _muons_differences(lines: Sequence[Line]) -> list[str]:
    """Returns where Muon's update is another one than Megatron's, if the lines name Muon and it is not that of DeepSpeed."""
    values = {line.key: line for line in lines}
    if "optimizer" not in values or values["optimizer"].value != "muon" or DEEPSPEEDS_JSON in values["optimizer"].comment:
        return []
    found = {key: values[key].value if key in values else None for key in ("swiglu", "position-embedding-type")}
    return other_updates(found["swiglu"] is True, found["position-embedding-type"] == "learned_absolute")


def _fewest_ranks(lines: Sequence[Line]) -> int | None:
    """Returns the ranks of one replica of the model if they are more than those of the example command, else None."""
    values = {line.key: str(line.value) for line in lines}
    sizes = [values.get(key, "1") for key in ("tensor-model-parallel-size", "pipeline-model-parallel-size")]
    replica = int(sizes[0]) * int(sizes[1]) if all(size.isdigit() for size in sizes) else 1
    return None if replica and 8 % replica == 0 else replica or None


def _to_fill_in(flag: Given) -> Line:
    """Returns the line for a flag without a value, under the name that it has here if only its name differs."""
    known = MEGATRON_FLAGS.get(flag.key)
    renamed = known is not None and known.kind is Kind.RENAMED and " " not in known.here
    key = key_of(known.here) if known is not None and renamed else flag.key
    return Line(key, " ".join(flag.words), f"no value for {', '.join(dict.fromkeys(UNRESOLVED.findall(' '.join(flag.words))))}")


def _without_effect(flag: Given) -> bool:
    return flag.key in MEGATRON_FLAGS and MEGATRON_FLAGS[flag.key].kind in (Kind.IGNORED, Kind.DETAIL)


def _read(script: str | None, after: list[str] | None, assignments: list[str]) -> _Source:
    if (script is None) == (after is None):
        raise ConfigError(
            "no arguments to read" if script is None else f"{script} together with arguments after --",
            "a script, a file with arguments, or arguments after --",
            "give one of them; --help has examples",
        )
    if after is not None:
        return _Source("the arguments", after, Script({}), Path())
    assert script is not None
    try:
        text = read_small(script, _MOST_BYTES, wait=True).decode()
    except OSError as error:
        raise ConfigError(f"{script}: {reason(error)}", "a readable script", "check the path") from error
    except ValueError as error:
        raise ConfigError(f"{script} is not text in UTF-8", "a bash script, or a file with arguments", "give another file") from error
    variables = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {assignment}", "--set NAME=VALUE", "write it like --set DATA_PATH=data/web")
        variables[name] = value
    text = _PLACEHOLDER.sub(lambda found: f"${{{re.sub('[^A-Za-z0-9]+', '_', found[1]).strip('_')}}}", text)
    evaluated = evaluate(text, {"0": script, **variables})
    found = _training_command(evaluated)
    if found is None:
        words = shlex.split(text, comments=True)
        start = next((index for index, word in enumerate(words) if word.startswith("--")), None)
        if start is None:
            raise ConfigError(
                f"{script} has no command that starts pretrain_gpt.py or another Python program with flags",
                "a bash script that starts Megatron, or a file with its arguments",
                "give the arguments after --",
            )
        return _Source(script, words[start:], Script({}), Path(script).parent)
    launcher, words = found
    return _Source(script, words, evaluated, Path(script).parent, _ranks(launcher), list(evaluated.remarks))


def _training_command(script: Script) -> tuple[list[str], list[str]] | None:
    """Returns the launcher's words and the arguments of the command with the most flags of Megatron, or None."""
    best: tuple[list[str], list[str]] | None = None
    most = 2  # fewer are no training
    for command in script.commands:
        if command[0] in ("echo", "printf"):
            continue
        words = _without_redirections([part for word in command for part in _inner_words(word, script)])
        program = next((index for index, word in enumerate(words) if word.endswith(".py")), None)
        if program is None:
            continue
        arguments = words[program + 1 :]
        flags = sum(1 for flag in split(arguments)[1] if flag.key in MEGATRON_FLAGS)
        if flags > most:
            best, most = (words[:program], arguments), flags
    return best


def _inner_words(word: str, script: Script) -> list[str]:
    """Returns the words of a text that another shell would read (`bash -c "…"`), with its variables replaced; any other word as it is."""
    if " " not in word.strip() or not re.search(r"\.py\b|\$\w", word):
        return [word]
    commands = evaluate(word, {name: value for name, value in script.variables.items() if isinstance(value, str)}).commands
    return max(commands, key=len, default=[word])


def _without_redirections(words: list[str]) -> list[str]:
    """Returns words up to the first redirection, pipe or other end of a command, which are words where it was put together as text."""
    ends = (index for index, word in enumerate(words) if re.fullmatch(r"[0-9]?(?:&?>{1,2}|>&)\S*|\|[|&]?|&&?|;", word))
    end = next(ends, len(words))
    return words[:end]


def _ranks(launcher: Sequence[str]) -> int | None:
    """Returns the number of ranks that the arguments of torchrun or deepspeed give, or None."""
    flags = {flag.key: flag.words[0] for flag in split(launcher)[1] if flag.words}
    per_node = flags.get("nproc-per-node") or flags.get("num-gpus")
    nodes = flags.get("nnodes") or flags.get("num-nodes") or "1"
    return int(per_node) * int(nodes) if per_node and per_node.isdigit() and nodes.isdigit() else None


def _deepspeed(path: Path | None, given: Sequence[Given], source: _Source) -> DeepSpeedParts:
    """Returns the parts of the JSON that is given, or that the script writes or names."""
    named = next((" ".join(flag.words) for flag in given if flag.key == "deepspeed-config"), None)
    text = source.script.files.get(named) if named is not None and path is None else None
    name = str(path or named)
    if text is None:
        if path is None and named is None:
            return DeepSpeedParts()
        file = path or source.folder / str(named)
        if path is None and not file.is_file():
            source.remarks.append(f"DeepSpeed's JSON {named} is not here; give --deepspeed-config FILE if it has more than the flags")
            return DeepSpeedParts()
        try:
            text = read_small(str(file), _MOST_BYTES, wait=True).decode()
        except (OSError, ValueError) as error:
            raise ConfigError(f"--deepspeed-config {file}: {error}", "a readable JSON file", "check the path") from error
    if missing := UNRESOLVED.findall(text):
        source.remarks.append(f"DeepSpeed's JSON {name} has {', '.join(sorted(set(missing)))} without a value, and was not read; use --set")
        return DeepSpeedParts()
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"DeepSpeed's JSON {name} is not valid: {error}", "a JSON object", "correct it") from error
    if not isinstance(data, dict):
        raise ConfigError(f"DeepSpeed's JSON {name} is a {type(data).__name__}", "a JSON object", "correct it")
    return divide(data)


def _with_json(given: Sequence[Given], parts: DeepSpeedParts, source: _Source) -> list[Given]:
    """Returns the flags with those that only the JSON has; where both have a value and they differ, the flag counts, with a remark."""
    result = list(given)
    values = {flag.key: " ".join(flag.words) for flag in given}
    for option, (value, key) in list(parts.flags.items()):
        if option == "lr-warmup-steps" and (other := next((name for name in _WARMUPS if name in values), None)):
            del parts.flags[option]
            source.remarks.append(f"--{other} {values[other]} is written, and DeepSpeed's JSON has {key} = {value}")
            continue
        if option not in values:
            result.append(Given(option, () if value == "true" else (value,), DEEPSPEEDS_JSON))
            continue
        del parts.flags[option]
        if not _same(values[option], value):
            source.remarks.append(f"--{option} {values[option]} is written, but DeepSpeed's JSON has {key} = {value}")
    batch, length = values.get("global-batch-size", parts.flags.get("global-batch-size", ("",))[0]), values.get("seq-length", "")
    for option, (steps, key) in parts.steps.items():
        if option not in values and batch.isdigit() and length.isdigit():
            tokens = steps * int(batch) * int(length)
            result.append(Given(option, (str(tokens),), DEEPSPEEDS_JSON))
            parts.flags[option] = (str(tokens), f"{key}: {steps:,} steps x {int(batch) * int(length):,} tokens")
    return result


def _same(first: str, second: str) -> bool:
    try:
        return float(first) == float(second)
    except ValueError:
        return first == second or (first == "" and second == "true")


def _shown(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Returns flags with the reasons of their rows."""
    return [(row.given.text, row.meaning) for row in rows]


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"{path}: {reason(error)}", "a file that can be written", "give another path") from error


def _say(left_out: Sequence[tuple[str, str]], filled_in: Sequence[Line], source: _Source, output: Path | None) -> None:
    """Prints what is left out, what is to be filled in, and what could not be evaluated."""
    if output is not None:
        print_line(f"wrote {output}", stderr=True)
    rows = [(what, f"left out: {why}") for what, why in left_out]
    rows += [(f"{line.key}: {line.value}", f"to fill in: {line.comment}") for line in filled_in]
    if rows:
        print_lines(problem_table(rows, ("what", "why")), stderr=True)
    for remark in source.remarks:
        print_line(f"Note: {remark}", stderr=True)


def _check(lines: Sequence[Line], filled_in: Sequence[Line], parts: DeepSpeedParts, ranks: int | None) -> None:
    """Resolves what was written as a dry run, without data.

    Raises:
        ConfigError: it does not resolve.
    """
    missing = [line.key for line in filled_in if line.key in _DECISIVE]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} without a value, so the file was not checked", "values for all variables", "use --set, or fill them in"
        )
    with tempfile.TemporaryDirectory() as folder:
        kept = [line for line in lines if line.key not in ("data-path", "valid-data-path", "deepspeed-config", "max-epochs")]
        if any(line.key == "eod-token-id" for line in filled_in):
            kept.append(Line("eod-token-id", "0", ""))
        if parts.left:
            (Path(folder) / "ds.json").write_text(json.dumps(parts.left))
            kept.append(Line("deepspeed-config", str(Path(folder) / "ds.json"), ""))
        (Path(folder) / "run.yaml").write_text(render(kept))
        try:
            parsed = parse(["--config", str(Path(folder) / "run.yaml"), "--dry-run"])
            engine = parsed.options.engine
            size = ranks or engine.tensor_model_parallel_size * engine.pipeline_model_parallel_size
            run = resolve(parsed, size)
            make_engine_config(run)
        except ConfigError as error:
            what = error.what.replace(f"--config {folder}/run.yaml: ", "")
            raise ConfigError(f"what was written does not resolve: {what}", error.allowed, error.do) from error
    print_line(f"Checked as a dry run on {plural(size, 'rank')}: {architecture(run)}", stderr=True)
