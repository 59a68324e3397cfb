"""The errors that a user can cause, each with the three parts of a good message: what was found, what is allowed, what to do."""

from __future__ import annotations

from megatron_patch.exit_codes import ExitCode


class MegatronPatchError(Exception):
    """Base of all errors that tell a user what to change.

    Args:
        what: what was given or found, with its value.
        allowed: what would have been accepted.
        do: what to change, as a sentence or a command.
    """

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, what: str, allowed: str | None = None, do: str | None = None) -> None:
        self.what, self.allowed, self.do = what, allowed, do
        parts = [what]
        if allowed:
            parts.append(f"Allowed: {allowed}")
        if do:
            parts.append(f"What to do: {do}")
        super().__init__("\n  ".join(parts))

    def __reduce__(self) -> tuple[type, tuple[str, str | None, str | None]]:
        return type(self), (self.what, self.allowed, self.do)


class ConfigError(MegatronPatchError):
    """A flag, a key of a configuration file, or a combination of them cannot be run."""

    exit_code = ExitCode.CONFIG


class DataError(MegatronPatchError):
    """A corpus, a dataset file or a tokenizer is missing, broken, too small or not the one expected."""

    exit_code = ExitCode.DATA


class CheckpointError(MegatronPatchError):
    """A checkpoint is missing, incomplete, damaged, or belongs to another model, plan or corpus."""

    exit_code = ExitCode.CHECKPOINT


class SickTrainingError(MegatronPatchError):
    """Losses or gradients that no step should be taken with, and that skipping did not cure."""

    exit_code = ExitCode.SICK


class CorruptionError(MegatronPatchError):
    """Ranks that must hold or read the same do not."""

    exit_code = ExitCode.CORRUPTION
