"""Base classes, structures and distributions, independent of any family of layers.

The structures are imported here so that :func:`~pyro_invflows.core.foreign.as_bijection` knows all of them.
"""

from pyro_invflows.core import chain, inverted, reinterpreted

__all__ = ["chain", "inverted", "reinterpreted"]
