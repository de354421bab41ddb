"""From a config as given to one that is ready: what methods set, what they take with them, what they look for again."""

from __future__ import annotations

from typing import Any

import pytest
from test_methods import config, every_pipeline

from optimum_regcache.methods import resolve, without_methods


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"rewrites": {"rotation": True}},
            r"rewrites\.rotation=True has no effect: methods set it, and none of those given",
        ),
        (
            {"rewrites": {"register_neurons": ["0:1"]}},
            r"rewrites\.register_neurons=\['0:1'\] has no effect: methods set it",
        ),
        (
            {"activations": {"mlp_out_hadamard": True}},
            r"activations\.mlp_out_hadamard=True has no effect: methods set it",
        ),
        ({"activations": {"outlier_tokens": "per_token"}}, r"activations\.outlier_tokens='per_token' has no effect"),
        (
            {"activations": {"observer": "mse"}},
            r"observer='mse' has no effect: the method rtn sets it to 'minmax'",
        ),
    ],
)
def test_what_other_methods_set_is_refused(parts: Any, message: str) -> None:
    """A saved recipe whose methods are edited: rewrites and forms belong to the methods that set them."""
    with pytest.raises(ValueError, match=message + r".*choose other methods than \['rtn'\]\."):
        resolve(config(["rtn"], **parts))


@every_pipeline
def test_methods_take_with_them_what_they_set(pipeline: Any) -> None:
    plain = config([])
    assert without_methods(resolve(config(pipeline)).config) == plain


def test_what_a_method_found_before_is_looked_for_again() -> None:
    found = config(["mixed_precision"], modules={"mixed_precision": ["mlp.fc2"]})
    assert resolve(found).config.modules.mixed_precision == ()
