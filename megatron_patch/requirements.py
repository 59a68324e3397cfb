"""The packages that the programs need: which module comes from which package or extra, and one message for each that is missing.

In: names of modules. Out: `ConfigError` with the command that installs them. The lists are those of pyproject.toml, which an installation
without metadata (PYTHONPATH) does not have; a test compares them. Modules are looked up, not imported.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shlex
import sys
from collections.abc import Iterable, Iterator

from megatron_patch.errors import ConfigError
from megatron_patch.programs import HOME, in_checkout, shipped
from megatron_patch.utils.units import plural

REQUIRED = {
    "torch": "torch",
    "numpy": "numpy",
    "tyro": "tyro",
    "rich": "rich",
    "yaml": "pyyaml",
    "orjson": "orjson",
    "tokenizers": "tokenizers",
    "fastokens": "fastokens",
    "sentencepiece": "sentencepiece",
    "zstandard": "zstandard",
    "xxhash": "xxhash",
    "safetensors": "safetensors",
    "matplotlib": "matplotlib",
}
"""Modules of the packages that every installation has, and the packages."""
EXTRAS = {
    "deepspeed": "train",
    "isal": "fast",
    "pyarrow": "parquet",
    "fsspec": "remote",
    "aiohttp": "remote",
    "tiktoken": "tiktoken",
    "transformers": "hf",
    "lm_eval": "eval",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "prometheus_client": "prometheus",
}
"""Modules of optional packages, and the extra that installs each."""
_NAMES = {
    "deepspeed": "DeepSpeed",
    "lm_eval": "lm-eval",
    "mlflow": "mlflow-skinny",
    "prometheus_client": "prometheus-client",
}  # where a package's name is not its module's


def is_missing(module: str) -> bool:
    """Returns whether a top-level module cannot be found."""
    if module in sys.modules:
        return sys.modules[module] is None  # as None, a module is one that cannot be imported
    try:
        return importlib.util.find_spec(module) is None
    except ImportError:
        return True


@contextlib.contextmanager
def hidden_module(module: str) -> Iterator[None]:
    """Lets imports of a top-level module fail until the context ends, as if its package was not installed; one that is loaded stays."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # importing it raises ImportError
    try:
        yield
    finally:
        del sys.modules[module]


def check_required(modules: Iterable[str] = tuple(REQUIRED)) -> ConfigError | None:
    """Returns the error to report if required packages are missing, otherwise None.

    Args:
        modules: names of top-level modules.
    """
    missing = [module for module in modules if is_missing(module)]
    if not missing:
        return None
    names = ", ".join(REQUIRED.get(module, module) for module in missing)
    activate = "`source .venv/bin/activate`"
    if not in_checkout():
        do = f"run {sys.executable} -m pip install {_constraints()}megatron_patch"
    elif (HOME / ".venv" / "bin" / "python").exists():
        do = f"in {HOME}, run {activate}"
    else:
        do = f"in {HOME}, run `make venv`, then {activate}; without make: pip install {_constraints()}-e '.[train]'"
    return ConfigError(
        f"{sys.executable} lacks {plural(len(missing), 'required package')}: {names}", "a Python with all required packages", do
    )


def missing_package(module: str, purpose: str) -> ConfigError:
    """Returns the error for a missing optional package.

    Args:
        module: a module of `EXTRAS`.
        purpose: what needs it: a flag with its value, or a noun in the singular.
    """
    extra = EXTRAS[module]
    return ConfigError(
        f"{purpose} needs {_NAMES.get(module, module)}, which is not installed",
        f"an installation with the extra [{extra}]",
        how_to_install(module),
    )


def how_to_install(module: str) -> str:
    """Returns, as an imperative, how to install the extra that has a module of `EXTRAS`."""
    torch_first = "install torch first; then " if is_missing("torch") else ""
    return f"{torch_first}run pip install {_constraints()}'megatron_patch[{EXTRAS[module]}]'"


def require(module: str, purpose: str) -> None:
    """Checks that an optional package is installed, without importing it.

    Raises:
        ConfigError: it is not, as `missing_package`.
    """
    if is_missing(module):
        raise missing_package(module, purpose)


@contextlib.contextmanager
def explained_imports() -> Iterator[None]:
    """Turns a failed import of one of these packages, inside of the `with` block, into the error that says how to install it.

    Raises:
        ConfigError: a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module in EXTRAS and is_missing(module):
            raise missing_package(module, "this command") from error
        if module in REQUIRED and (known := check_required([module])) is not None:
            raise known from error
        raise


def _constraints() -> str:
    """Returns pip's option that keeps torch and takes tried versions of everything else."""
    path = shipped("constraints.txt")
    return f"-c {shlex.quote(str(path))} " if path.is_file() else ""
