"""Registers at run time: the prefix cache, its injection into attention, and token deletion."""

from optimum_regcache.registers.cache import RegisterCache
from optimum_regcache.registers.install import get_register_cache, prepare_tower, set_deletion, set_registers
from optimum_regcache.registers.state import TowerRuntime

__all__ = ["RegisterCache", "TowerRuntime", "get_register_cache", "prepare_tower", "set_deletion", "set_registers"]
