"""The RegCache search: sensitivity, mining, and the choice of registers and deletion."""

from optimum_regcache.search.mining import MinedTokens, mine_tokens
from optimum_regcache.search.search import RegisterSearch, SearchResult, Setup, Trial
from optimum_regcache.search.sensitivity import SensitivityReport, scan_sensitivity
from optimum_regcache.search.workbench import Workbench

__all__ = [
    "MinedTokens",
    "RegisterSearch",
    "SearchResult",
    "SensitivityReport",
    "Setup",
    "Trial",
    "Workbench",
    "mine_tokens",
    "scan_sensitivity",
]
