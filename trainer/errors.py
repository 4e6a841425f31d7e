"""Why something ended without success, and the errors that say so. Imports nothing slow: staging's start takes a tenth of a second."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class FailureReason(StrEnum):
    CONFIG = "config"
    USER_CODE = "user-code"
    OUT_OF_MEMORY = "out-of-memory"
    DATA = "data"
    PREEMPTED = "preempted"
    TIMEOUT = "timeout"
    CAPACITY = "capacity"
    QUOTA = "quota"
    IMAGE = "image"
    PERMISSION = "permission"
    INFRASTRUCTURE = "infrastructure"
    UNKNOWN = "unknown"

    @property
    def is_retryable(self) -> bool:
        """Whether the same request may well succeed on another machine."""
        return self in (FailureReason.PREEMPTED, FailureReason.INFRASTRUCTURE)


class ExitCode(IntEnum):
    """Exit codes of the trainer and of the ``trainyard`` command, after BSD ``sysexits(3)`` where it has a fitting one."""

    OK = 0
    UNEXPECTED = 1  # a defect of Trainyard itself
    USAGE = 2  # the command line (click's own code)
    DATA = 65  # EX_DATAERR: the dataset, or it changed while it was read
    NOT_FOUND = 66  # EX_NOINPUT: no such run, file or profile
    UNAVAILABLE = 69  # EX_UNAVAILABLE: a service, capacity, or the machine went away
    USER_CODE = 70  # EX_SOFTWARE: the training raised
    OUT_OF_MEMORY = 71  # EX_OSERR: host or GPU memory
    RESULT_MISSING = 72  # ended as a success, but no verified model
    OCCUPIED = 73  # EX_CANTCREAT: another trainer owns this attempt, or the place cannot be written
    DISK_FULL = 74  # EX_IOERR
    PREEMPTED = 75  # EX_TEMPFAIL: told to stop, checkpoint saved, can go on
    SUPERSEDED = 76  # EX_PROTOCOL: another container of the same attempt took over
    PERMISSION = 77  # EX_NOPERM
    CONFIG = 78  # EX_CONFIG: the request
    TIMEOUT = 124  # as timeout(1): over its maximum run time or budget
    CANCELLED = 130  # as a shell says after Ctrl-C: a person wants it no more


EXIT_REASONS: dict[int, FailureReason] = {
    ExitCode.DATA: FailureReason.DATA,
    ExitCode.NOT_FOUND: FailureReason.CONFIG,
    ExitCode.UNAVAILABLE: FailureReason.INFRASTRUCTURE,
    ExitCode.USER_CODE: FailureReason.USER_CODE,
    ExitCode.OUT_OF_MEMORY: FailureReason.OUT_OF_MEMORY,
    ExitCode.RESULT_MISSING: FailureReason.UNKNOWN,
    ExitCode.OCCUPIED: FailureReason.CONFIG,
    ExitCode.DISK_FULL: FailureReason.QUOTA,
    ExitCode.PREEMPTED: FailureReason.PREEMPTED,
    ExitCode.SUPERSEDED: FailureReason.PREEMPTED,
    ExitCode.PERMISSION: FailureReason.PERMISSION,
    ExitCode.CONFIG: FailureReason.CONFIG,
    ExitCode.TIMEOUT: FailureReason.TIMEOUT,
}

# What a platform that replaces containers has to know of the trainer's codes. After the first ones another container of the
# same attempt goes on from the last checkpoint. After all others it would end the same way, or nobody wants it any more.
RETRYABLE_EXITS = (ExitCode.UNAVAILABLE, ExitCode.PREEMPTED, ExitCode.SUPERSEDED)
FATAL_EXITS = tuple(code for code in ExitCode if code is not ExitCode.OK and code not in RETRYABLE_EXITS)


class TrainyardError(Exception):
    """An expected failure, told without a traceback: the cause, the next step, and the exit code of its class."""

    def __init__(self, message: str, *, hint: str = "", code: ExitCode = ExitCode.UNEXPECTED) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        return f"{self.message.rstrip('.')}. Next: {self.hint}" if self.hint else self.message


class TrainerError(TrainyardError):
    """An expected failure of the trainer's side of the contract: the data, the config, the machine it runs on."""

    def __init__(self, message: str, *, hint: str = "", code: ExitCode = ExitCode.USER_CODE) -> None:
        super().__init__(message, hint=hint, code=code)


def unknown_name_message(kind: str, name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    advice = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    return f"unknown {kind} {name!r}; {advice}"
