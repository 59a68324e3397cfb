"""The folder in which torch.compile keeps compiled code must belong to this user.

By default it is /tmp/torchinductor_USER, a name that everybody on the machine knows. torch takes an existing folder as it is, and runs the
compiled code that lies in it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from megatron_patch.errors import ConfigError


def require_own_compile_cache() -> None:
    """Creates the folder for compiled code, or checks who may write to the existing one.

    Raises:
        ConfigError: another user owns the folder, or may write to it.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    folder = Path(named or default_cache_dir())
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=named is not None)
    try:
        # A link in /tmp belongs to whoever made it, so it is not followed; a folder that the user names may be one.
        found = folder.stat() if named else folder.lstat()
    except OSError as error:
        raise ConfigError(
            f"cannot make the folder {folder} for compiled code: {error.strerror}",
            "a folder that this user can write to",
            "set TORCHINDUCTOR_CACHE_DIR to one",
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH:
        raise ConfigError(
            f"others can put files into {folder}, and --compile runs the compiled code that it finds there",
            "a folder that belongs to this user, and to which not everybody may write",
            "set TORCHINDUCTOR_CACHE_DIR to such a folder, or remove the existing one",
        )
