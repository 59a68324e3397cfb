"""Shows the text that a step read.

python tools/show_step.py SAVE [--step 1234]

SAVE/events.jsonl records the data of rejected steps; no others can be shown.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_patch.cli.command_line import ArgumentParser, count
from megatron_patch.data.corpus import open_corpus
from megatron_patch.data.dataset_metadata import read_metadata
from megatron_patch.errors import DataError
from megatron_patch.tokenizers.base import load_tokenizer_for_display
from megatron_patch.training.callbacks.metrics import read_metrics
from megatron_patch.utils.console import make_console
from megatron_patch.utils.files import optional_file, reason
from megatron_patch.utils.units import plural


def main(argv: list[str]) -> None:
    """Runs the tool."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("save", help="a run's folder")
    parser.add_argument("--step", type=int, help="which step; default: the last rejected one")
    parser.add_argument("--samples", type=count, default=8, help="number of samples to show")
    parser.add_argument("--characters", type=count, default=600, help="number of characters to show of each sample")
    parser.add_argument("--tokenizer-type", help="default: the tokenizer in the dataset's metadata file")
    parser.add_argument("--tokenizer-model", help="file or folder of the tokenizer; default: the one in the dataset's metadata file")
    args = parser.parse_args(argv)
    path = Path(args.save) / "events.jsonl"
    try:
        if not optional_file(path):
            raise DataError(f"{path} does not exist", "the folder of a run that has started", "check the path")
        events = [event for event in read_metrics(path) if event.get("spans")]
    except OSError as error:
        raise DataError(f"cannot read {path}: {reason(error)}", "a readable file of whole lines", "repair the file") from error
    chosen = [event for event in events if args.step in (None, event["step"])]
    if not chosen:
        steps = ", ".join(sorted({str(event["step"]) for event in events})) or "none"
        step = "any step" if args.step is None else f"step {args.step}"
        raise DataError(f"{path} does not record the data of {step}", f"recorded steps: {steps}", "choose a recorded step")
    event, console = chosen[-1], make_console()
    samples = plural(len(event["spans"]), "sample")
    console.print(f"step {event['step']:,}, stage {event['stage']}: {event['reason']}; {samples}")
    for prefix, start, length in event["spans"][: args.samples]:
        ids = np.empty(length, dtype=np.int64)
        open_corpus(prefix).read_into(ids, start)
        metadata = read_metadata(prefix)
        recorded = (metadata.tokenizer_type, metadata.tokenizer_model) if metadata else None
        tokenizer = load_tokenizer_for_display(recorded, args.tokenizer_type, args.tokenizer_model)
        text = tokenizer.decode(ids.tolist()) if tokenizer else " ".join(map(str, ids.tolist()))
        console.print(f"\n{prefix}, tokens {start:,} to {start + length - 1:,}", style="bold")
        console.print(text[: args.characters])
    print(json.dumps({"step": event["step"], "reason": event["reason"], "samples": len(event["spans"])}))
