"""Offload to NVMe is refused if its operator would have to be compiled."""

from __future__ import annotations

import pytest

from megatron_patch.engine.swapping import require_async_io
from megatron_patch.errors import ConfigError


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    from deepspeed.git_version_info import installed_ops

    for name in ("async_io", "pin_memory"):
        monkeypatch.setitem(installed_ops, name, False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def test_an_operator_that_is_not_built_is_not_compiled(nothing_built):
    with pytest.raises(ConfigError, match="async_io is not built") as error:
        require_async_io()
    assert "DS_BUILD_AIO=1" in str(error.value) and "cpu" in str(error.value)


def test_an_operator_that_cannot_be_loaded_is_named(nothing_built, monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    for name in ("async_io", "pin_memory"):
        (nothing_built / name).mkdir()
        (nothing_built / name / f"{name}.so").touch()

    def load(self, verbose=False):
        raise ImportError("undefined symbol: io_submit")

    monkeypatch.setattr(AsyncIOBuilder, "load", load)
    with pytest.raises(ConfigError, match="cannot be loaded: undefined symbol: io_submit"):
        require_async_io()
