"""Results put into a document. In: a Markdown file with a pair of marks, text, pictures. Out: the file with the text between the marks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_patch.errors import ConfigError
from megatron_patch.files import write_durably


def put_into(document: Path, name: str, text: str, pictures: Mapping[str, Path]) -> None:
    """Replaces what is between `<!-- name -->` and `<!-- end of name -->`, and copies pictures beside the document.

    Args:
        document: a Markdown file.
        name: of the marks.
        text: for between them.
        pictures: file names beside the document, and the files to copy there; those that are missing are left out.

    Raises:
        ConfigError: the document is missing or has no such marks.
    """
    marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
    try:
        before, begin, rest = document.read_text(encoding="utf-8").partition(marks[0])
    except OSError as error:
        raise ConfigError(f"--docs {document}: {error.strerror}", "a Markdown file") from None
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ConfigError(f"{document} lacks {' or '.join(marks)}", "a document with both marks", "write them where the tables belong")
    write_durably(document, f"{before}{begin}\n\n{text}\n{end}{after}")
    for target, source in pictures.items():
        if source.is_file():
            document.with_name(target).write_bytes(source.read_bytes())
