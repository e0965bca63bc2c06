"""The operations on codes: arguments are checked here, and only here."""

import torch

from ..quantizer import Quantizer
from ..storage import TokenBuffer
from . import reference


def quantize(states: torch.Tensor, quantizer: Quantizer, buffer: TokenBuffer) -> None:
    """
    Quantises `states` and appends the codes to `buffer` in place; earlier codes are not touched.

    Args:
        states (`torch.Tensor`): fp32, fp16 or bf16, of shape `[batch, heads, tokens, head_dim]`.
        quantizer (`Quantizer`): the constants; made `buffer` by `new_buffer`.
        buffer (`TokenBuffer`): grows if need be.

    Raises:
        `ValueError`: `states` does not fit the quantizer or the buffer. The buffer is left as it was.
    """
    expected = (*buffer["scales"].shape[:2], quantizer.head_dim)
    if states.dim() != 4 or (*states.shape[:2], states.shape[3]) != expected or not states.is_floating_point():
        raise ValueError(
            f"`states` must be a floating-point tensor of shape [{expected[0]}, {expected[1]}, tokens, {expected[2]}], "
            f"got {states.dtype} of shape {list(states.shape)}."
        )
    buffer.reserve(buffer.length + states.shape[2])
    before = buffer.length
    try:
        reference.quantize(states, quantizer, buffer)
    except BaseException:
        # codes beyond the length don't count, so putting it back undoes whatever was written
        buffer.length = before
        raise


def dequantize(buffer: TokenBuffer, quantizer: Quantizer, out: torch.Tensor) -> None:
    """
    Writes all tokens of `buffer`, dequantised, to `out`.

    Args:
        out (`torch.Tensor`): of shape `[batch, heads, buffer.length, head_dim]`, any floating-point dtype; may be a
            view. Vectors too large for its dtype become inf.

    Raises:
        `ValueError`: `out` has another shape.
    """
    expected = (*buffer["scales"].shape[:2], buffer.length, quantizer.head_dim)
    if tuple(out.shape) != expected:
        raise ValueError(f"`out` must be of shape {list(expected)}, got {list(out.shape)}.")
    reference.dequantize(buffer, quantizer, out)
