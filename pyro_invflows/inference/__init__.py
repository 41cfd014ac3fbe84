"""Variational inference with flows: objectives, and what a guide stands on."""

from pyro_invflows.inference.elbo import PathELBO

__all__ = ["PathELBO"]
