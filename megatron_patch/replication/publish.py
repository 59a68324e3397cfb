"""Inserts the results of a study into a document. In: a Markdown file with a pair of markers, text, plots. Out: the updated file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_patch.utils.files import write_durably
from megatron_patch.utils.markdown import replace_between, wrap_prose


def publish(document: Path, name: str, text: str, plots: Mapping[str, Path]) -> None:
    """Replaces the text between `<!-- name -->` and `<!-- end of name -->`, and copies plots to the document's folder.

    Args:
        document: Markdown file to update.
        name: name in the markers.
        text: new text between the markers.
        plots: files to copy, by their new name next to the document; missing files are skipped.

    Raises:
        ConfigError: the document cannot be read or lacks the markers.
    """
    write_durably(document, replace_between(document, f"<!-- {name} -->", f"<!-- end of {name} -->", wrap_prose(text)))
    for target, source in plots.items():
        if source.is_file():
            document.with_name(target).write_bytes(source.read_bytes())
