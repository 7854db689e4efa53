"""What the system's error numbers say: about a path, about the disk, or about the machine; one table for all.

A fault of the machine says nothing about the file that met it: another attempt, or another machine, may read it. So
it is never recorded as a property of the data.
"""

import errno

from mmkd.data_manifests.errors import InputError, MmkdError, StorageError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""There is no room."""
FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
"""This user may not, now; somebody can allow it."""
ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EILSEQ})
"""No file of that name can be there, as far as the system can see."""
UNWELL = frozenset(
    {
        *(errno.EIO, errno.EREMOTEIO, errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM, errno.EMEDIUMTYPE),  # disks
        *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOLCK, errno.EUCLEAN, errno.EBADMSG),  # file systems
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.ENONET),
        *(errno.ENOTCONN, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ESHUTDOWN),
        *(
            errno.EREMCHG,
            errno.ECOMM,
            errno.ENOLINK,
            errno.EPROTO,
            errno.ENOKEY,
            errno.EKEYEXPIRED,
        ),  # network mounts
        *(errno.ENOMEM, errno.EAGAIN, errno.ENOBUFS, errno.EMFILE, errno.ENFILE, errno.EBUSY),  # load
        *(errno.ECANCELED, errno.EDEADLK, errno.ETXTBSY, errno.EUSERS),
    }
)
"""Disk, network or memory fail, now."""
MACHINE_FAULTS = FULL | FORBIDDEN | UNWELL
"""Errors that say nothing about the data: fix the machine and run again."""


def cannot_read(what: object, error: OSError, more: str = "") -> MmkdError:
    """Return the error of an input that cannot be read: StorageError where the machine is at fault."""
    kind = StorageError if error.errno in MACHINE_FAULTS else InputError
    return kind(f"cannot read {what}: {error.strerror}{more}")
