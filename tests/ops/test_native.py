"""How the compiled libraries are loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_patch.ops import native

CSRC = Path(__file__).parent.parent.parent / "csrc"


@pytest.mark.skipif(native.load_error() is not None, reason="_C is not built")
def test_a_library_of_other_sources_is_not_used_and_says_what_it_lacks():
    error = native._load(native.LIBRARY, ("patch_embedding", "an_operator_of_newer_sources"))
    assert error == "_C.so was built from other sources: it lacks an_operator_of_newer_sources"
    assert native._load(native.LIBRARY, native.OPERATORS) is None


@pytest.mark.parametrize(("file", "names"), [("schemas.cpp", native.OPERATORS), ("cuda/bindings.cpp", native.CUDA_OPERATORS)])
def test_what_is_asked_for_is_what_the_sources_define(file, names):
    text = re.sub(r'"\s*\n\s*"', "", (CSRC / file).read_text())
    assert set(names) == set(re.findall(r'm\.def\(\s*"(\w+)\(', text))
