"""What a user may do with a finished run: commands with its paths. In: a run. Out: lines for the end of its log."""

from __future__ import annotations

import os
import shlex

from megatron_patch.config.resolve import RunConfig
from megatron_patch.convert.architectures import architecture_of
from megatron_patch.errors import ConfigError
from megatron_patch.programs import HOME, as_called
from megatron_patch.utils.console import shell_word


def _tool(name: str) -> str:
    """Returns the beginning of a tool's command line; a file of a checkout with its path from here."""
    words = f"python tools/{name}.py"
    if (called := as_called(words)) != words:
        return called
    file = str(HOME / "tools" / f"{name}.py")
    return f"python {shlex.quote(min(file, os.path.relpath(file), key=len))}"


def _has_architecture(run: RunConfig) -> bool:
    """Whether an export of the model is possible."""
    try:
        architecture_of(run.shape, run.options.model.model_family)
    except ConfigError:
        return False
    return True


def next_steps(run: RunConfig) -> tuple[tuple[str, str], ...]:
    """Returns (what it does, command) for each tool that reads the run's folder; none without one."""
    if (folder := run.save_folder) is None:
        return ()
    load = f"--load {shell_word(str(folder))}"
    data = run.options.data.valid_data_path
    # Without a held-out corpus, the training corpora contain the held-out data: they would measure how well the model remembers.
    source = f"--data-path {' '.join(map(shell_word, data))}" if data else "--text FILE"
    has_tokenizer = run.data_metadata is not None and run.data_metadata.tokenizer_type != "NullTokenizer"
    steps = [("evaluate", f"{_tool('evaluate')} {load} {source}")] if data or has_tokenizer else []
    if has_tokenizer:
        steps.append(("generate", f"{_tool('generate')} {load} --prompt 'Once upon a time'"))
    report = shell_word(str(folder / "report.html"))
    steps.append(("report", f"{_tool('report')} {shell_word(str(folder))} --output {report}"))
    export = shell_word(str(folder / "hugging_face"))
    if _has_architecture(run):
        steps.append(("convert", f"{_tool('convert_checkpoint')} to-hf {load} --output {export}"))
    return tuple(steps)
