"""Tokens: the keys and values that a layer holds, and where each of them is."""

from collections.abc import Callable
from functools import lru_cache

import torch

from . import ops
from .config import TurboQuantConfig
from .handle import QuantizedStates, plain
from .packing import BLOCK, check_head_dim
from .plans import Plans
from .quantizer import ROLES, Quantizer
from .states import LayerStates
from .storage import SlotBuffer, TokenBuffer, reserve_all

# In a layer that grows, keys wait for enough different tokens until there are more than this many besides sinks.
MAX_WAITING_TOKENS = 512


class Tokens:
    """
    The keys and values of one layer: the first `exact.sinks` and the last `window` tokens exact, in slots, and codes of
    all between. When a token is stored and when keys are conditioned is for the layer to decide. The memory, which
    [`open`] makes, grows.

    Args:
        config (`TurboQuantConfig`): options of the cache.
        layer_idx (`int`): index of the layer in the model; seeds its rotations.
    """

    def __init__(self, config: TurboQuantConfig, layer_idx: int):
        self.config, self.layer_idx = config, layer_idx
        # By role; empty until there is memory.
        self.quantizers: dict[str, Quantizer] = {}
        self.codes: dict[str, TokenBuffer] = {}
        self.exact: SlotBuffer | None = None
        # How many tokens there are, and how many recent ones stay exact, at most `exact.ring`.
        self.length = self.window = 0
        self.plans = Plans()
        # Shapes, dtypes and devices of the last states that fitted.
        self.checked: tuple | None = None

    def forgotten(self) -> "Tokens":
        """The same without tokens and memory."""
        return Tokens(self.config, self.layer_idx)

    def open(self, states: dict[str, torch.Tensor], waits: bool) -> None:
        """
        Makes memory for states of shape `[batch, heads, tokens, head_dim]`, by role, without storing any. If keys wait
        to be conditioned, as `waits` tells, all tokens are exact.
        """
        keys, kinds = states["keys"], tuple((x.dtype, (x.shape[3],)) for x in states.values())
        window = max(self.config.held_length, MAX_WAITING_TOKENS) if waits else self.config.residual_length
        made = _opened(self.config, self.layer_idx, *keys.shape[:2], kinds, keys.device, window)
        # Other layers get `made` too: conditioning keys and loading tokens must change copies.
        vars(self).update(vars(made.snapshot()), quantizers=dict(made.quantizers), plans=Plans())

    @property
    def quantized(self) -> int:
        """Number of tokens in codes."""
        return self.codes["keys"].length if self.codes else 0

    @quantized.setter
    def quantized(self, length: int) -> None:
        for buffer in self.codes.values():
            buffer.length = length

    @property
    def sinks(self) -> int:
        """Number of first tokens that stay exact."""
        return self.exact.sinks

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(buffer.nbytes for buffer in (*self.codes.values(), self.exact) if buffer is not None)

    def check(self, states: dict, device: torch.device | None) -> bool:
        """
        Whether new states, by role, are plain tensors of the dtypes of those held.

        Args:
            device (`torch.device`, *optional*): where they must be; `None` where there is no memory yet.

        Raises:
            `ValueError`: they don't fit one another, or cannot follow those held.
        """
        keys, values, layer_idx = states["keys"], states["values"], self.layer_idx
        if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor):
            given = keys.shape, values.shape, keys.dtype, values.dtype, keys.device, values.device
            given += type(keys), type(values)
            if given == self.checked:
                return True
        for role, new in states.items():
            if not isinstance(new, torch.Tensor) or new.dim() != 4 or not new.is_floating_point():
                got = f"{new.dtype} of shape {list(new.shape)}" if isinstance(new, torch.Tensor) else new
                raise ValueError(
                    f"`{role[:-1]}_states` must be a floating-point tensor of shape [batch, num_key_value_heads, "
                    f"tokens, head_dim], got {got} at layer {layer_idx}."
                )
        if keys.shape[:3] != values.shape[:3] or keys.device != values.device:
            raise ValueError(
                "`key_states` and `value_states` must agree in batch, heads, tokens and device, got "
                f"{list(keys.shape)} {keys.device} and {list(values.shape)} {values.device} at layer {layer_idx}."
            )
        if self.exact is None:
            for new in states.values():
                check_head_dim(new.shape[3])
            return True
        for role, new in states.items():
            held = self.exact[role]
            expected, got = (*held.shape[:2], held.shape[3], device), (*new.shape[:2], new.shape[3], new.device)
            if expected != got:
                raise ValueError(
                    f"`{role[:-1]}_states` must keep the batch size, heads, head_dim and device of the cached tokens, "
                    f"{expected}, got {got} at layer {layer_idx}. Use a new cache or `reset()` for another batch, and "
                    "`batch_repeat_interleave` or `batch_select_indices` to change the batch of this one."
                )
        if any(new.dtype != self.exact[role].dtype or isinstance(new, QuantizedStates) for role, new in states.items()):
            return False
        # Steps have the same shapes: the next one can skip the check.
        self.checked = given
        return True

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if self.exact is not None and torch.is_inference_mode_enabled():
            # Tensors copied in inference mode cannot be written to outside of it.
            vars(self).update(vars(self.mapped(torch.clone)))

    def are_coded_after(self, tokens: int) -> bool:
        """Whether there are codes once this many more tokens have come."""
        return self.quantized > 0 or self.length + tokens > self.sinks + self.window

    def whole(self, role: str) -> torch.Tensor:
        """All tokens, as long as none is quantized; shares memory."""
        return self.exact[role][:, :, : self.length]

    def parts(self) -> dict[str, dict]:
        """
        Views of all that is held, by role: under `"exact"`, runs of exact tokens after an empty one, which has their
        dtype and shape; under their names, the tensors of codes, in whole blocks.
        """
        sinks, recent = min(self.sinks, self.length), self.sinks + self.quantized
        runs = [slice(0), *self.exact.runs(0, sinks), *self.exact.runs(recent, self.length)]
        return {
            role: {
                "exact": [self.exact[role][:, :, run] for run in runs],
                **{name: tensor[:, :, : -(-buffer.length // buffer.block)] for name, tensor in buffer.tensors.items()},
            }
            for role, buffer in self.codes.items()
        }

    def resize(self, length: int, quantized: int) -> None:
        """Makes room for `length` tokens, `quantized` of them codes; undefined until all [`parts`] are written."""
        slots = min(length, self.sinks + self.exact.ring)
        self.exact.reserve(slots, limit=slots)
        for buffer in self.codes.values():
            buffer.reserve(quantized, limit=quantized)
        self.length, self.quantized = length, quantized

    def followed_by(self, states: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
        """The first `count` tokens, which are exact, and then new ones, in memory of their own."""
        if not count:
            return {role: new.clone(memory_format=torch.contiguous_format) for role, new in states.items()}
        return {role: torch.cat([self.exact[role][:, :, :count], states[role]], dim=2) for role in ROLES}

    def append(self, states: dict[str, torch.Tensor]) -> None:
        """Writes new tokens to the exact slots, and quantizes what leaves them."""
        before, after = self.length, self.length + states["keys"].shape[2]
        first, last = self.sinks + self.quantized, after - self.window
        # Everything that can run out of memory comes first; codes beyond a buffer's length are ignored.
        self.exact.reserve(min(after, self.sinks + self.window), limit=self.sinks + self.exact.ring)
        if last > first:
            leaving = {role: self._leaving(states[role], role, first, last) for role in ROLES}
            parts = ((new, self.quantizers[role], self.codes[role]) for role, new in leaving.items())
            ops.quantize(*parts, backend=self.config.backend)
        for start, stop in ((before, min(after, self.sinks)), (max(before, self.sinks, last), after)):
            if start < stop:
                for role in ROLES:
                    self.exact.write(role, start, states[role][:, :, start - before : stop - before])
        self.length = after

    def _leaving(self, states: torch.Tensor, role: str, start: int, stop: int) -> torch.Tensor:
        """The tokens at positions `start` to `stop`, taken from the recent tokens and then from `states`."""
        pieces = self.exact.pieces(role, start, min(self.length, stop))
        if stop > self.length:
            pieces.append(states[:, :, max(start - self.length, 0) : stop - self.length])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def read(self) -> LayerStates:
        """What attention reads."""
        ring, quantized = self.exact.ring, self.quantized
        return self.read_from(self.exact.tensors, quantized, ring, quantized % ring if ring else 0)

    def read_from(self, exact: dict[str, torch.Tensor], quantized: int, ring: int, phase: int) -> LayerStates:
        """The same with other slots: behind the sinks a ring of `ring` slots, the oldest token at `phase`."""
        return LayerStates(
            self.quantizers, self.codes, exact, self.length, quantized, self.sinks, ring, phase, self.config.backend,
            None, self.plans,
        )  # fmt: skip

    def step(self, key_states: torch.Tensor, value_states: torch.Tensor) -> LayerStates:
        """Appends one token, which pushes at most one out of the recent tokens; returns what attention reads."""
        quantized, exact = self.quantized, self.sinks + self.window
        leaving = self.length + 1 - exact > quantized
        if not leaving:
            self.exact.reserve(min(self.length + 1, exact), limit=exact)
        elif quantized % BLOCK == 0:
            # Buffers grow by whole blocks.
            reserve_all(list(self.codes.values()), quantized + 1)
        states = self.read()
        ops.append(states, key_states, value_states)
        # Reading once more would make a step of a model with many layers measurably slower.
        states.kv_len = self.length = self.length + 1
        if leaving:
            states.quantized = self.quantized = quantized + 1
            states.phase = states.quantized % states.ring if states.ring else 0
        return states

    def measure(self) -> None:
        """Fetches the lengths from the device, if only it has them."""

    def write_lengths(self) -> None:
        """Writes the lengths to the device, if steps read them there."""

    def keep_condition(self, keys: Quantizer | None) -> None:
        """Copies the mean and scale of `keys`, if any, to where steps read them, if that is not there."""

    def count(self, tokens: int) -> None:
        """Counts the tokens of a step that was launched without [`step`]."""

    def may_lack_room(self, tokens: int) -> bool:
        """Whether there may be no room for this many more tokens."""
        return False

    def crop(self, length: int) -> None:
        """Keeps the first `length` tokens, exact or quantized as they are."""
        self.length, self.quantized = length, min(self.quantized, max(length - self.sinks, 0))

    def snapshot(self) -> "Tokens":
        """The same tokens, which do not see what is appended here later."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        twin.codes = {role: buffer.snapshot() for role, buffer in self.codes.items()}
        twin.exact = None if self.exact is None else self.exact.snapshot()
        return twin

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Tokens":
        """The same with `function(tensor)` in place of every tensor (reorder, select, repeat, move)."""
        # Handles returned earlier keep the tensors they read.
        twin = self.snapshot()
        for buffer in (*twin.codes.values(), twin.exact):
            buffer.map(function)
        # Old plans would keep the old buffers alive.
        twin.plans, twin.checked = Plans(), None
        return twin

    def to(self, dtypes: dict[str, torch.dtype]) -> "Tokens":
        """The same with exact tokens in these dtypes, by role."""
        twin = self.snapshot()
        twin.exact.to(dtypes)
        twin.checked = None
        return twin

    def replaced_by(self, tokens: "Tokens", outdate: Callable[[], None]) -> "Tokens":
        """What a layer holds once `tokens`, a copy, replace these; calls `outdate` before anything is overwritten."""
        return tokens

    def emptied(self) -> "Tokens":
        """The same without its tokens, none of which is in codes; from now on only sinks and recent ones are exact."""
        twin, window = self.snapshot(), self.config.residual_length
        twin.length, twin.window = 0, window
        if window != twin.exact.ring:
            twin.exact.ring = window
            twin.exact.map(lambda tensor: tensor.new_empty((*tensor.shape[:2], 0, tensor.shape[3])))
        return twin

    def in_one_dtype(self, states: dict[str, torch.Tensor]) -> tuple["Tokens", dict[str, torch.Tensor]]:
        """
        These tokens and new states, as plain tensors: keys in the wider of their two dtypes, as `torch.cat` would make
        them, and values likewise.
        """
        held = {role: self.exact[role].dtype for role in ROLES}
        dtypes = {role: torch.promote_types(held[role], states[role].dtype) for role in ROLES}
        states = {role: plain(new) if isinstance(new, QuantizedStates) else new for role, new in states.items()}
        states = {role: new.to(dtypes[role]) for role, new in states.items()}
        return self if dtypes == held else self.to(dtypes), states


# Requests are alike, and making buffers for every layer of each takes a noticeable part of a short prompt's time.
@lru_cache(maxsize=1024)
def _opened(config: TurboQuantConfig, layer_idx: int, batch: int, heads: int, kinds, device, window: int) -> Tokens:
    """Tokens with empty buffers; `kinds` are the dtype and `(head_dim,)` of keys and of values."""
    made = Tokens(config, layer_idx)
    for role, (_, (head_dim,)) in zip(ROLES, kinds, strict=True):
        made.quantizers[role] = Quantizer.create(config, role, layer_idx, head_dim, device)
        made.codes[role] = made.quantizers[role].new_buffer(batch, heads)
    shapes = dict(zip(ROLES, kinds, strict=True))
    made.exact, made.window = SlotBuffer(shapes, batch, heads, device, config.sink_length, window), window
    return made
