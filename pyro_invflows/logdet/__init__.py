"""Log-determinants of ``I + J``, where J is the Jacobian of a contraction: exact, truncated, or unbiased estimates."""

from pyro_invflows.logdet.base import LogDet
from pyro_invflows.logdet.exact import Exact
from pyro_invflows.logdet.series import PowerSeries, RussianRoulette

__all__ = ["Exact", "LogDet", "PowerSeries", "RussianRoulette"]
