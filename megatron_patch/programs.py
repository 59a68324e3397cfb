"""How users call the programs: files of a checkout (`tools/plan.py`), or the installed command (`megatron-patch plan`).

Out: the name of a program for help texts and for advice. Only the standard library is imported here.
"""

from __future__ import annotations

import re
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
"""The folder that contains the package: the root of a checkout, or site-packages."""
TOOLS = {
    "pretrain_gpt_patch": "pretrain",
    "preprocess_data": "preprocess",
    "merge_datasets": "merge",
    "inspect_dataset": "inspect-dataset",
    "inspect_checkpoint": "inspect-checkpoint",
    "show_step": "show-step",
    "plan": "plan",
    "evaluate": "evaluate",
    "generate": "generate",
    "convert_checkpoint": "convert",
    "report": "report",
    "plot": "plot",
    "study": "study",
    "compare_studies": "compare-studies",
    "train_tokenizer": "train-tokenizer",
    "migrate": "migrate",
}
"""The files of a checkout, without .py, and the subcommands of `megatron-patch` that do the same."""
_SHIPPED = (
    ("examples/configs", "*.yaml"),
    ("examples/replicate", "*.yaml"),
    ("examples/integrations", "*.py"),
    ("examples/slurm", "*.sbatch", "*.sh"),
    (".", "constraints.txt"),
)
_LAUNCHER = r"(?:(python|deepspeed(?: --num_gpus \d+)?) )?"
_FILE = re.compile(rf"(?<![\w/.-]){_LAUNCHER}(?:pretrain_gpt_patch|(?:tools|examples/replicate)/({'|'.join(TOOLS)}))\.py\b")
_called: list[str] = []


def in_checkout() -> bool:
    """Returns whether this package is part of a checkout, so that its user has pretrain_gpt_patch.py and tools/."""
    return (HOME / "pretrain_gpt_patch.py").is_file() and (HOME / "tools").is_dir()


def shipped_files(root: Path) -> list[str]:
    """Returns the paths, relative to the root of a checkout, of the files that `shipped` finds in an installation."""
    found = [path for folder, *patterns in _SHIPPED for pattern in patterns for path in (root / folder).glob(pattern)]
    return sorted(str(path.relative_to(root)) for path in found)


def shipped(name: str) -> Path:
    """Returns the path of a file or folder of the repository that an installation has too.

    Args:
        name: its path in the repository: constraints.txt, examples/configs, examples/replicate, examples/integrations or
            examples/slurm.
    """
    return HOME / name if in_checkout() else HOME / "megatron_patch" / "share" / name


def how_to_get(path: str) -> str | None:
    """Returns the advice for a missing file of which an installation has a copy, as examples/configs/llama_70b.yaml; None for others."""
    is_ours = path.startswith("examples/") and not in_checkout() and shipped(path).is_file()
    return "run megatron-patch examples ., which writes it" if is_ours else None


def set_command(words: str) -> None:
    """Notes how the user called this process, such as `megatron-patch plan`."""
    _called[:] = [words]


def command() -> str | None:
    """Returns how the user called this process, as `set_command` was given it; None if a file was called."""
    return _called[0] if _called else None


def as_called(text: str) -> str:
    """Returns a help text or an advice with the programs named as this user calls them.

    Args:
        text: a text that names files of a checkout, as `tools/NAME.py`, `python tools/NAME.py` or `deepspeed tools/NAME.py`.

    Returns:
        The text as it is in a checkout, unless the user called `megatron-patch` or `python -m megatron_patch`. Otherwise with subcommands
        of that command in place of the files, and with `--module` after a launcher.
    """
    if not _called and in_checkout():
        return text
    name = _called[0].rpartition(" ")[0] if _called else "megatron-patch"

    def installed(found: re.Match[str]) -> str:
        launcher, tool = found[1], TOOLS[found[2] or "pretrain_gpt_patch"]
        if launcher is None or launcher == "python":
            return f"{name} {tool}"
        return f"{launcher} --module megatron_patch{'.' if tool == 'pretrain' else ' '}{tool}"

    return _FILE.sub(installed, text)
