"""PLACEHOLDER, to be replaced by the test-time register work in progress."""


def find_register_neurons(*args, **kwargs):
    raise NotImplementedError


register_cache_from_neurons = zero_register_neurons = find_register_neurons


def set_register_neurons(model, neurons):
    return None
