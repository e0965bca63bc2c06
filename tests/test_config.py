import pytest

from hf_turboquant import TurboQuantConfig


def test_bits_default_to_nbits():
    assert (TurboQuantConfig().key_bits, TurboQuantConfig().value_bits) == (4, 4)
    config = TurboQuantConfig(nbits=3, value_bits=2)
    assert (config.key_bits, config.value_bits) == (3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nbits": 16}, "`nbits` must be a number from 1 to 8 in steps of a quarter, got 16. Use `DynamicCache`"),
        ({"key_bits": 0}, "`key_bits` must be a number from 1 to 8 in steps of a quarter, got 0"),
        ({"nbits": 2.6}, "`nbits` must be a number from 1 to 8 in steps of a quarter, got 2.6"),
        ({"nbits": True}, "`nbits` must be a number"),
        ({"key_bits": 1.5}, "at least 2 with `key_estimator='qjl'`"),
        ({"key_bits": 1}, "at least 2 with `key_estimator='qjl'`"),
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


def test_one_bit_keys_without_a_sketch():
    assert TurboQuantConfig(key_bits=1, key_estimator="rescaled").key_bits == 1


def test_presets():
    assert TurboQuantConfig.from_preset("small") == TurboQuantConfig(nbits=2, key_estimator="rescaled")
    assert TurboQuantConfig.from_preset("small", value_bits=3, residual_length=64).value_bits == 3
    paper = TurboQuantConfig.from_preset("paper-2.5")
    assert (paper.condition, paper.residual_length, paper.sink_length) == ("none", 0, 0)
    assert (paper.key_bits, paper.sketch, paper.rotation) == (2.25, "gaussian", "haar")
    with pytest.raises(ValueError, match=r"`preset` must be one of \('quality', .*'paper-3.5'\), got 'fast'"):
        TurboQuantConfig.from_preset("fast")
