import re

import pytest

from hf_turboquant import TurboQuantConfig
from hf_turboquant.config import PRESETS


def test_bits_default_to_nbits():
    assert (TurboQuantConfig().key_bits, TurboQuantConfig().value_bits) == (4, 4)
    config = TurboQuantConfig(nbits=3, value_bits=2)
    assert (config.key_bits, config.value_bits) == (3, 2)
    config = TurboQuantConfig(nbits=3.0, key_bits=8.0)
    assert [(bits, type(bits)) for bits in (config.nbits, config.key_bits, config.value_bits)] == [
        (3, int),
        (8, int),
        (3, int),
    ]


def test_half_bits_are_one_more_for_the_keys():
    for nbits, of_both in ((2.5, (3, 2)), (3.5, (4, 3))):
        config = TurboQuantConfig(nbits=nbits)
        assert (config.nbits, config.key_bits, config.value_bits) == (nbits, *of_both)
        assert isinstance(config.key_bits, int) and isinstance(config.value_bits, int)
    assert TurboQuantConfig(nbits=2.5, key_bits=8).value_bits == 2
    assert TurboQuantConfig(nbits=3.5, value_bits=2).key_bits == 4


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_keys_and_values_have_widths_of_their_own(bits):
    for name, other in (("key_bits", "value_bits"), ("value_bits", "key_bits")):
        config = TurboQuantConfig(**{name: bits})
        assert (getattr(config, name), getattr(config, other)) == (bits, 4)
    assert (TurboQuantConfig(nbits=bits).key_bits, TurboQuantConfig(nbits=bits).value_bits) == (bits, bits)


@pytest.mark.parametrize("bits", (0, 1, 5, 6, 7, 9, 16, -2, 1.5, 2.25, 4.5, 7.5, True, "4", None, [4], float("nan")))
def test_other_widths_say_which_there_are(bits):
    advice = "Take the nearest of them, or `DynamicCache` for full precision."
    messages = {
        "nbits": f"`nbits` must be 2, 2.5, 3, 3.5, 4 or 8, got {bits!r}. {advice}",
        "key_bits": f"`key_bits` must be 2, 3, 4 or 8, got {bits!r}. {advice}",
        "value_bits": f"`value_bits` must be 2, 3, 4 or 8, got {bits!r}. {advice}",
    }
    for name, message in messages.items():
        # without a width of its own a role has that of both
        if bits is None and name != "nbits":
            continue
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            TurboQuantConfig(**{name: bits})


@pytest.mark.parametrize("name", ("key_bits", "value_bits"))
def test_keys_or_values_alone_have_whole_bits(name):
    with pytest.raises(ValueError, match=f"`{name}` must be 2, 3, 4 or 8, got 2.5"):
        TurboQuantConfig(**{name: 2.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_estimator": "prod"}, r"`key_estimator` must be one of \('qjl', 'rescaled', 'mse'\), got 'prod'"),
        ({"value_estimator": "qjl"}, "`value_estimator` must be one of"),
        ({"sketch": "sparse"}, "`sketch` must be one of"),
        ({"rotation": None}, "`rotation` must be one of"),
        ({"backend": "cuda"}, "`backend` must be one of"),
        ({"residual_length": -1}, "`residual_length` must be an integer from 0"),
        ({"sink_length": "4"}, "`sink_length` must be an integer from 0"),
        ({"skip_layers": 3}, "`skip_layers` must be a sequence of layer indices, got 3"),
        ({"skip_layers": (0.5,)}, "`skip_layers` must be an integer"),
    ],
)
def test_wrong_options_say_what_must_hold(options, message):
    with pytest.raises(ValueError, match=message):
        TurboQuantConfig(**options)


def test_presets():
    assert TurboQuantConfig.from_preset("small") == TurboQuantConfig(nbits=2)
    assert TurboQuantConfig.from_preset("small", value_bits=3, residual_length=64).value_bits == 3
    bits = {name: (c.key_bits, c.value_bits) for name in PRESETS for c in [TurboQuantConfig.from_preset(name)]}
    assert bits == {"quality": (4, 4), "balanced": (3, 3), "small": (2, 2), "cautious": (8, 4), "paper": (4, 4)}
    paper = TurboQuantConfig.from_preset("paper", nbits=2)
    assert (paper.condition, paper.residual_length, paper.sink_length) == ("none", 0, 0)
    assert (paper.key_estimator, paper.value_estimator) == ("qjl", "mse")
    assert (paper.key_bits, paper.value_bits, paper.sketch, paper.rotation) == (2, 2, "gaussian", "haar")
    with pytest.raises(ValueError, match=r"`preset` must be one of \('cautious', .*'paper'\), got 'fast'"):
        TurboQuantConfig.from_preset("fast")
    with pytest.raises(ValueError, match=r"`preset` must be one of .*, got TurboQuantConfig\.$"):
        TurboQuantConfig.from_preset(TurboQuantConfig())


def test_a_misspelt_option_names_the_nearest():
    with pytest.raises(ValueError, match="got `residual_lenght`. Did you mean `residual_length`?"):
        TurboQuantConfig(residual_lenght=3)
    with pytest.raises(ValueError, match="got `nbit`. Did you mean `nbits`?"):
        TurboQuantConfig.from_preset("small", nbit=3)
