"""Log-determinants of ``I + J`` for a contraction's Jacobian J: exact, truncated, or estimated without bias."""

from pyro_invflows.logdet.base import LogDet
from pyro_invflows.logdet.exact import Exact
from pyro_invflows.logdet.series import PowerSeries, RussianRoulette

__all__ = ["Exact", "LogDet", "PowerSeries", "RussianRoulette"]
