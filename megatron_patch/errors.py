"""The errors that a user can cause. Each message has three parts: what was given and why it is wrong, what is allowed, what to do."""

from __future__ import annotations

import re

from megatron_patch.credentials import without_credentials
from megatron_patch.exit_codes import ExitCode
from megatron_patch.programs import as_called


class MegatronPatchError(Exception):
    """Base class of the errors that a user can resolve. Passwords and tokens in addresses are left out of the message.

    Args:
        what: what was given or found, with its value, and why it is wrong.
        allowed: what would be accepted.
        do: what to do, as an imperative or a command.

    The allowed and the do part may name programs by their files in a checkout, as `tools/plan.py`; see `as_called`.

    Examples:
        >>> print(MegatronPatchError("3 ranks for 4 samples", "a divisor of 4", "start 2 ranks"))
        3 ranks for 4 samples
          Allowed: a divisor of 4
          What to do: start 2 ranks
    """

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, what: str, allowed: str | None = None, do: str | None = None) -> None:
        self.what = without_credentials(what)
        self.allowed = as_called(without_credentials(allowed)) if allowed else allowed
        self.do = as_called(without_credentials(do)) if do else do
        parts = [self.what]
        if self.allowed:
            parts.append(f"Allowed: {self.allowed}")
        if self.do:
            parts.append(f"What to do: {self.do}")
        # Further lines of a part are indented, so that no name with a line end begins a line of a log.
        super().__init__("\n  ".join(re.sub(r"\n(?![ \n])", "\n    ", part) for part in parts))

    def __reduce__(self) -> tuple[type, tuple[str, str | None, str | None]]:
        return type(self), (self.what, self.allowed, self.do)


class ConfigError(MegatronPatchError):
    """A flag, a key of a configuration file, or a combination of them is not possible."""

    exit_code = ExitCode.CONFIG


class DataError(MegatronPatchError):
    """A corpus, a dataset file or a tokenizer is missing, damaged, too small or not the one expected."""

    exit_code = ExitCode.DATA


class CheckpointError(MegatronPatchError):
    """A checkpoint is missing, incomplete, damaged, or belongs to another model, plan or corpus."""

    exit_code = ExitCode.CHECKPOINT


class DoesNotFitError(MegatronPatchError):
    """A planned run needs more memory than the devices have."""

    exit_code = ExitCode.DOES_NOT_FIT


class SickTrainingError(MegatronPatchError):
    """Too many steps in a row were rejected because of their losses or gradients."""

    exit_code = ExitCode.SICK


class CorruptionError(MegatronPatchError):
    """Ranks that must hold the same weights or read the same samples differ."""

    exit_code = ExitCode.CORRUPTION
