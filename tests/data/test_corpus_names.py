"""Short names of corpora: different for each, and no longer than needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.checkpoint.trainer_state import HeldOutName
from megatron_patch.data.corpus_names import corpus_names, names_in_run
from megatron_patch.data.same_dataset import real_path


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


def later(words, used, tokens=None):
    """The names of a start, in the order of the words, and all names that the run has used by then."""
    found = names_in_run(words, tokens or [7] * len(words), used)
    return [one.name for one in found[: len(words)]], found


def test_a_corpus_keeps_its_name_when_others_join_or_leave():
    names, used = later(["A/x/v", "code"], ())
    assert names == ["v", "code"]
    names, used = later(["B/x/v", "./A/x/v.bin", "code"], used)
    assert names == ["B/x/v", "v", "code"]
    names, used = later(["B/x/v"], used)
    assert names == ["B/x/v"] and sorted(one.name for one in used) == ["B/x/v", "code", "v"]
    names, used = later(["C/code", "B/x/v", "A/x/v"], used, [8, 7, 7])
    assert names == ["C/code", "B/x/v", "v"]
    assert len({one.name for one in used}) == len(used) == 4


def test_no_other_corpus_gets_the_name_of_one_that_is_gone():
    _, used = later(["v", "w"], ())
    assert later(["D/v"], used, [8])[0] == ["D/v"]
    assert later(["/v", "v", "w"], (HeldOutName("v", real_path("elsewhere"), 1), *used))[0] == ["v (2)", "v", "w"]


def test_a_corpus_whose_files_moved_keeps_its_name():
    """It is the same if its path ends in the name, the old path is not given, and it has as many tokens, as far as they are known."""
    _, used = later(["/a/web/valid", "/a/code/valid"], (), [5, 6])
    assert later(["/b/code/valid", "/b/web/valid"], used, [6, 5])[0] == ["code/valid", "web/valid"]
    assert later(["/b/web/valid", "/a/web/valid"], used, [5, 5])[0] == ["b/web/valid", "web/valid"]
    assert later(["/b/web/valid"], used, [4])[0] == ["b/web/valid"]
    assert later(["/b/web/valid"], [replace(one, tokens=None) for one in used], [4])[0] == ["web/valid"]


@given(st.lists(st.lists(st.text(alphabet="ab/@ ()2", min_size=1, max_size=6), max_size=5, unique_by=real_path), max_size=4))
def test_names_of_a_run_never_belong_to_two_corpora(starts):
    used, seen = (), {}
    for words in starts:
        names, used = later(words, used, [hash(real_path(word)) for word in words])
        assert len(set(names)) == len(names) and len({one.name for one in used}) == len(used)
        for word, name in zip(words, names, strict=True):
            assert seen.setdefault(real_path(word), name) == name
