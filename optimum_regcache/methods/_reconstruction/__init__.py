"""Weights and scales trained block by block: what the presets of `optimum_regcache.methods.reconstruction` are made of."""
