"""What a run must know of a pass before it runs: what its sites are, what happens to them later."""

from __future__ import annotations

from collections.abc import Callable

from weft.graph.site import Leaf, Site, is_inside

from .sites import Signature, SiteSignature


class Later:
    """The signatures of a block, one for each invoke and step, as a run asks them (`Told`).

    `whole_of` gives one that knows all operations that the graph names. It is there for a
    generation: what an operation gives may be a part of the cache, which a later step changes.
    """

    def __init__(
        self,
        signature_of: Callable[[Site], Signature],
        whole_of: Callable[[Site], Signature] | None = None,
    ) -> None:
        self._signature_of = signature_of
        self._whole_of = whole_of

    def __call__(self, site: Site, leaf: Leaf) -> bool:
        """Whether the model changes a leaf's tensor in place after the site has fired."""
        if self._whole_of is not None and is_inside(site.port):
            return True
        found = self.site(site)
        return found is not None and leaf in found.overwritten

    def site(self, site: Site) -> SiteSignature | None:
        """What a site looks like; None where it is not known."""
        try:
            return self._signature_of(site).site(site.path, site.port, site.call)
        except LookupError:
            return None

    def singles(self, site: Site) -> frozenset[str]:
        """The modules that are called exactly once in the pass, or the step, of a site."""
        return self._signature_of(site).singles

    def inside(self, site: Site) -> dict[str, int]:
        """How often each module, and each operation inside a forward, is called inside the call
        that this is the output of."""
        whole_of = self._whole_of or self._signature_of
        return whole_of(site).inside(site.path, site.call, site.port)


Overwritten = Later


def overwritten_by(*signatures: Signature) -> Later:
    """What a run is told: one signature for each invoke."""
    return Later(lambda site: signatures[site.invoke])
