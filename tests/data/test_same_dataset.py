"""Datasets that are named twice under other spellings."""

from __future__ import annotations

import pytest

from megatron_patch.config.stage_spec import parse_blend
from megatron_patch.data.same_dataset import named_twice, real_path, shared_datasets
from megatron_patch.errors import ConfigError


@pytest.mark.parametrize(
    ("first", "other"),
    [
        ("a/x/v", "./a/x/v"),
        ("a/x/v", "a/x/../x/v.bin"),
        ("a/x/v", "a//x/v.idx"),
        ("a/x/v", "folder/v"),
        ("a/x/v", "link"),
        ("a/x/v", "file://{folder}/a/x/v"),
        ("@a/list", "@./a/list"),
        ("a/x/*", "./a/x/*"),
        ("s3://b/v", "s3://b/v.idx"),
    ],
)
def test_another_spelling_is_the_same_dataset(tmp_path, monkeypatch, first, other):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "x").mkdir(parents=True)
    (tmp_path / "folder").symlink_to("a/x")
    for suffix in (".bin", ".idx"):
        (tmp_path / f"a/x/v{suffix}").touch()
        (tmp_path / f"link{suffix}").symlink_to(f"a/x/v{suffix}")
    other = other.format(folder=tmp_path)
    assert real_path(first) == real_path(other) and named_twice(["c", first, other]) == (first, other)
    for flag in ("--data-path", "--valid-data-path", "stages: data_path"):
        with pytest.raises(ConfigError, match=f"{flag} names a dataset twice"):
            parse_blend(["0.5", first, "0.5", other], flag)


def test_other_datasets_are_not_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named_twice(["a", "@a", "b/a", "a.b", "s3://x/a", "s3://y/a"]) is None
    assert named_twice(["a\0", "b\0"]) is None


def test_the_datasets_that_corpora_share_are_named():
    corpora = [("s/*", ["s/a", "s/b"]), ("s/b", ["./s/b"]), ("c", ["c"]), ("@l", ["s/a", "s/b", "d"])]
    assert shared_datasets(corpora) == [("s/*", "s/b", "./s/b"), ("s/*", "@l", "s/a")]
