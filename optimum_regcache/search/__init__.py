"""The RegCache search: sensitivity, mining, and the choice of registers and deletion."""

from optimum_regcache.search.block_copies import CopiesTrial, tune_copies
from optimum_regcache.search.check import FitCheck, check_fit
from optimum_regcache.search.mining import MinedTokens, mine_tokens
from optimum_regcache.search.scores import TrialScores
from optimum_regcache.search.search import Candidates, Judges, RegisterSearch, SearchResult
from optimum_regcache.search.sensitivity import SensitivityReport, scan_sensitivity
from optimum_regcache.search.setups import Setup, Space, Trial
from optimum_regcache.search.trials import TrialRunner
from optimum_regcache.search.tuning import TuningRecord, TuningSettings, tune_registers

__all__ = [
    "Candidates",
    "CopiesTrial",
    "FitCheck",
    "Judges",
    "MinedTokens",
    "RegisterSearch",
    "SearchResult",
    "SensitivityReport",
    "Setup",
    "Space",
    "Trial",
    "TrialRunner",
    "TrialScores",
    "TuningRecord",
    "TuningSettings",
    "check_fit",
    "mine_tokens",
    "scan_sensitivity",
    "tune_copies",
    "tune_registers",
]
