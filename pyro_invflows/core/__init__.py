"""What every layer and structure is made of; knows no family.

The structures are imported here, so that the door knows each of them.
"""

from pyro_invflows.core import chain, inverted, reinterpreted

__all__ = ["chain", "inverted", "reinterpreted"]
