"""What a user may do with a finished run: commands with its paths. In: a run. Out: lines for the end of its log. No torch here."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from megatron_patch.config.resolve import RunConfig

_TOOLS = {"evaluate": "evaluate.py", "generate": "generate.py", "report": "report.py", "convert": "convert_checkpoint.py"}


def tool_command(name: str) -> str:
    """Returns the beginning of a tool's command line: its script in a checkout, else its installed command."""
    script = Path(__file__).parent.parent.parent / "tools" / _TOOLS[name]
    if not script.is_file():
        return f"megatron-patch {name}"
    return f"python {shlex.quote(min(str(script), os.path.relpath(script), key=len))}"


def next_steps(run: RunConfig) -> tuple[tuple[str, str], ...]:
    """Returns (what it does, command) for each tool that reads the run's folder; none without one."""
    if (folder := run.save_folder) is None:
        return ()
    load = f"--load {shlex.quote(str(folder))}"
    data = run.options.data.valid_data_path
    # Without a held-out corpus, the training corpora contain the held-out data: they would measure how well the model remembers.
    source = f"--data-path {shlex.join(data)}" if data else "--text FILE"
    has_tokenizer = run.data_metadata is not None and run.data_metadata.tokenizer_type != "NullTokenizer"
    steps = [("evaluate", f"{tool_command('evaluate')} {load} {source}")] if data or has_tokenizer else []
    if has_tokenizer:
        steps.append(("generate", f"{tool_command('generate')} {load} --prompt 'Once upon a time'"))
    report = shlex.quote(str(folder / "report.html"))
    steps.append(("report", f"{tool_command('report')} {shlex.quote(str(folder))} --output {report}"))
    export = shlex.quote(str(folder / "hugging_face"))
    steps.append(("convert", f"{tool_command('convert')} to-hf {load} --output {export}"))
    return tuple(steps)
