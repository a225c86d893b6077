"""Remedies for a disk that takes no more, and writes that a run can do without."""

import contextlib
import errno
import getpass
import logging
import resource
from collections.abc import Iterator

logger = logging.getLogger(__name__)


#: Errors of a disk, of its permissions, or of limits on files, which the user can cure.
OF_A_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EMFILE, errno.ENFILE, errno.EFBIG, errno.EIO, errno.ESTALE),
)


def of_a_disk(error: OSError) -> bool:
    """Tell whether `advice` has something to say about an error."""
    return error.errno in OF_A_DISK


def advice(error: BaseException) -> str:
    """Describe the error of a write in words, with what the user can do about it."""
    code = error.errno if isinstance(error, OSError) else None
    what = f"{type(error).__name__}: {error}"
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"{what}. The disk or the quota is full: make room there, or lower checkpoint.keep_last"
    if code == errno.EROFS:
        return f"{what}. The file system is mounted read-only: mount it writable, or give another run.dir"
    if code in (errno.EACCES, errno.EPERM):
        return f"{what}. User {_user()} may not write there: change the owner or the mode, or give another run.dir"
    if code in (errno.EMFILE, errno.ENFILE):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"{what}. Raise the limit of open files (now {soft}, at most {hard}): ulimit -n {hard}"
    if code == errno.EFBIG:
        return f"{what}. Raise the limit of file sizes: ulimit -f unlimited"
    if code in (errno.EIO, errno.ESTALE):
        return f"{what}. The disk or file server has a fault: see dmesg, or take another host"
    return what


def _user() -> str:
    try:
        return getpass.getuser()
    # The user id of a container may have no name: getpass raises KeyError before Python 3.13, OSError since.
    except (OSError, KeyError):
        return "of this process"


class Tolerance:
    """Guard for writes that a run can do without: the first failure of a kind is told, and when it is over."""

    def __init__(self) -> None:
        self._failing: dict[str, int] = {}

    @contextlib.contextmanager
    def __call__(self, what: str, *kinds: type[Exception]) -> Iterator[None]:
        """Run a write of `what`; errors of the operating system, and of `kinds`, end in a warning."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, (OSError, *kinds)):
                raise
            self._failing[what] = self._failing.get(what, 0) + 1
            if self._failing[what] == 1:
                logger.warning("%s could not be written, training goes on: %s", what, advice(error))
        else:
            missed = self._failing.pop(what, 0)
            if missed:
                logger.warning("%s can be written again; %d writes had failed", what, missed)
