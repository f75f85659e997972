"""What a model does to a tensor after its site has fired: what a run must know of signatures."""

from __future__ import annotations

from collections.abc import Callable

from weft.graph.site import Leaf, Site

from .signature import Signature

Overwritten = Callable[[Site, Leaf], bool]


def overwritten_by(*signatures: Signature) -> Overwritten:
    """Whether the model changes a leaf's tensor in place after the site has fired.

    One signature for each invoke.
    """

    def told(site: Site, leaf: Leaf) -> bool:
        try:
            signature = signatures[site.invoke]
            return leaf in signature.site(site.path, site.port, site.call).overwritten
        except LookupError:
            return False

    return told
