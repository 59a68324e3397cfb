"""Generated text in documents: it replaces what is between its markers, and its prose is wrapped."""

from __future__ import annotations

import pytest

from megatron_patch.errors import ConfigError
from megatron_patch.utils.markdown import replace_between, wrap_prose


def test_only_the_text_between_the_markers_changes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x -->\nold\n<!-- end of x -->\nafter\n")
    assert replace_between(page, "<!-- x -->", "<!-- end of x -->", "new\n") == "before\n<!-- x -->\n\nnew\n\n<!-- end of x -->\nafter\n"
    assert "old" in page.read_text(), "the file is left alone"


@pytest.mark.parametrize("text", ["no markers", "<!-- end of x --><!-- x -->", "<!-- x --><!-- x --><!-- end of x -->"])
def test_documents_without_one_pair_of_markers_are_refused(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ConfigError, match="each line once"):
        replace_between(page, "<!-- x -->", "<!-- end of x -->", "new")


def test_prose_is_wrapped_and_everything_else_stays():
    words = " ".join(["word"] * 30)
    code = f"```\n{words}\n```"
    table = f"| {words} | {words} |"
    wrapped = wrap_prose(f"{words}\n\n- {words}\n\n{table}\n\n{code}\n![{words}](x.png)")
    lines = wrapped.split("\n")
    assert table in lines and code in wrapped and f"![{words}](x.png)" in lines
    assert lines[0] == " ".join(["word"] * 20) and lines[4].startswith("  word"), "an item of a list is indented"
    assert wrapped.replace("\n  ", " ").split() == f"{words} - {words} {table} {code} ![{words}](x.png)".split()
