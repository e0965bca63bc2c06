"""TurboQuantStaticLayer: a layer of static capacity, whose decode step `torch.compile` and CUDA graphs can take."""

from collections.abc import Callable

import torch

from . import ops
from .arena import describe, new_arena, open_arena
from .layer import ROLES, TurboQuantLayer
from .states import LayerStates, QuantizedStates
from .traced import TracedStates, append, seq_length


class TurboQuantStaticLayer(TurboQuantLayer):
    """
    As [`TurboQuantLayer`], with room for `config.max_cache_len` tokens, taken at once and kept by `reset`.

    Steps of one token do the same work at every length and find both lengths in device memory; all other updates go
    the way of the base class, which needs the lengths on the host.

    Args:
        config (`TurboQuantConfig`): with `max_cache_len`.
        layer_idx (`int`): index of the layer in the model; seeds its rotations.
    """

    is_compileable = True
    # the memory, and what is in it
    arena: torch.Tensor | None = None
    description: str | None = None
    states: LayerStates | None = None
    # what conditioning would come to if the next token were quantised
    provisional: str | None = None

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, room for {self.config.max_cache_len:,} tokens)"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes the memory, or takes it over from the sequence before; states are of shape `[batch, heads, T, D]`."""
        super().lazy_initialization(key_states, value_states)
        description = describe(self.config, self.layer_idx, key_states, value_states)
        if self.arena is None or (self.description, self.arena.device) != (description, self.device):
            self.arena = self.states = None
            self.arena, self.description = new_arena(description, self.device), description
        self._open()
        self.states.counters.zero_()
        ops.warm(self.states)

    def _open(self) -> None:
        self.states = open_arena(self.arena, self.description)
        self.codes = {role: buffer.snapshot() for role, buffer in self.states.codes.items()}
        for buffer in self.codes.values():
            buffer.length = 0
        self.exact.tensors = self.states.exact

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        As [`TurboQuantLayer.update`]. A step of one token after the first ones returns handles of `max_cache_len`
        tokens, of which those that are not there yet must be masked, as transformers does.

        Raises:
            `ValueError`: as there, or there is no room. The layer is left as it was. While `torch.compile` traces: no
                token is there yet, or several come at a time.
        """
        if torch.compiler.is_compiling():
            return self._traced_update(key_states, value_states)
        self._check(key_states, value_states)
        self.settle()
        self._measure()
        tokens, room = key_states.shape[2], self.config.max_cache_len - self.length
        if tokens > room:
            raise ValueError(
                f"A cache with `max_cache_len={self.config.max_cache_len}` must get no more tokens than that, got "
                f"{tokens} after {self.length} at layer {self.layer_idx}. Make a larger one, or `reset()` it."
            )
        if tokens != 1 or not self.is_initialized:
            return super().update(key_states, value_states)
        ops.append(self.states, key_states.detach(), value_states.detach())
        return tuple(QuantizedStates(self.states, role) for role in ROLES)

    def _traced_update(self, key_states, value_states) -> tuple[TracedStates, TracedStates]:
        if not self.is_initialized or self.pending is not None or key_states.shape[2] != 1:
            raise ValueError(
                "Only steps of one token can be compiled, after a prefill that was not and whose attention has run. "
                "`generate` does it so."
            )
        append(self.arena, self.description, key_states, value_states)
        batch, heads = key_states.shape[:2]
        return tuple(
            TracedStates(
                self.arena,
                self.description,
                role,
                (batch, heads, self.config.max_cache_len, new.shape[3]),
                new.dtype,
                new.device,
            )
            for role, new in (("keys", key_states), ("values", value_states))
        )

    def _store(self, states: dict[str, torch.Tensor], valid: torch.Tensor | None = None) -> None:
        super()._store(states, valid)
        if self.condition is None:
            # the next token may be quantised by a compiled step: what is known by then has to do
            energy, none = self.query_energy, self.exact["keys"][:, :, :0]
            self._freeze_condition(none, valid)
            self.provisional, self.condition, self.query_energy = self.condition, None, energy
        self._count()

    def _freeze_condition(self, new_keys: torch.Tensor, valid: torch.Tensor | None) -> None:
        super()._freeze_condition(new_keys, valid)
        conditioned, held = self.quantizers["keys"], self.states.quantizers["keys"]
        if held.mean is not None:
            held.mean.copy_(0 if conditioned.mean is None else conditioned.mean)
            held.scale.copy_(1 if conditioned.scale is None else conditioned.scale)
        self.quantizers = self.states.quantizers

    def _measure(self) -> None:
        """Fetches the lengths from the device: compiled steps change them there alone."""
        if not self.is_initialized:
            return
        states = self.states.measured()
        self.length = states.kv_len
        for role in ROLES:
            self.codes[role].length = states.codes[role].length
        if self.codes["keys"].length and self.condition is None:
            self.condition, self.query_energy = self.provisional, None

    def _count(self) -> None:
        """Writes the lengths to the device."""
        self.states.counters[..., 0] = self.length
        self.states.counters[..., 1] = self.codes["keys"].length

    def _states(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._measure()
        return super()._states()

    def get_seq_length(self) -> int | torch.Tensor:
        """Number of tokens held: as with transformers' static layers in device memory, once there are any."""
        if not self.is_initialized or self.pending is not None:
            return super().get_seq_length()
        if torch.compiler.is_compiling():
            return seq_length(self.arena, self.description)
        # a copy: the next step counts on
        return self.states.counters[0, 0, 0].to(torch.int64)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask of the next update, and the first one's position; all of them for a step of one token."""
        if query_length == 1 and self.is_initialized:
            return self.config.max_cache_len, 0
        self._measure()
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """Tokens that there is room for."""
        return self.config.max_cache_len

    def crop(self, tokens_to_remove: int) -> None:
        """As [`TurboQuantLayer.crop`]."""
        if self.is_initialized:
            self.settle()
            self._measure()
            super().crop(tokens_to_remove)
            self._count()

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if not self.is_initialized:
            return
        self.settle()
        self._measure()
        before = self.states
        parts = [("exact", before.exact), *((role, before.codes[role].tensors) for role in ROLES)]
        mapped = [[(tensors[name], function(tensors[name])) for name in tensors] for _, tensors in parts]
        keys, values = (function(before.exact[role][:, :, :1]) for role in ROLES)
        if keys.shape != before.exact["keys"][:, :, :1].shape:
            # another batch takes other memory
            self.description = describe(self.config, self.layer_idx, keys, values)
            self.arena = new_arena(self.description, self.device)
            lengths = self.codes["keys"].length
            self._open()
            for role in ROLES:
                self.codes[role].length = lengths
            for name in ("mean", "scale"):
                held, old = (getattr(states.quantizers["keys"], name) for states in (self.states, before))
                if held is not None:
                    held.copy_(old)
            if self.quantizers is before.quantizers:
                self.quantizers = self.states.quantizers
            self._count()
        targets = [self.states.exact, *(self.states.codes[role].tensors for role in ROLES)]
        for (_, tensors), target, pairs in zip(parts, targets, mapped, strict=True):
            for name, (_, new) in zip(tensors, pairs, strict=True):
                target[name].copy_(new)

    def offload(self) -> None:
        """Refused: compiled steps have the addresses of this memory."""
        raise ValueError(
            "A cache with `max_cache_len` must stay on its device, got a call of `offload`. Leave `max_cache_len` out."
        )

    prefetch = offload
