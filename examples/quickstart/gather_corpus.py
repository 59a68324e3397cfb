#!/usr/bin/env python
"""Gathers a corpus that every machine has: the source of Python's library.

python examples/quickstart/gather_corpus.py --output FOLDER

Writes FOLDER/train.jsonl and FOLDER/held_out.jsonl, one document per line.
Complete files are held out, so no file is in both. Long files are split into
documents before top-level definitions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import sysconfig
from pathlib import Path

SEED = 2407
HELD_OUT = 0.05
MAX_CHARACTERS = 24_000
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "lib2to3", "idlelib", "turtledemo"}


def documents(text: str) -> list[str]:
    """Splits the text of a file before top-level definitions into documents of about `MAX_CHARACTERS` characters at most."""
    pieces: list[list[str]] = [[]]
    size = 0
    for line in text.splitlines(keepends=True):
        if (size > MAX_CHARACTERS // 2 and line.startswith(("def ", "class ", "@", "async def "))) or size > MAX_CHARACTERS:
            pieces.append([])
            size = 0
        pieces[-1].append(line)
        size += len(line)
    return [joined for piece in pieces if len(joined := "".join(piece).strip("\n")) > 200]


def gather(root: Path, output: Path) -> dict[str, int]:
    """Writes both files and returns their numbers of documents and bytes."""
    files = []
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) > 200 and "\x00" not in text:
            files.append((str(path.relative_to(root)), text))
    random.Random(SEED).shuffle(files)
    held_out = max(1, round(len(files) * HELD_OUT))
    output.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    for name, part in (("held_out", files[:held_out]), ("train", files[held_out:])):
        rows = [(path, text) for path, content in part for text in documents(content)]
        random.Random(SEED).shuffle(rows)
        with (output / f"{name}.jsonl.partial").open("w", encoding="utf-8") as file:
            for source, text in rows:
                file.write(json.dumps({"text": text, "path": source}, ensure_ascii=False) + "\n")
        # Renamed when it is complete, so that an interrupted start leaves no incomplete corpus.
        os.replace(output / f"{name}.jsonl.partial", output / f"{name}.jsonl")
        counts[f"{name}_documents"] = len(rows)
        counts[f"{name}_bytes"] = sum(len(text.encode()) for _, text in rows)
    return counts


def main() -> int:
    """Gathers the corpus and prints its size; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    args = parser.parse_args()
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "argparse.py").is_file():
        print(f"{root} does not contain the source of the standard library; use a Python that has its .py files", file=sys.stderr)
        return 3
    print(json.dumps(gather(root, args.output)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
