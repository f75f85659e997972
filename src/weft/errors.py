"""Every exception of Weft.

An error says what was done, what was expected, what was got, where (the user's own line, the
site), and what to do. All derive from `WeftError`; where Python or PyTorch has a fitting class
(`AttributeError` for a wrong path, `TypeError` for a wrong option) the error is one of those too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self


class WeftError(Exception):
    """Base of all errors raised by Weft itself.

    `message` says what happened, `line` is the user's line (`file:line: text`), `fix` the way out.
    """

    code = "weft"

    def __init__(self, message: str, *, line: object = None, fix: str | None = None) -> None:
        self.message = message
        self.line = None if line is None else str(line)
        self.fix = fix
        super().__init__(self._text())

    def _text(self) -> str:
        at = f"\n  at {self.line}" if self.line else ""
        way_out = f"\n  fix: {self.fix}" if self.fix else ""
        return f"{self.message}{at}{way_out}"

    def at(self, line: object) -> Self:
        """This error, with the user's line if it had none: what raised it knew no lines."""
        if self.line is None:
            self.line = str(line)
            self.args = (self._text(),)
        return self


class RecordingError(WeftError):
    """The block contains something that cannot be recorded."""

    code = "recording"


class UnsupportedOperationError(RecordingError, TypeError):
    """A PyTorch function that is not in the closed operation table."""

    code = "unsupported-operation"


class OutsideTraceError(RecordingError):
    """A site was used outside a `with model.trace(...)` block, or on another thread."""

    code = "outside-trace"


class NotSavedError(WeftError, RuntimeError):
    """A value of a finished block was used without having been saved."""

    code = "not-saved"


class FailedRunError(WeftError, RuntimeError):
    """A value of a block whose run failed or did not happen was used."""

    code = "failed-run"


class LateEditError(RecordingError):
    """An edit needs a value that exists only after the edited site has passed."""

    code = "late-edit"


class StaleHandleError(RecordingError):
    """A handle read before another edit of its site was edited."""

    code = "stale-handle"


class ChangedConstantError(RecordingError):
    """A client tensor changed after the block had taken its value."""

    code = "changed-constant"


class ReadOnlyError(RecordingError):
    """An attempt to write into a weight of the model."""

    code = "read-only"


class WriteMismatchError(RecordingError, ValueError):
    """A value written to a site differs from it in structure, shape or kind of dtype; or a result
    that is to be put into a tensor in place does not go into its dtype."""

    code = "write-mismatch"


class GradientError(RecordingError, RuntimeError):
    """A gradient that does not exist: nothing leads from the loss to the value, or not this way."""

    code = "gradient"


class UnknownPathError(WeftError, AttributeError):
    """A module path that the model does not have."""

    code = "unknown-path"


class UnknownOptionError(WeftError, TypeError):
    """An option that is unknown or not supported."""

    code = "unknown-option"


class InputError(WeftError, ValueError):
    """A prompt or model input that cannot be used."""

    code = "input"


class LookError(RecordingError):
    """A number was needed where no look is possible."""

    code = "look"


class GraphError(WeftError, ValueError):
    """A graph breaks the grammar, or does not fit the model or the input."""

    code = "graph"


class SourceError(WeftError, TypeError):
    """The source of a function cannot be read, so no operation inside it can be named."""

    code = "source"


class OtherSourceError(GraphError):
    """A graph names operations inside a function whose source is another one here."""

    code = "other-source"


class GuardError(WeftError, RuntimeError):
    """A guard came out differently: the recording took a branch that this run would not take."""

    code = "guard"


class NotReachedError(WeftError, RuntimeError):
    """A site of the graph did not fire in this run."""

    code = "not-reached"


class EditError(RecordingError):
    """An edit of the model (`model.edit`) that cannot be one, or does not fit an input."""

    code = "edit"


class SiteMismatchError(WeftError, RuntimeError):
    """A site gave another structure, shape or dtype than was recorded."""

    code = "site-mismatch"


