"""The loopback backend: what a server does with a request, in this process; all but the network.

The request becomes bytes; what was read from them is checked, priced and drawn as a checker and a
worker do; the result becomes bytes, and its tensors are read from these. An error too arrives as
what is left of it after the journey.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from weft.engine.admit import admit
from weft.engine.draw import draw, overwritten_by
from weft.engine.known import Known
from weft.engine.merging import merger_of
from weft.engine.opened import open_submit
from weft.engine.stepping import sharer_of
from weft.errors import WeftError
from weft.settings import Settings, load
from weft.wire import frames
from weft.wire.messages import ErrorReport, Limits, Submit, ValueEvent, decode, encode
from weft.wire.reports import error_of, report_of, run_error
from weft.wire.results import encode_result

from .backend import Reply, Request
from .remote import print_line
from .results import moved, opened
from .travel import constant_file, pack
from .values import heard

REQUEST_ID = "local"


class LoopbackBackend:
    """Draws graphs through the module that `loaded()` gives, as a server would."""

    def __init__(self, known: Callable[[], Known], loaded: Callable[[], torch.nn.Module]) -> None:
        self._known = known
        self._loaded = loaded

    def run(self, request: Request) -> Reply:
        known = self._known()
        parcel = pack(request, known.family)
        data = encode(parcel.submit(REQUEST_ID, REQUEST_ID, known.fingerprint))
        uploaded = {digest: constant_file(tensor) for digest, tensor in parcel.large.items()}
        told = _Told(request)
        try:
            result = self._serve(data, uploaded, known, told)
        except _Left as left:
            raise left.error from None  # whoever listens has raised it
        except Exception as error:  # noqa: BLE001, as a worker does: each becomes a report
            raise _after_the_journey(error) from None
        manifest, saved = opened(result)
        up = len(data) + sum(map(len, uploaded.values()))
        return Reply(moved(saved, request.device), manifest.ended, {}, up, len(result))

    def _serve(
        self, data: bytes, uploaded: dict[str, bytes], known: Known, told: Callable[..., None]
    ) -> bytes:
        """From the bytes of a request to those of a result."""
        submit = decode(data, Submit)
        limits = limits_of(load())
        job = open_submit(submit, lambda digest: frames.read(uploaded[digest])[0]["x"], known)
        admit(job.graph, job.call, known, limits, submit.strict, job.further, job.sampling)
        drawn = draw(
            self._loaded(),
            job,
            overwritten=overwritten_by(known, *job.calls, graph=job.graph, sampling=job.sampling),
            merger=merger_of(known),
            sharer=sharer_of(known),
            tokenizer=known.tokenizer,
            limits=limits,
            strict=submit.strict,
            on_log=print_line,
            on_value=told,
        )
        return encode_result(drawn.manifest, drawn.frames)


class _Left(BaseException):
    """What whoever listens has raised: no error of the run."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


class _Told:
    """Hands values on, read from the bytes in which they would travel."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def __call__(self, event: ValueEvent) -> None:
        event = decode(encode(event, "json"), ValueEvent, "json")
        try:
            heard(event, self._request.listen, self._request.device)
        except BaseException as error:  # noqa: BLE001 (it is raised again)
            raise _Left(error) from None


def _after_the_journey(error: Exception) -> WeftError:
    """What is left of an error when it arrives."""
    if not isinstance(error, WeftError):
        error = run_error(error, line=getattr(error, "weft_line", None))
    return error_of(decode(encode(report_of(error)), ErrorReport))


def limits_of(settings: Settings) -> Limits:
    """The limits of one request, as a server publishes them."""
    return Limits(**{name: getattr(settings, name) for name in Limits.__struct_fields__})
