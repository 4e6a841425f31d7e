"""The errors that callers meet. SDK exceptions never leave a provider's file; causes are chained.

TrainyardError (trainer.contract)
├── TrainerError                the trainer's side: data, config, machine
├── RunNotFound                 no such run, or several begin so
├── RunCancelled                the run was stopped because somebody asked
├── MissingExtra                an optional dependency is not installed
└── ProviderError               named by what the caller should do next
    ├── TerminalError           the same call will fail again
    │   ├── ConfigError         mend the request or the profile
    │   ├── AuthError           mend the credentials
    │   ├── QuotaError          raise the limit, or free what uses it
    │   ├── PlanChanged         another request lies under the same run and attempt
    │   ├── JobNotFound         the provider no longer knows the job
    │   ├── JobFailed           the job ended without success; carries the reason
    │   └── ResultMissing       ended as a success, but no verified result
    └── TransientError          the same call may succeed later: the only kind that is retried
        ├── RateLimited
        └── ServiceUnavailable
"""

from __future__ import annotations

from typing import ClassVar

from trainer.errors import ExitCode, FailureReason, TrainerError, TrainyardError

__all__ = ["TrainerError", "TrainyardError"]

# The command's exit code for a job that failed so.
REASON_EXITS: dict[FailureReason, ExitCode] = {
    FailureReason.CONFIG: ExitCode.CONFIG,
    FailureReason.USER_CODE: ExitCode.USER_CODE,
    FailureReason.OUT_OF_MEMORY: ExitCode.OUT_OF_MEMORY,
    FailureReason.DATA: ExitCode.DATA,
    FailureReason.PREEMPTED: ExitCode.PREEMPTED,
    FailureReason.TIMEOUT: ExitCode.TIMEOUT,
    FailureReason.CAPACITY: ExitCode.UNAVAILABLE,
    FailureReason.QUOTA: ExitCode.DISK_FULL,
    FailureReason.IMAGE: ExitCode.CONFIG,
    FailureReason.PERMISSION: ExitCode.PERMISSION,
    FailureReason.INFRASTRUCTURE: ExitCode.UNAVAILABLE,
    FailureReason.UNKNOWN: ExitCode.UNEXPECTED,
}


class RunNotFound(TrainyardError):
    def __init__(self, message: str, *, hint: str = "`trainyard runs` lists what there is") -> None:
        super().__init__(message, hint=hint, code=ExitCode.NOT_FOUND)


class RunCancelled(TrainyardError):
    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint, code=ExitCode.CANCELLED)


class MissingExtra(TrainyardError):
    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"the package {package!r} is not installed",
            hint=f"install it: uv sync --extra {extra}   (or: pip install 'trainyard[{extra}]')",
            code=ExitCode.CONFIG,
        )


class ProviderError(TrainyardError):
    exit_code: ClassVar[ExitCode] = ExitCode.UNEXPECTED
    refused: bool = False  # of a submission: the provider has looked at the job and did not create it

    def __init__(self, message: str, *, provider: str = "", run_id: str = "", hint: str = "", code: ExitCode | None = None) -> None:
        super().__init__(message, hint=hint, code=code if code is not None else self.exit_code)
        self.provider = provider
        self.run_id = run_id


class TerminalError(ProviderError):
    pass


class ConfigError(TerminalError):
    exit_code = ExitCode.CONFIG


class AuthError(TerminalError):
    exit_code = ExitCode.PERMISSION


class QuotaError(TerminalError):
    exit_code = ExitCode.DISK_FULL


class PlanChanged(TerminalError):
    exit_code = ExitCode.CONFIG


class JobNotFound(TerminalError):
    exit_code = ExitCode.NOT_FOUND


class JobFailed(TerminalError):
    def __init__(self, message: str, *, reason: FailureReason, provider: str = "", run_id: str = "", hint: str = "") -> None:
        super().__init__(message, provider=provider, run_id=run_id, hint=hint, code=REASON_EXITS[reason])
        self.reason = reason


class ResultMissing(TerminalError):
    exit_code = ExitCode.RESULT_MISSING


class TransientError(ProviderError):
    exit_code = ExitCode.UNAVAILABLE


class RateLimited(TransientError):
    pass


class ServiceUnavailable(TransientError):
    pass


def is_transient(exc: object) -> bool:
    """Whether the same call may succeed later: a provider says so, or a store does not answer, after its own patience."""
    return isinstance(exc, TransientError) or (isinstance(exc, TrainerError) and exc.code is ExitCode.UNAVAILABLE)
