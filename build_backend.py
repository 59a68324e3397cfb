"""The build backend that pip calls (PEP 517): setuptools', with torch as a requirement only where the environment has none.

pip builds in an environment of its own, which does not see the packages of the user's. If torch were an ordinary build requirement, pip
would download another torch of several GB for each build, maybe of another CUDA version than the one that will load the kernels. So the
build compiles against the torch that the user's environment has.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import site
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that are not changed here

OLDEST_TORCH = (2, 11)
Settings = Mapping[str, str | list[str] | None] | None


def find_torch() -> tuple[Path, str] | None:
    """Returns the folder and the version of torch, in the build's own environment or in the one that pip installs into; None without it."""
    for folders in (None, _site_folders()):
        spec = importlib.machinery.PathFinder.find_spec("torch", folders)
        if spec is not None and spec.origin is not None:
            paths = {} if folders is None else {"path": folders}
            found = next(iter(importlib.metadata.distributions(name="torch", **paths)), None)
            if found is not None:
                return Path(spec.origin).parent, found.version
    return None


def _site_folders() -> list[str]:
    """Returns the folders of the packages that this Python finds outside of pip's environment for builds."""
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), site.getusersitepackages()]
    return list(dict.fromkeys(folders))


def is_too_old(version: str) -> bool:
    """Returns whether this version of torch is older than the package needs."""
    return tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH


def _torch() -> list[str]:
    found = find_torch()
    is_usable = found is not None and not is_too_old(found[1])
    return [] if is_usable else [f"torch>={'.'.join(map(str, OLDEST_TORCH))}"]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Returns what pip must install before it builds a wheel."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """Returns what pip must install before it builds an editable installation."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch()]
