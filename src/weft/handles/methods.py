"""`fn=`: blocks whose pass is a call of another method of the model than its forward.

    with model.trace(image, fn="encode"):           # net.encode(image)
        h = model.encoder.layers[2].output.save()
        z = model.output.save()                     # what the method returns

Such a block is one of a twin of the handle: with the same modules, weights and edits, and with
signatures of its own. What the method is given is given to it as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from weft.client.local import LocalBackend
from weft.engine.known import Known
from weft.errors import InputError, UnknownOptionError
from weft.families.any_module import prepare_any
from weft.families.call import ModelCall
from weft.families.rooted import Rooted, method_of
from weft.signatures.signature import Signatures
from weft.trace.lines import user_line, where

from .edits import twin
from .weights import Fingerprints, Weights
from .where import InPlaces, Place, Places

if TYPE_CHECKING:
    from .handle import Handle


class _PlacesOfMethods(Places):
    """A server runs a model's forward, and no other of its methods."""

    method = ""

    def _server(self, asked: Any) -> Place:
        raise UnknownOptionError(
            f"fn={self.method!r}: a server runs the forward of its models, and no other method",
            fix="run the block here: remote=False, or 'local'",
        )

    def _decided(self) -> Place:
        return self._said(self._local, f"fn={self.method!r}, which no server runs")


def by_method(handle: Handle, given: Any) -> Handle:
    """The twin whose blocks call this method (its name, or the method itself)."""
    if given is None:
        return handle
    try:
        name = _name(handle, given)
    except UnknownOptionError as error:
        raise error.at(where(user_line()))  # noqa: B904 (it is the same error)
    if name is None:
        return handle
    known = handle._methods
    if name not in known:
        known[name] = _parts(handle, name)
    parts = known[name]
    parts["_weights"].follow()
    other = twin(handle)
    other.__dict__.update(parts)
    return other


def _name(handle: Handle, given: Any) -> str | None:
    if handle._is_served:
        raise UnknownOptionError(
            f"fn={given!r}: this model came from a server as data, which runs its forward and no "
            "other method",
            fix="open the model here, without remote=",
        )
    return method_of(handle._weights.skeleton(), given)


class _Weights(Weights):
    """Those of the model, whenever they come."""

    def __init__(self, weights: Weights, method: str) -> None:
        self._whole = weights
        self._method = method
        super().__init__(Rooted(weights.skeleton(), method))
        self._of = weights.skeleton()

    @property
    def are_loaded(self) -> bool:
        return self._whole.are_loaded

    def loaded(self) -> Any:
        self._whole.loaded()
        self.follow()
        return self._module

    def follow(self) -> None:
        """Takes over what has changed on the model: its weights may have come, its mode too."""
        net = self._whole.skeleton()
        if net is not self._of:
            self._module, self._of = Rooted(net, self._method), net
        self._module.training = net.training


def _parts(handle: Handle, name: str) -> dict[str, Any]:
    """What the twin has of its own."""
    weights = _Weights(handle._weights, name)
    signatures = Signatures(weights.skeleton, weights.loaded, state=weights.state)
    fingerprints = Fingerprints(weights)

    def known() -> Known:
        skeleton, mark = weights.skeleton(), fingerprints.now()
        return Known(skeleton, signatures, family="plain", fingerprint=mark, root=name)

    places = _PlacesOfMethods(
        InPlaces("plain", handle._wanted, known, weights.loaded),
        LocalBackend(weights.loaded),
        handle._places.default,
    )
    places.method = name
    is_plain = "_batch_dim" in handle.__dict__
    dim = handle._batch_dim if is_plain else None
    return {
        "_method": name,
        "_weights": weights,
        "_signatures": signatures,
        "_fingerprints": fingerprints,
        "_family": "plain",
        "_places": places,
        "_known": known,
        "_prepare": lambda inputs, options: prepare_any(inputs, options, dim or 0),
        "_is_empty": lambda inputs, options: not inputs and not options,
        "_takes_nothing": True,
        "_merger": lambda: None,
        "_together": handle._together if is_plain else _refuse(name),
    }


def _refuse(name: str) -> Callable[..., ModelCall]:
    def together(calls: list[ModelCall], options: dict[str, Any]) -> ModelCall:
        raise InputError(
            f"an empty invoke shows the inputs of all others as one batch, and what {name!r} is "
            "given has no rows that are known",
            fix="use a block for each input",
        )

    return together
