"""Every argument of every C++ operator is checked: nothing may be read or written outside a tensor, whatever comes in."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from optimum_regcache.kernels import native, onednn

REASON = native.unavailable_reason()
CHOSEN = native.library()
needs_native = pytest.mark.skipif(REASON is not None, reason=f"C++ operators: {REASON}")
BLOCKS = CHOSEN is not None and CHOSEN.blocks
NAN, INFINITE = float("nan"), float("inf")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantize() -> dict[str, Any]:
    return {"x": numbers(3, 20), "inverse": 9.0, "zero_point": 100, "highest": 255}


def layer_norm_quantize() -> dict[str, Any]:
    return {**quantize(), "weight": numbers(20), "bias": numbers(20), "eps": 1e-5}


def attention() -> dict[str, Any]:
    """Two images, five tokens, three heads of eight channels, two register rows."""
    q, k, v = numbers(2, 5, 72).chunk(3, -1)
    return {
        "q": q, "k": k, "v": v, "register_key": numbers(3, 2, 8), "register_value": numbers(3, 2, 8), "heads": 3,
        "scaling": 0.3, "logit_bias": 0.7, "inverse": 9.0, "zero_point": 100, "highest": 255,
    }  # fmt: skip


def delete_tokens() -> dict[str, Any]:
    return {"x": numbers(2, 10, 6), "lead": 1, "count": 2}


def restore_tokens() -> dict[str, Any]:
    """A grid of 3 x 3 after one leading token; tokens 3 and 7 are gone."""
    dropped = torch.zeros(2, 10, dtype=torch.bool)
    dropped[:, [3, 7]] = True
    kept = torch.tensor([0, 1, 2, 4, 5, 6, 8, 9]).repeat(2, 1)
    return {"x": numbers(2, 8, 6), "kept": kept, "dropped": dropped, "lead": 1, "rows": 3, "columns": 3}


def linear() -> dict[str, Any]:
    codes = torch.randint(-128, 128, (11, 7), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    return {
        "codes": torch.full((2, 3, 7), 99, dtype=torch.uint8), "scale": 0.05, "zero_point": 100,
        "packed": onednn.panels(codes), "weight_scale": numbers(11).abs(), "bias": numbers(11), "other": numbers(2, 3, 11),
        "out_scale": 0.1, "out_zero": 30, "as_codes": False, "post": "gelu", "algorithm": "tanh",
    }  # fmt: skip


def block() -> dict[str, Any]:
    """Four images of five tokens with 16 channels, two heads, 24 hidden channels."""
    shapes = ((48, 16), (16, 16), (24, 16), (16, 24))
    codes = [torch.full(shape, 3, dtype=torch.int8) for shape in shapes]
    return {
        "x": numbers(4, 5, 16), "norms": [numbers(16, seed=i) for i in range(4)], "eps": [1e-5, 1e-5],
        "packed": [torch.ops.onednn.qlinear_prepack(c, None) for c in codes],
        "scales": [torch.full((out,), 1e-3) for out, _ in shapes],
        "zeros": [torch.zeros(out, dtype=torch.int64) for out, _ in shapes],
        "biases": [numbers(out) for out, _ in shapes], "input_scales": [0.02] * 4, "input_zeros": [120] * 4,
        "inverses": [50.0] * 4, "hidden_scale": 0.02, "hidden_zero": 10, "post": "gelu", "algorithm": "none",
        "register_key": numbers(2, 1, 8), "register_value": numbers(2, 1, 8), "heads": 2, "scaling": 0.3,
        "logit_bias": 0.0,
    }  # fmt: skip


CODES: list[tuple[str, Any, str]] = [
    *(
        ("inverse", bad, f"`inverse` must be positive and finite, got {text}")
        for bad, text in ((-1.0, "-1"), (NAN, "nan"), (INFINITE, "inf"), (1e39, r"1e\+39"))
    ),
    ("highest", 0, "`highest` must be between 1 and 255, got 0"),
    ("highest", 256, "`highest` must be between 1 and 255, got 256"),
    ("zero_point", -1, "`zero_point` must be between 0 and 255, got -1"),
    ("zero_point", 256, "`zero_point` must be between 0 and 255, got 256"),
]
REGISTERS: list[tuple[str, Any, str]] = [
    ("register_key", None, "`register_key` and `register_value` must both be given or both be None, got only `register_value`"),
    ("register_value", None, "`register_key` and `register_value` must both be given or both be None, got only `register_key`"),
    ("register_key", lambda t: t.double(), "`register_key` must have dtype Float, got Double"),
    ("register_value", lambda t: t.half(), "`register_value` must have dtype Float, got Half"),
    ("register_key", lambda t: t[0], "`register_key` must have 3 axes, got shape"),
    ("register_key", lambda t: t[:, :, :-1], r"`register_key` must have shape \[\d, \d, 8\], got \[\d, \d, 7\]"),
    ("register_value", lambda t: t[1:], r"`register_value` must have shape \[\d, \d, 8\], got \[\d, \d, 8\]"),
    ("register_key", lambda t: numbers(t.shape[0], 17, 8), "at most 16 register rows, got 17"),
    ("scaling", INFINITE, "`scaling` must be finite, got inf"),
    ("logit_bias", NAN, "`logit_bias` must be finite, got nan"),
]  # fmt: skip
OPERATORS: list[tuple[Callable[[], dict[str, Any]], list[tuple[str, Any, str]]]] = [
    (
        quantize,
        [
            *CODES,
            ("x", lambda t: t.double(), "`x` must have dtype Float, got Double"),
            ("inverse", 0.0, "`inverse` must be positive and finite, got 0"),
        ],
    ),
    (
        layer_norm_quantize,
        [
            *CODES,
            ("x", lambda t: t.bfloat16(), "`x` must have dtype Float, got BFloat16"),
            ("x", torch.tensor(1.0), "`x` must have an axis to normalise, got a single number"),
            ("weight", lambda t: t[:19], r"`weight` must have shape \[20\], got \[19\]"),
            ("weight", lambda t: t.double(), "`weight` must have dtype Float, got Double"),
            ("bias", lambda t: t[:1], r"`bias` must have shape \[20\], got \[1\]"),
            ("bias", lambda t: t.half(), "`bias` must have dtype Float, got Half"),
            ("eps", -1e-5, "`eps` must be at least 0 and finite, got -1e-05"),
            ("eps", NAN, "`eps` must be at least 0 and finite, got nan"),
        ],
    ),
    (
        attention,
        [
            *CODES,
            *REGISTERS,
            ("q", lambda t: t[0], "`q` must have 3 axes, got shape"),
            ("q", lambda t: t.double(), "`q` must have dtype Float, got Double"),
            ("k", lambda t: t.double(), "`k` must have dtype Float, got Double"),
            ("k", lambda t: t[:, :4], r"`k` must have shape \[2, 5, 24\], got \[2, 4, 24\]"),
            ("v", lambda t: t[:1], r"`v` must have shape \[2, 5, 24\], got \[1, 5, 24\]"),
            ("k", lambda t: t.contiguous(), r"`k` must have the strides of `q`, \[360, 72, 1\], got \[120, 24, 1\]"),
            ("v", lambda t: t.contiguous(), r"`v` must have the strides of `q`, \[360, 72, 1\], got \[120, 24, 1\]"),
            ("q", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "the last stride of `q` must be 1, got 5"),
            ("q", lambda t: numbers(1, 1, 1).expand(1, 65537, 24), "`q` may have 65536 tokens at most, got 65537"),
            ("heads", 0, "`heads` must be a positive divisor of the last axis of `q`, 24, got 0"),
            ("heads", -3, "`heads` must be a positive divisor of the last axis of `q`, 24, got -3"),
            ("heads", 5, "`heads` must be a positive divisor of the last axis of `q`, 24, got 5"),
            ("q", numbers(1, 4, 432), "head_dim must be at most 128, got 144"),
        ],
    ),
    (
        delete_tokens,
        [
            ("x", lambda t: t.double(), "`x` must have dtype Float, got Double"),
            ("x", lambda t: t[0], "`x` must have 3 axes, got shape"),
            ("x", lambda t: t[:, :, :0], "`x` must have channels, got shape"),
            ("lead", -1, "`lead` must be between 0 and 10, got -1"),
            ("lead", 11, "`lead` must be between 0 and 10, got 11"),
            ("count", 0, "`count` must be at least 1 and at most half of the 9 patches, got 0"),
            ("count", 5, "`count` must be at least 1 and at most half of the 9 patches, got 5"),
            ("count", 2**62, "`count` must be at least 1 and at most half of the 9 patches"),
        ],
    ),
    (
        restore_tokens,
        [
            ("x", lambda t: t.double(), "`x` must have dtype Float, got Double"),
            ("x", lambda t: t[0], "`x` must have 3 axes, got shape"),
            ("x", lambda t: t[:, :, :0], "`x` must have channels, got shape"),
            ("x", lambda t: t[:, :7], r"`kept` must have shape \[2, 7\], got \[2, 8\]"),
            ("kept", lambda t: t[:1], r"`kept` must have shape \[2, 8\], got \[1, 8\]"),
            ("kept", lambda t: t.int(), "`kept` must have dtype Long, got Int"),
            ("kept", lambda t: t + 1, "of image 0 entry 0 must be 0, got 1"),
            (
                "kept",
                lambda t: t.where(t != 9, 10),
                "`kept` must be the ascending positions .* entry 7 must be 9, got 10",
            ),
            ("kept", lambda t: t.where(t != 9, 2**40), f"entry 7 must be 9, got {2**40}"),
            ("kept", lambda t: t.where(t != 0, -1), "among 10; of image 0 entry 0 must be 0, got -1"),
            ("kept", lambda t: t.flip(1), "of image 0 entry 0 must be 0, got 9"),
            ("dropped", lambda t: t.int(), "`dropped` must have dtype Bool, got Int"),
            ("dropped", lambda t: t[:1], r"`dropped` must have shape \[2, 10\], got \[1, 10\]"),
            ("dropped", lambda t: t[0], "`dropped` must have 2 axes, got shape"),
            ("dropped", lambda t: t & False, "entry 3 must be 3, got 4"),
            (
                "dropped",
                lambda t: t | (torch.arange(10) == 9),
                "as many positions as `dropped` leaves, 7 for image 0, got 8",
            ),
            ("lead", -1, "`lead` must be between 0 and 10, got -1"),
            ("rows", 0, "`rows` must be between 1 and 10, got 0"),
            ("columns", 2**40, "`columns` must be between 1 and 10, got"),
            ("columns", 4, r"`lead` \+ `rows` \* `columns` must be the 10 tokens of `dropped`, got 1 \+ 3 \* 4"),
        ],
    ),
    (
        linear,
        [
            ("codes", lambda t: t.char(), "`codes` must have dtype Byte, got Char"),
            (
                "codes",
                lambda t: t[:, :, :0],
                r"`codes` must have 1 to 65536 values in the last axis, got shape \[2, 3, 0\]",
            ),
            ("codes", torch.tensor(3, dtype=torch.uint8), r"`codes` must have 1 to 65536 values in the last axis"),
            ("codes", lambda t: t[:, :, :5], "`packed` must have 96 bytes for 5 inputs and 11 outputs, got 128"),
            ("scale", 0.0, "`scale` must be positive and finite, got 0"),
            ("zero_point", 256, "`zero_point` must be between 0 and 255, got 256"),
            ("packed", lambda t: t.float(), "`packed` must have dtype Char, got Float"),
            ("packed", lambda t: t[:-1], "`packed` must have 128 bytes for 7 inputs and 11 outputs, got 127"),
            ("packed", lambda t: t.view(8, 16), "`packed` must have 1 axes, got shape"),
            ("packed", lambda t: t.repeat(2)[::2], r"`packed` must be contiguous, got strides \[2\]"),
            ("weight_scale", lambda t: t.double(), "`weight_scale` must have dtype Float, got Double"),
            (
                "weight_scale",
                lambda t: numbers(17),
                "`packed` must have 256 bytes for 7 inputs and 17 outputs, got 128",
            ),
            ("bias", lambda t: t[:5], r"`bias` must have shape \[11\], got \[5\]"),
            ("bias", lambda t: t.double(), "`bias` must have dtype Float, got Double"),
            ("other", lambda t: t[:1], r"`other` must have shape \[2, 3, 11\], got \[1, 3, 11\]"),
            ("other", lambda t: t.double(), "`other` must have dtype Float, got Double"),
            ("as_codes", True, "`other` is added to real numbers, got as_codes=True"),
            ("out_scale", 0.0, "`out_scale` must be positive and finite, got 0"),
            ("out_zero", -1, "`out_zero` must be between 0 and 255, got -1"),
            ("post", "tanh", "`post` must be one of none, relu, swish, gelu, got 'tanh'"),
            ("algorithm", "erf", "`algorithm` of gelu must be none or tanh, got 'erf'"),
        ],
    ),
    (
        block,
        [
            *REGISTERS,
            ("x", lambda t: t[0], "`x` must have 3 axes, got shape"),
            ("x", lambda t: t.double(), "`x` must have dtype Float, got Double"),
            (
                "x",
                lambda t: t[:, :, :8],
                r"`packed\[0\]` must have shape \[8, 48\] for `x` of shape .*, got \[16, 48\]",
            ),
            *(
                (name, lambda old: old[:1], rf"`{name}` must have {2 if name == 'eps' else 4} entries, got 1")
                for name in (
                    "norms",
                    "eps",
                    "packed",
                    "scales",
                    "zeros",
                    "biases",
                    "input_scales",
                    "input_zeros",
                    "inverses",
                )
            ),
            ("norms", lambda old: [*old[:3], old[3][:9]], r"`norms\[3\]` must have shape \[16\], got \[9\]"),
            ("eps", [NAN, 1e-5], "`eps` must be at least 0 and finite, got nan"),
            ("eps", [1e-5, -1.0], "`eps` must be at least 0 and finite, got -1"),
            (
                "packed",
                lambda old: [torch.ones(16, 48, dtype=torch.int8), *old[1:]],
                r"`packed\[0\]` must be an int8 weight",
            ),
            (
                "packed",
                lambda old: [old[0], old[2], *old[2:]],
                r"`packed\[1\]` must have shape \[16, 16\] .*got \[16, 24\]",
            ),
            (
                "packed",
                lambda old: [*old[:2], old[1], old[3]],
                r"`packed\[2\]` must have shape \[16, 24\] .*got \[16, 16\]",
            ),
            ("packed", lambda old: [*old[:3], old[2]], r"`packed\[2\]` must have shape \[16, 16\] .*got \[16, 24\]"),
            ("scales", lambda old: [old[0][:7], *old[1:]], r"`scales\[0\]` must have shape \[48\], got \[7\]"),
            ("scales", lambda old: [old[0].double(), *old[1:]], r"`scales\[0\]` must have dtype Float, got Double"),
            (
                "scales",
                lambda old: [torch.ones(96)[::2], *old[1:]],
                r"`scales\[0\]` must be contiguous, got strides \[2\]",
            ),
            ("zeros", lambda old: [*old[:3], old[3].int()], r"`zeros\[3\]` must have dtype Long, got Int"),
            ("zeros", lambda old: [*old[:3], old[3][:1]], r"`zeros\[3\]` must have shape \[16\], got \[1\]"),
            (
                "zeros",
                lambda old: [*old[:3], old[3][:1].expand(16)],
                r"`zeros\[3\]` must be contiguous, got strides \[0\]",
            ),
            ("biases", lambda old: [old[0], old[1][:3], *old[2:]], r"`biases\[1\]` must have shape \[16\], got \[3\]"),
            ("biases", lambda old: [old[0], old[1].half(), *old[2:]], r"`biases\[1\]` must have dtype Float, got Half"),
            (
                "biases",
                lambda old: [old[0][:1].expand(48), *old[1:]],
                r"`biases\[0\]` must be contiguous, got strides \[0\]",
            ),
            ("input_scales", [1.0, 0.0, 1.0, 1.0], r"`input_scales\[1\]` must be positive and finite, got 0"),
            ("input_zeros", [0, 0, 256, 0], r"`input_zeros\[2\]` must be between 0 and 255, got 256"),
            ("inverses", [1.0, 1.0, 1.0, NAN], r"`inverses\[3\]` must be positive and finite, got nan"),
            ("hidden_scale", INFINITE, "`hidden_scale` must be positive and finite, got inf"),
            ("hidden_zero", 300, "`hidden_zero` must be between 0 and 255, got 300"),
            ("post", "tanh", "`post` must be one of none, relu, swish, gelu, got 'tanh'"),
            ("algorithm", "", "`algorithm` of gelu must be none or tanh, got ''"),
            ("heads", 0, r"`heads` must be a positive divisor of the 16 inputs of `packed\[1\]`, got 0"),
            ("heads", 3, r"`heads` must be a positive divisor of the 16 inputs of `packed\[1\]`, got 3"),
        ],
    ),
]
HERE = [(make, cases) for make, cases in OPERATORS if make is not (linear if BLOCKS else block)]
EVERY = [(make, *case) for make, cases in HERE for case in cases]


def call(make: Callable[[], dict[str, Any]], **changes: Any) -> Any:
    """The operator named like ``make`` with its arguments, some of them changed."""
    return getattr(torch.ops.regcache, make.__name__)(**{**make(), **changes})


@needs_native
@pytest.mark.parametrize(
    ("make", "name", "change", "message"), EVERY, ids=lambda value: getattr(value, "__name__", None)
)
def test_bad_arguments(make: Callable[[], dict[str, Any]], name: str, change: Any, message: str) -> None:
    good = make()[name]
    with pytest.raises(RuntimeError, match=rf"regcache::\w+: .*{message}"):
        call(make, **{name: change(good) if callable(change) else change})


@needs_native
@pytest.mark.parametrize("make", [make for make, _ in HERE], ids=lambda make: make.__name__)
def test_every_argument_has_a_case(make: Callable[[], dict[str, Any]]) -> None:
    """The arguments that the cases start from are good, and none of the operator's is left out."""
    call(make)
    schema = getattr(torch.ops.regcache, make.__name__).default._schema
    assert {argument.name for argument in schema.arguments} == set(make())
    assert set(make()) == {name for name, _, _ in dict(HERE)[make]}


