"""What goes wrong in a run that was configured well."""

import errno
from collections.abc import Iterator

FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_TEXT = ("No space left on device", "ENOSPC", "Disk quota exceeded", "EDQUOT")


class RunError(RuntimeError):
    """A run failed: a full disk, a loss that is not finite. One line; the run directory is whole and can be resumed."""


def disk_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that the disk is full; libraries wrap the OSError in text."""
    return any(getattr(e, "errno", None) in FULL or any(text in str(e) for text in FULL_TEXT) for e in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
