"""`--quick` and `--thorough` are settings of search and data, and what is set by name wins over them."""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse

import pytest
from optimum.commands.register.regcache_base import resolve_recipe
from optimum.commands.register.register_regcache import QuantizeCommand

from optimum_regcache import Recipe, RegCacheConfig, SearchConfig
from optimum_regcache.config.effects import require_search_effect
from optimum_regcache.config.efforts import EFFORTS
from optimum_regcache.config.recipe import DataConfig


def resolved(*options: str) -> Recipe:
    parser = argparse.ArgumentParser(exit_on_error=False)
    QuantizeCommand.parse_args(parser)
    args = parser.parse_args(["--output", "out", *options])
    return resolve_recipe(args, args.preset[0] if args.preset else None)


@pytest.mark.parametrize("name", EFFORTS)
@pytest.mark.parametrize("methods", [(), ("gptq",)])
def test_every_setting_of_an_effort_arrives_where_it_has_an_effect(name: str, methods: tuple[str, ...]) -> None:
    recipe = Recipe(RegCacheConfig(methods=methods)).with_effort(name)
    for section, values in EFFORTS[name].items():
        for field, value in values.items():
            wanted = False if field == "retune" and not methods else value
            assert getattr(getattr(recipe, section), field) == wanted
    require_search_effect(recipe.search, recipe.quantization)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_refinements_that_cannot_be_made_are_left_out() -> None:
    assert Recipe().with_effort("thorough").search.refinements == ("replace", "late_deletion")
    for deletion, left in (({"fill": "none"}, ("late_deletion",)), ({"action": "late"}, ("replace",))):
        assert Recipe(RegCacheConfig(deletion=deletion)).with_effort("thorough").search.refinements == left
    nothing = Recipe(search=SearchConfig(max_delete=0)).with_effort("thorough")
    assert nothing.search.refinements == ()
    own = Recipe(search=SearchConfig(refinements=("tuned",))).with_effort("thorough")
    assert own.search.refinements == ("tuned",)


def test_efforts_change_nothing_but_search_and_data() -> None:
    for name in EFFORTS:
        recipe = Recipe(model="m", notes="n").with_effort(name)
        assert recipe.quantization == Recipe().quantization
        assert (recipe.model, recipe.notes) == ("m", "n")
    quick, thorough = Recipe().with_effort("quick"), Recipe().with_effort("thorough")
    assert quick.data.num_samples < DataConfig().num_samples < thorough.data.num_samples
    assert quick.search.max_delete < SearchConfig().max_delete < thorough.search.max_delete


def test_what_a_recipe_sets_stays() -> None:
    recipe = Recipe(search=SearchConfig(max_delete=7), data=DataConfig(num_samples=33)).with_effort("thorough")
    assert (recipe.search.max_delete, recipe.data.num_samples) == (7, 33)
    assert recipe.search.sensitivity == "linear"
    single = Recipe(search=SearchConfig(strategy="single_token")).with_effort("quick")
    assert single.search.blocks_before == SearchConfig().blocks_before  # single tokens are those of one block
    given = Recipe(search=SearchConfig(sensitive_block=3)).with_effort("thorough")
    assert given.search.sensitivity == SearchConfig().sensitivity


def test_what_the_command_line_sets_stays_defaults_too() -> None:
    recipe = resolved("--quick", "--num-samples", "256", "--set", "search.max_delete=10")
    assert (recipe.data.num_samples, recipe.search.max_delete) == (256, 10)
    assert recipe.search.num_copies == (1.0, 4.0)
    assert resolved("--thorough", "--method", "gptq").search.retune
    assert not resolved("--thorough").search.retune
    assert resolved() == Recipe()


def test_efforts_are_refused_where_they_do_nothing() -> None:
    with pytest.raises(ValueError, match=r"Unknown effort 'slow'; expected one of quick, thorough"):
        Recipe().with_effort("slow")
    with pytest.raises(
        ValueError, match=r"The effort 'quick' has no effect: nothing is searched with registers\.mode='none'"
    ):
        resolved("--quick", "--no-registers")
    with pytest.raises(argparse.ArgumentError, match="not allowed with argument"):
        resolved("--quick", "--thorough")