class SamplingError(WeftError, RuntimeError):
    """Logits from which no token can be drawn."""

    code = "sampling"


class OverwrittenError(WeftError, RuntimeError):
    """The model changed a tensor in place after it was read, before it was used."""

    code = "overwritten"


class SweepError(WeftError, RuntimeError):
    """Points of a sweep failed. The others' results are kept.

    result: what the sweep would have returned, NaN at failed points; None where all failed.
    failed: the error of each failed point, by name. points: what each other point gave, by name.
    """

    code = "sweep"

    def __init__(
        self,
        message: str,
        *,
        line: object = None,
        fix: str | None = None,
        result: Any = None,
        failed: Mapping[str, Exception] | None = None,
        points: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message, line=line, fix=fix)
        self.result = result
        self.failed = dict(failed or {})
        self.points = dict(points or {})


class SettingError(WeftError, ValueError):
    """A setting that is unknown, or has a value of another kind."""

    code = "setting"


# What a server, or the way to it, adds. Everything above can come from a server too.


class RemoteError(WeftError):
    """Base of what only happens where a request leaves the process."""

    code = "remote"


class ServerAwayError(RemoteError, ConnectionError):
    """No server answers, or it went away and did not come back in time."""

    code = "server-away"


class VersionMismatchError(RemoteError):
    """Client and server have no version of the protocol in common."""

    code = "version-mismatch"


class MessageError(RemoteError, ValueError):
    """A message that cannot be read, or is not what the route takes."""

    code = "message"


class AccessError(RemoteError, PermissionError):
    """No key, a key that is not known, or something that belongs to another one."""

    code = "access"


class NoSuchError(RemoteError, LookupError):
    """A job, result or constant that is not there, or not there any more."""

    code = "no-such"


class WrongModelError(RemoteError):
    """The server does not have this model."""

    code = "wrong-model"


class OtherModelError(RemoteError):
    """The server's model differs from the one recorded on: another tree, or other source code."""

    code = "other-model"


class ModelNotReadyError(RemoteError):
    """The model is on the server, but could not be loaded."""

    code = "model-not-ready"


class LimitError(RemoteError):
    """A limit of the server's; the message names it, its value, and what was asked."""

    code = "limit"


class ResultTooLargeError(LimitError):
    """What the block saves is more than the server lets one job bring back."""

    code = "result-too-large"


class TimeLimitError(LimitError, TimeoutError):
    """The job ran longer than the server lets one job run."""

    code = "time-limit"


class WorkerMemoryError(RemoteError, MemoryError):
    """The worker had not enough memory for the job."""

    code = "worker-memory"


class WorkerLostError(RemoteError):
    """Each worker that had the job died."""

    code = "worker-lost"


class SessionLostError(RemoteError):
    """A session is over, or values that it kept are gone and cannot be made again."""

    code = "session-lost"


class RunError(RemoteError, RuntimeError):
    """PyTorch or the model itself raised an exception while the job ran.

    `kind` is the name of its class. Where Python has that class, the error is one of those too.
    """

    code = "run"

    def __init__(
        self, message: str, *, line: object = None, fix: str | None = None, kind: str = ""
    ) -> None:
        super().__init__(message, line=line, fix=fix)
        self.kind = kind


class CancelledError(RemoteError):
    """The job was cancelled."""

    code = "cancelled"


class NotFinishedError(RemoteError):
    """The job's result was asked for before it was there."""

    code = "not-finished"


class ServerError(RemoteError):
    """A mistake of the server's own. Its log has the details, under the request id."""

    code = "server"


class ResultChangedError(RemoteError):
    """What arrived is not what the server said it would send."""

    code = "result-changed"


class TravelError(RemoteError, TypeError):
    """Something in the request has no form in which it could leave the process."""

    code = "travel"


class EagerWarning(UserWarning):
    """Numbers that `trace(eager=True)` has shown are changed by an edit further down."""


class RemoteLookWarning(UserWarning):
    """A number was needed while recording: the graph so far went to the server for it."""
