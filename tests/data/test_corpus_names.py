"""Short names of corpora: different for each, and no longer than needed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.data.corpus_names import corpus_names


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["/data/web_text_document", "code"], ("web_text_document", "code")),
        (["/d/web/text", "/d/code/text", "/d/books"], ("web/text", "code/text", "books")),
        (["/a/x/text", "/b/x/text", "/b/y/text"], ("a/x/text", "b/x/text", "y/text")),
        (["text", "x/text"], ("text", "x/text")),
        (["s3://bucket/web", "@lists/code.txt", "'shards/c_*"], ("web", "code.txt", "c_*")),
        (["a.bin", "./a", "b/"], ("a", "a (2)", "b")),
        (["a\x1bb"], ("a\\x1bb",)),
        ([], ()),
    ],
)
def test_names_are_the_last_parts_that_tell_corpora_apart(words, names):
    assert corpus_names(words) == names


@given(st.lists(st.text(alphabet="ab/.@ ()2", min_size=1, max_size=8), max_size=8, unique=True))
def test_no_two_corpora_have_the_same_name(words):
    names = corpus_names(words)
    assert len(set(names)) == len(words) and all(names)