@needs_native
def test_vectors_need_not_be_contiguous() -> None:
    """Strides are not ignored: a transposed view or a slice gives what its copy gives."""
    wide = numbers(20, 2).T
    strided = {"weight": wide[0], "bias": wide[1]}
    expected = call(layer_norm_quantize, **{name: t.contiguous() for name, t in strided.items()})
    assert torch.equal(call(layer_norm_quantize, **strided), expected)
    registers = {name: numbers(2, 3, 8).transpose(0, 1) for name in ("register_key", "register_value")}
    expected = call(attention, **{name: t.contiguous() for name, t in registers.items()})
    assert torch.equal(call(attention, **registers), expected)
    if not BLOCKS:
        scale = numbers(22).abs()[::2]
        assert torch.equal(call(linear, weight_scale=scale), call(linear, weight_scale=scale.contiguous()))


@needs_native
def test_tensors_without_elements() -> None:
    assert call(quantize, x=numbers(0, 5)).shape == (0, 5)
    assert call(quantize, x=torch.tensor(1.0)).shape == ()
    assert call(layer_norm_quantize, x=numbers(0, 20)).shape == (0, 20)
    for shape in ((0, 5, 24), (2, 0, 24)):
        q = numbers(*shape)
        assert call(attention, q=q, k=q, v=q).shape == shape
    none = {"register_key": numbers(3, 0, 8), "register_value": numbers(3, 0, 8)}
    assert torch.equal(call(attention, **none), call(attention, register_key=None, register_value=None))
    if BLOCKS:
        assert call(block, x=numbers(0, 5, 16)).shape == (0, 5, 16)
        assert call(block, x=numbers(2, 0, 16)).shape == (2, 0, 16)


def test_no_operator_without_checks() -> None:
    """Every operator of the sources has its cases here."""
    found = set()
    for source in Path(native.__file__).parent.glob("*.cpp"):
        found |= set(re.findall(r'm\.impl\("(\w+)"', source.read_text()))
    assert found == {make.__name__ for make, _ in OPERATORS}
