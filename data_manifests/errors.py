"""The errors that a user can cause, each with the exit code that the commands document.

Every command turns an `MmkdError` into one line on stderr and its `exit_code`; anything else is a bug and
keeps its traceback (exit code 1).
"""

EXIT_INTERRUPTED = 75


class MmkdError(Exception):
    """Base of all errors that are not bugs; its text names the file, row or option and what to do."""

    exit_code = 2


class InputError(MmkdError):
    """Wrong usage, configuration or input data (exit code 2)."""


class VideoError(MmkdError):
    """One video cannot be read, or not exactly; `str(error)` is the reason stored with the clip's status.

    A reason names no absolute path, time or host, so that it may stand in a reproducible commit record.
    """


class TooManyUnusableError(MmkdError):
    """The work is done, but more clips are unusable than `--max-unusable` tolerates (exit code 3)."""

    exit_code = 3


class VerificationError(MmkdError):
    """Stored bytes are not what their commit record says (exit code 4)."""

    exit_code = 4


class FingerprintError(MmkdError):
    """The cache was made from something else than what is at hand (exit code 5)."""

    exit_code = 5


class StorageError(MmkdError):
    """Reading or writing failed: disk full, permission, I/O error (exit code 74)."""

    exit_code = 74


class InterruptedByUserError(MmkdError):
    """A clean stop on SIGINT, SIGTERM or SIGUSR1: run the same command again (exit code 75)."""

    exit_code = EXIT_INTERRUPTED
