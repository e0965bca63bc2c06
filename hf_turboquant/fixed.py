"""FixedTokens: the tokens of a layer of fixed capacity, whose decode step needs nothing from the host."""

from collections.abc import Callable
from copy import copy

import torch

from . import ops
from .arena import describe, new_arena, open_arena
from .plans import Plans
from .quantizer import ROLES, Quantizer
from .states import LayerStates
from .storage import SlotBuffer
from .tokens import Tokens

# Attributes that are views of the arena and are made again with it.
_VIEWS = {"states", "quantizers", "codes", "exact", "plans"}


class FixedTokens(Tokens):
    """
    Like [`Tokens`], with a capacity of `config.max_cache_len` tokens in one tensor, the arena, which stays where it is.

    Steps of one or a few tokens do the same work at every length and read both lengths from device memory, so that
    `torch.compile` and CUDA graphs can hold them, and eager steps need not wait for the device. `length` and
    `quantized` are as of the last [`measure`]; `most_tokens` bounds the length at any time.

    Until keys are conditioned, all tokens are in the exact slots, `config.held_length` besides the sinks.

    Args:
        config (`TurboQuantConfig`): must have a `max_cache_len`.
        layer_idx (`int`): index of the layer in the model; seeds its rotations.
    """

    # The memory, a description of its contents, and views of it.
    arena: torch.Tensor | None = None
    description: str | None = None
    states: LayerStates | None = None
    # Whether tokens were stored. Early initialisation makes the memory before there are any.
    has_tokens: bool = False
    # Whether keys are not conditioned yet, and all tokens are exact.
    waits: bool = False
    # How many tokens steps may fill without asking: the capacity or, as long as keys wait, the exact slots.
    step_room: int = 0
    # Upper bound of the number of tokens: includes steps since the length was last fetched.
    most_tokens: int = 0
    # Whether `announce` has already counted the tokens of the next step.
    announced: bool = False

    def forgotten(self) -> "FixedTokens":
        """No tokens, in the same memory."""
        empty = FixedTokens(self.config, self.layer_idx)
        empty.arena, empty.description, empty.states = self.arena, self.description, self.states
        return empty

    def open(self, states: dict[str, torch.Tensor], waits: bool) -> None:
        """As [`Tokens.open`]; takes the memory of the previous sequence where it fits."""
        device = states["keys"].device
        description = describe(self.config, self.layer_idx, states["keys"], states["values"])
        if self.arena is None or (self.description, self.arena.device) != (description, device):
            # Free the old memory first.
            self.arena = self.states = self.description = None
            self.arena, self.description = new_arena(description, device), description
        self.waits = waits
        self._view()
        ops.warm(self.states)

    def _view(self) -> None:
        """Makes views of the arena, as one without tokens."""
        if self.states is None:
            # Views that serve outside of inference mode too.
            with torch.inference_mode(False):
                self.states = open_arena(self.arena, self.description)
            self.states.plans = Plans()
        sinks, ring = self.config.sink_length, self.config.held_length
        self.codes = {role: buffer.snapshot() for role, buffer in self.states.codes.items()}
        self.exact = SlotBuffer.over(self.states.exact, block=1, length=0, sinks=sinks, ring=ring)
        self.quantizers, self.plans, self.checked = self.states.quantizers, Plans(), None
        self.window = ring if self.waits else self.config.residual_length
        self.length = self.quantized = 0

    def __getstate__(self) -> dict:
        # Copies of views would not be views of the copied arena.
        state = {name: value for name, value in vars(self).items() if name not in _VIEWS}
        return {**state, "lengths": (self.length, self.quantized) if self.codes else None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        lengths, self.states = vars(self).pop("lengths"), None
        self.quantizers, self.codes, self.exact, self.plans = {}, {}, None, Plans()
        if self.arena is not None:
            with torch.inference_mode(False):
                # What is copied in inference mode cannot be written to outside of it.
                self.arena = self.arena.clone() if self.arena.is_inference() else self.arena
            torch._dynamo.mark_static_address(self.arena)
        if lengths is not None:
            self._view()
            self.length, self.quantized = lengths

    @property
    def nbytes(self) -> int:
        """Bytes allocated, without the mean and scale, which count as constants."""
        keys = self.quantizers.get("keys")
        constants = () if keys is None else (keys.mean, keys.scale)
        return 0 if self.arena is None else self.arena.nbytes - sum(t.nbytes for t in constants if t is not None)

    def step(self, key_states: torch.Tensor, value_states: torch.Tensor) -> LayerStates:
        """Appends a few tokens, for which there must be room; returns what attention reads."""
        ops.append(self.states, key_states, value_states)
        self.count(key_states.shape[2])
        return copy(self.states)

    def is_capturing(self) -> bool:
        """Whether steps are being captured, and do not run."""
        return self.arena.is_cuda and torch.cuda.is_current_stream_capturing()

    def count(self, tokens: int) -> None:
        """Updates the upper bound after a step of `tokens` was launched."""
        if not self.is_capturing():
            self.most_tokens += 0 if self.announced else tokens
            self.announced = False

    def announce(self, tokens: int) -> None:
        """Counts the tokens of the next step in advance."""
        self.most_tokens += tokens
        self.announced = True

    def may_lack_room(self, tokens: int) -> bool:
        """Whether a step of `tokens` that was not announced may lack room, as far as the bound tells."""
        return not self.announced and self.most_tokens + tokens > self.step_room and not self.is_capturing()

    def measure(self) -> None:
        """Fetches the lengths from the device: steps update only the copy there."""
        # Without tokens, the lengths on the device are still those of the previous sequence.
        if self.has_tokens:
            states = self.states.measured()
            self.length, self.quantized = states.kv_len, states.quantized
            self.most_tokens, self.announced, self.has_tokens = states.kv_len, False, states.kv_len > 0

    def write_lengths(self) -> None:
        """Writes the lengths to the device."""
        capacity = self.config.max_cache_len
        self.most_tokens, self.announced, self.has_tokens = self.length, False, self.length > 0
        self.step_room = min(self.sinks + self.exact.ring, capacity) if self.waits else capacity
        for index, length in enumerate((self.length, self.quantized, self.window)):
            self.states.counters[..., index] = length

    def stop_waiting(self) -> None:
        """From now on only the recent tokens are exact."""
        self.waits, self.window = False, self.config.residual_length

    def keep_condition(self, keys: Quantizer | None) -> None:
        """Writes the mean and scale of `keys` to the arena; `None` stands for zero and one, which change nothing."""
        self.quantizers = self.states.quantizers
        held = self.quantizers["keys"]
        if held.mean is not None:
            held.mean.copy_(keys.mean) if keys and keys.mean is not None else held.mean.zero_()
            held.scale.copy_(keys.scale) if keys and keys.scale is not None else held.scale.fill_(1)

    def frozen(self) -> LayerStates:
        """A copy of all tokens for attention: compiled steps write to the arena without running any Python here."""
        if not self.has_tokens:
            self.write_lengths()
        return open_arena(self.arena.clone(), self.description).measured()

    def crop(self, length: int) -> None:
        """Keeps the first `length` tokens, exact or quantized as they are."""
        super().crop(length)
        self.write_lengths()

    def emptied(self) -> "FixedTokens":
        """The same memory without tokens; from now on only sinks and recent ones are exact."""
        twin = self.snapshot()
        twin.length = 0
        twin.stop_waiting()
        return twin

    def replaced_by(self, tokens: Tokens, outdate: Callable[[], None]) -> "FixedTokens":
        """Copies `tokens` to the arena, or to a new one if they have another batch size or dtype."""
        held, keys = self.snapshot(), self.states.quantizers["keys"]
        held.description = describe(self.config, self.layer_idx, *tokens.exact.tensors.values())
        if held.description != self.description:
            # Before `outdate`, because memory may run out.
            held.arena, held.states = new_arena(held.description, self.arena.device), None
        outdate()
        held._view()
        if held.arena is not self.arena:
            held.keep_condition(keys)
        for role in ROLES:
            held.exact[role].copy_(tokens.exact[role])
            for name, tensor in held.codes[role].tensors.items():
                tensor.copy_(tokens.codes[role][name])
        held.length, held.quantized = tokens.length, tokens.quantized
        held.write_lengths()
        return held
