"""What a disk can refuse while something is written, told from other errors."""

import errno

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file is larger than is allowed here",
    errno.EROFS: "the folder is read-only",
    errno.EIO: "the disk reports an error",
}


def disk_reason(error: BaseException | None) -> str | None:
    """Why a disk refused to be written to, in words; None if the error, and what it came from, is of another kind."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REASONS:
            return _REASONS[error.errno]
        error = error.__cause__ or error.__context__
    return None
