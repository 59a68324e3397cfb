"""Saves figures of matplotlib. In: a figure whose texts may come from others. Out: an image in which they are shown as they are."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from megatron_patch.utils.console import visible

_ENDINGS = (".png", ".pdf", ".svg", ".jpg", ".webp")


def legend_label(text: str) -> str:
    """Returns a name as a label of a legend; matplotlib leaves out labels that begin with an underscore."""
    return f" {text}" if text.startswith("_") else text


def save_figure(figure: Any, output: Path, dpi: int = 130) -> None:
    """Writes a figure as an image. Dollar signs in its texts are no formulas, and control characters are escapes.

    Raises:
        OSError: the file cannot be written, or its name has not the ending of an image.
    """
    from matplotlib.text import Text

    if output.suffix.lower() not in _ENDINGS:
        # matplotlib would add an ending, or raise an error of its own.
        raise OSError(errno.EINVAL, f"its name does not end in {', '.join(_ENDINGS[:-1])} or {_ENDINGS[-1]}")

    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text(visible(text.get_text()))
    figure.savefig(output, dpi=dpi)
