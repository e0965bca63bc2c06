"""Layers of static capacity, whose decode step needs nothing from the host."""

from collections.abc import Callable
from copy import copy

import torch
from transformers.cache_utils import StaticSlidingWindowLayer

from . import ops
from .arena import describe, new_arena, open_arena
from .conditioning import NOT_CONDITIONED
from .config import TurboQuantConfig
from .handle import handles
from .layer import TurboQuantLayer
from .plans import Plans
from .quantizer import ROLES
from .states import LayerStates
from .storage import SlotBuffer
from .tokens import Tokens
from .traced import TracedStates, append, seq_length

# Attributes that are views of the arena and are made again with it.
_VIEWS = {"states", "tokens", "step"}

# Most tokens of a step: one token of a compiled model, or those that a draft proposes.
STEP_TOKENS = 16

_NOT_COMPILED = (
    "Only steps of a few tokens without gradients are compiled over a cache with `max_cache_len`, after a prefill that "
    "was not and whose attention has run: `generate` does so. Leave `fullgraph=True` out for others."
)


class TurboQuantStaticLayer(TurboQuantLayer):
    """
    Like [`TurboQuantLayer`], with a capacity of `config.max_cache_len` tokens, allocated at once and kept by `reset`.

    Steps of one or a few tokens do the same work at every length and read both lengths from device memory, so that
    `torch.compile` and CUDA graphs can hold them, and eager steps need not wait for the device. All other updates use
    the base class, which needs the lengths on the host. Between them `most_tokens` is an upper bound on the host:
    callers that replay a graph must call `count`, and `measure` fetches the exact lengths. No step may come before the
    first prompt is stored.

    Tokens wait to be learned from in the exact slots, of which there are `config.held_length` beside the sinks. Before
    a step that no longer fits there, the host conditions keys; the step itself is the same before and afterwards.

    Args:
        config (`TurboQuantConfig`): must have a `max_cache_len`.
        layer_idx (`int`): index of the layer in the model; seeds its rotations.
    """

    # Repeated here because guards of a compiled step check it, and looking up an inherited attribute takes longer than
    # all other checks.
    is_sliding = False
    # The memory, and a description of its contents.
    arena: torch.Tensor | None = None
    description: str | None = None
    states: LayerStates | None = None
    # Whether tokens were stored. Early initialisation makes the memory before there are any.
    has_tokens: bool = False
    # Most tokens that steps may fill without asking: the capacity or, as long as keys wait, the exact slots.
    step_room: int = 0
    # Upper bound of the tokens, including those of steps that the length on the host does not include yet.
    most_tokens: int = 0
    # Whether `get_mask_sizes` has already counted the tokens of the next step.
    announced: bool = False
    # Whether the caller promises to call `settle` before a step: none that is compiled or captured can.
    defers: bool = False

    def __init__(self, config: TurboQuantConfig, layer_idx: int):
        self.max_cache_len = config.max_cache_len
        # Attention would read a longer chunk after some of its own tokens have left the window.
        self.step_tokens = max(1, min(STEP_TOKENS, config.residual_length))
        # The torch reference fetches lengths from the device, which a CUDA graph cannot do.
        self.is_compileable = config.backend != "torch"
        super().__init__(config, layer_idx)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, room for {self.max_cache_len:,} tokens)"

    def reset(self) -> None:
        """Forgets all tokens and keeps their memory."""
        super().reset()
        self.has_tokens = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the memory, or reuses the previous sequence's; states have shape `[batch, heads, T, D]`."""
        super().lazy_initialization(key_states, value_states)
        ops.warm(self.states)

    def _new_tokens(self, states: dict[str, torch.Tensor]) -> Tokens:
        description = describe(self.config, self.layer_idx, states["keys"], states["values"])
        if self.arena is None or (self.description, self.arena.device) != (description, self.device):
            # Free the old memory first.
            self.arena = self.states = self.description = None
            self.arena, self.description = new_arena(description, self.device), description
        return self._opened()

    def _opened(self) -> Tokens:
        """Views of the arena, of which no token counts yet."""
        if self.states is None:
            # Views that serve outside of inference mode too.
            with torch.inference_mode(False):
                self.states = open_arena(self.arena, self.description)
            self.states.plans = Plans()
        codes = {role: buffer.snapshot() for role, buffer in self.states.codes.items()}
        sinks, ring = self.config.sink_length, self.config.held_length
        exact = SlotBuffer.over(self.states.exact, block=1, length=0, sinks=sinks, ring=ring)
        window = ring if self.conditioning.waits else self.config.residual_length
        tokens = Tokens(self.states.quantizers, codes, exact, window, self.config.backend, fixed=True)
        tokens.quantized = 0
        return tokens

    def __getstate__(self) -> dict:
        # Copies of views would not be views of the copied arena.
        self._store_deferred()
        return {name: value for name, value in vars(self).items() if name not in _VIEWS}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.tokens = Tokens({}, {}, None, 0, self.config.backend)
        if self.is_initialized:
            with torch.inference_mode(False):
                # What is copied in inference mode cannot be written to outside.
                self.arena = self.arena.clone() if self.arena.is_inference() else self.arena
            torch._dynamo.mark_static_address(self.arena)
            self.tokens = self._opened()
            self.measure()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Like [`TurboQuantLayer.update`]. A step (a few tokens after the first update) returns handles of
        `max_cache_len` tokens; attention ignores those that do not exist yet.

        Raises:
            `ValueError`: as there, or the capacity is used up. The layer is left unchanged.
        """
        step = self.has_tokens and self.pending is None and key_states.shape[2] <= self.step_tokens
        if torch.compiler.is_compiling() and step and not ops.trains(key_states, value_states):
            return self._traced_update(key_states, value_states)
        return self._plain_update(key_states, value_states)

    @torch.compiler.disable(reason=_NOT_COMPILED)
    def _plain_update(self, key_states, value_states) -> tuple[torch.Tensor, torch.Tensor]:
        states = {"keys": key_states, "values": value_states}
        as_held = self.tokens.check(states, self.device, self.layer_idx)
        self.settle()
        tokens = key_states.shape[2]
        if tokens > self.step_tokens or not self.has_tokens:
            self.measure()
            self._check_room(tokens)
            return super().update(key_states, value_states)
        self.find_room(tokens)
        if not as_held:
            states = self._in_one_dtype(states)
        ops.append(self.states, *states.values())
        self.count(tokens)
        self._outdate()
        self.step = copy(self.states)
        held = handles(self.step)
        return self._train(held, key_states, value_states) if ops.trains(key_states, value_states) else held

    def count(self, tokens: int) -> None:
        """
        Updates the bound on the host after a step of `tokens` was launched. Callers that replay a CUDA graph must call
        it, because no Python runs within the graph. Captured steps are not counted: they have not run.
        """
        if self._is_capturing():
            return
        if not self.announced:
            self.most_tokens += tokens
        self.announced = False

    def _is_capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def find_room(self, tokens: int) -> None:
        """
        Checks the capacity before a step that has not been announced: raises a `ValueError` if its tokens do not fit,
        and waits for the exact length only if the bound says that they may not.
        """
        if not self.announced and not self._is_capturing() and self.most_tokens + tokens > self.step_room:
            self.make_room(tokens)

    def make_room(self, tokens: int) -> None:
        """
        Fetches the exact length; raises a `ValueError` if so many tokens more do not fit. Keys that wait to be
        conditioned are, if the exact slots cannot take the tokens.
        """
        self.measure()
        self._check_room(tokens)
        if self.conditioning.waits and self.has_tokens:
            states = {role: self.tokens.whole(role).clone() for role in ROLES}
            with self._all_or_nothing():
                self.conditioning.add_mask(None, *states["keys"].shape[0:3:2])
                self._learn(states, tokens)
            self._write_lengths()

    def _check_room(self, tokens: int) -> None:
        if self.tokens.length + tokens > self.max_cache_len:
            raise ValueError(
                f"A cache with `max_cache_len={self.max_cache_len}` must get no more tokens than that, got "
                f"{tokens} after {self.tokens.length} at layer {self.layer_idx}. Make a larger one, or `reset()` it."
            )

    def _traced_update(self, key_states, value_states) -> tuple[TracedStates, TracedStates]:
        append(self.arena, self.description, key_states, value_states)
        batch, heads = key_states.shape[:2]
        return tuple(
            TracedStates(
                self.arena,
                self.description,
                role,
                (batch, heads, self.max_cache_len, new.shape[3]),
                new.dtype,
                new.device,
            )
            for role, new in (("keys", key_states), ("values", value_states))
        )

    def _store(self, states: dict[str, torch.Tensor], valid: torch.Tensor | None = None) -> None:
        super()._store(states, valid)
        if self.conditioning.waits and self.tokens.length <= self.tokens.sinks:
            self.conditioning.provisional = NOT_CONDITIONED
            self._condition(None, None)
        elif self.conditioning.waits:
            # Whoever replays steps without telling may fill the slots: condition now by the tokens known so far.
            states = {role: self.tokens.whole(role) for role in ROLES}
            keys, self.conditioning.provisional = self.conditioning.apply(self.tokens.quantizers["keys"], states)
            self._condition(keys.mean, keys.scale)
        self._write_lengths()

    def _learn(self, states: dict[str, torch.Tensor], coming: int = 0) -> bool:
        done = super()._learn(states, coming)
        if done:
            keys, self.tokens.quantizers = self.tokens.quantizers["keys"], self.states.quantizers
            self._condition(keys.mean, keys.scale)
        return done

    def _defers(self) -> bool:
        return self.defers and super()._defers()

    def _condition(self, mean: torch.Tensor | None, scale: torch.Tensor | None) -> None:
        """Writes mean and scale to the arena; `None` stands for zero and one, which change nothing."""
        held = self.states.quantizers["keys"]
        if held.mean is not None:
            held.mean.zero_() if mean is None else held.mean.copy_(mean)
            held.scale.fill_(1) if scale is None else held.scale.copy_(scale)

    @torch.compiler.disable(reason=_NOT_COMPILED)
    def measure(self) -> None:
        """Fetches the lengths from the device: steps update only the copy there."""
        if not self.has_tokens:
            # Those on the device are still of the previous sequence.
            return
        states = self.states.measured()
        self.tokens.length, self.tokens.quantized = states.kv_len, states.quantized
        self.most_tokens, self.announced, self.has_tokens = states.kv_len, False, states.kv_len > 0
        if states.quantized and self.conditioning.waits:
            self.conditioning.finish(self.conditioning.provisional)
            self.tokens.window = self.config.residual_length
            self._write_lengths()

    def _write_lengths(self) -> None:
        """Writes the lengths to the device."""
        tokens, capacity = self.tokens, self.max_cache_len
        self.most_tokens, self.announced, self.has_tokens = tokens.length, False, tokens.length > 0
        waits = self.conditioning.waits
        self.step_room = min(tokens.sinks + tokens.exact.ring, capacity) if waits else capacity
        for index, length in enumerate((tokens.length, tokens.quantized, tokens.window)):
            self.states.counters[..., index] = length

    @property
    def condition(self) -> str | None:
        """As [`TurboQuantLayer.condition`], after fetching lengths: a step may have quantized the first token."""
        self.measure()
        return super().condition

    def _held(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.has_tokens:
            self._write_lengths()
        # A copy, because compiled steps write to the arena without any Python.
        return handles(open_arena(self.arena.clone(), self.description).measured())

    def get_seq_length(self) -> int | torch.Tensor:
        """Number of tokens held; once there are any, a tensor on the device, as in transformers' static layers."""
        if not self.has_tokens or self.pending is not None:
            return super().get_seq_length()
        if torch.compiler.is_compiling():
            return seq_length(self.arena, self.description)
        # A copy, because the next step changes the counter.
        return self.states.counters[0, 0, 0].to(torch.int64)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the next update's mask (for a step, the whole capacity), and the position of the first column."""
        self._store_deferred()
        if not self.has_tokens or query_length > self.step_tokens:
            self.measure()
            self._check_room(query_length)
            return super().get_seq_length() + query_length, 0
        if not torch.compiler.is_compiling() and not self._is_capturing():
            # `generate` asks before every compiled step, while the device is idle: waiting for the length would keep it
            # idle for longer.
            self.announced = False
            self.find_room(query_length)
            self.most_tokens += query_length
            self.announced = True
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        """Capacity in tokens."""
        return self.max_cache_len

    @property
    def nbytes(self) -> int:
        """Bytes allocated, without the mean and scale, which count as constants."""
        keys = self.tokens.quantizers["keys"]
        return self.arena.nbytes - sum(t.nbytes for t in (keys.mean, keys.scale) if t is not None)

    def crop(self, tokens_to_remove: int) -> None:
        """As [`TurboQuantLayer.crop`]."""
        if self.is_initialized:
            self.come_to_rest()
            self._outdate()
            super().crop(tokens_to_remove)
            self._write_lengths()

    def come_to_rest(self) -> None:
        """Stores all waiting tokens, and fetches the lengths."""
        super().come_to_rest()
        self.measure()

    def _replace(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._hold(self.tokens.mapped(function))

    def _widen(self, dtypes: dict[str, torch.dtype]) -> None:
        self.measure()
        self._hold(self.tokens.to(dtypes))

    def _hold(self, tokens: Tokens) -> None:
        """Copies `tokens` to its memory, or to new memory if they have another batch size or dtype."""
        held, description = self.tokens, describe(self.config, self.layer_idx, *tokens.exact.tensors.values())
        fits = description == self.description
        # Memory may run out.
        arena = self.arena if fits else new_arena(description, self.device)
        self._outdate()
        if not fits:
            keys = self.states.quantizers["keys"]
            self.arena, self.states, self.description = arena, None, description
            held = self._opened()
            self._condition(keys.mean, keys.scale)
        for role in ROLES:
            held.exact[role].copy_(tokens.exact[role])
            for name, tensor in held.codes[role].tensors.items():
                tensor.copy_(tokens.codes[role][name])
        held.length, held.quantized, held.checked = tokens.length, tokens.quantized, None
        self.tokens = held
        self._write_lengths()

    def offload(self) -> None:
        """Raises a `ValueError`: compiled steps hold the addresses of this memory."""
        raise ValueError(
            "A cache with `max_cache_len` must stay on its device, got a call of `offload`. Leave `max_cache_len` out."
        )


class StaticSlidingLayer(StaticSlidingWindowLayer):
    """
    Like `StaticSlidingWindowLayer`, whose step over a full window makes an index on the host. torch.compile treats that
    as a constant, but a plain CUDA graph cannot copy it to the device.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in the base class; states have shape `[batch, num_key_value_heads, tokens, head_dim]`."""
        full = self.is_initialized and self.cumulative_length_int >= self.max_cache_len
        if torch.compiler.is_compiling() or not full or key_states.shape[2] != 1:
            return super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length_int += 1
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            held.copy_(torch.cat([held[:, :, 1:], new], dim=2))
        return self.keys, self.values
