"""TurboQuantLayer: exact sinks and an exact recent window, with codes for all tokens between them."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

import torch
from transformers.cache_utils import DynamicLayer

from . import ops
from .ahead import compile_ahead
from .conditioning import NOT_CONDITIONED, Learned, condition, energy_of_queries, learned, valid_tokens
from .config import TurboQuantConfig
from .packing import BLOCK
from .plans import Plans
from .quantizer import Quantizer
from .states import ExactStates, LayerStates, QuantizedStates
from .storage import SlotBuffer, TokenBuffer

logger = logging.getLogger(__name__)

ROLES = ("keys", "values")
# Keys wait for enough different tokens while there are at most so many beside the sinks.
MAX_WAITING_TOKENS = 512
# A layer that defers quantising does so for prompts of at most so many tokens, in all sequences.
MAX_DEFERRED_TOKENS = 2_048


class TurboQuantLayer(DynamicLayer):
    """
    The keys and values of one full-attention layer.

    The first `sink_length` tokens and the last `residual_length` tokens stay exact. A token is quantised once, when it
    leaves the recent window. All of them stay exact until there are `LEARNED_TOKENS` to condition keys by, and longer,
    up to `MAX_WAITING_TOKENS`, while most of them are alike.

    Args:
        config (`TurboQuantConfig`): options of the cache.
        layer_idx (`int`): index of the layer in the model; seeds its rotations.
    """

    step: LayerStates | None = None

    def __init__(self, config: TurboQuantConfig, layer_idx: int):
        self.config = config
        self.layer_idx = layer_idx
        # Of the rotary embedding of the keys, if the model's config defines one: see `conditioning.condition`.
        self.frequencies: list[float] | None = None
        # Shared by the layers of a cache: see `_differ`.
        self.verdict: dict[str, int] = {}
        super().__init__()
        self.reset()

    def __repr__(self) -> str:
        c = self.config
        keys, values = f"keys {c.key_bits} bits {c.key_estimator}", f"values {c.value_bits} bits {c.value_estimator}"
        tokens, known = int(self.get_seq_length()), ""
        if c.condition != "none" and tokens:
            waiting = f"not conditioned yet, {tokens} tokens wait"
            known = f", {waiting if self.condition is None else self.found}"
        return f"{type(self).__name__}({keys}{known}, {values})"

    def reset(self) -> None:
        """Forgets all tokens and frees their memory."""
        self.is_initialized = False
        self.length = 0
        self.quantizers: dict[str, Quantizer] = {}
        self.codes: dict[str, TokenBuffer] = {}
        self.exact: SlotBuffer | None = None
        # The tokens of the last update, while they wait to be stored; and once their query was seen, whether the mask
        # told which tokens are no padding, and which these are.
        self.pending: dict[str, torch.Tensor] | None = None
        self.observed: tuple[torch.Tensor | None] | None = None
        # What conditioning found, possibly on the device only; None while there is too little to learn from.
        self.found: Learned | torch.Tensor | None = None
        # What it will need: queries so far, and which of the tokens so far are no padding.
        self.query_energy: torch.Tensor | None = None
        self.valid: torch.Tensor | None = None
        # Whether tokens are kept on the CPU between updates.
        self.is_offloaded = False
        # Whether a gradient could have flowed to a token that is held now.
        self.cut_off = False
        # What the last update returned, if it reads codes: the token of a step may not be stored anywhere else yet.
        self._outdate()
        # Whether attention read what the last step returned, so that the next token may wait for it too.
        self.attended = False
        # Whether what `keys` and `values` returned shares memory with the layer.
        self.lent = False
        # What launches on the same buffers share, and the description of the last states that passed the check.
        self.plans = Plans()
        self.checked: tuple | None = None

    @property
    def condition(self) -> str | None:
        """What conditioning found: see [`conditioning.Learned.condition`]. `None` as long as keys wait for it."""
        if self.found is None:
            return None
        self.found = learned(self.found)
        return self.found.condition

    @property
    def keys(self) -> torch.Tensor | None:
        """
        The keys held, as a handle that later updates don't change; `None` before the first token. While nothing is
        quantised, writing to it changes what is held; after that it raises a `ValueError`.
        """
        self.come_to_rest()
        return self._held()[0] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:
        """The values held, in the same form as `keys`."""
        self.come_to_rest()
        return self._held()[1] if self.is_initialized else None

    @keys.setter
    def keys(self, states: None) -> None:
        self._refuse(states)

    @values.setter
    def values(self, states: None) -> None:
        self._refuse(states)

    def _refuse(self, states) -> None:
        # The constructor of the base class sets both to None.
        if states is not None:
            raise ValueError("A TurboQuantLayer holds codes: its keys and values cannot be assigned. Use `update`.")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Draws the rotations and makes empty buffers that fit the states, of shape `[batch, heads, T, head_dim]`."""
        states = {"keys": key_states, "values": value_states}
        batch, heads = key_states.shape[:2]
        device = key_states.device
        quantizers = {
            role: Quantizer.create(self.config, role, self.layer_idx, states[role].shape[-1], device) for role in ROLES
        }
        self.codes = {role: quantizers[role].new_buffer(batch, heads) for role in ROLES}
        shapes = {role: (states[role].dtype, (states[role].shape[-1],)) for role in ROLES}
        conditioned = self.config.condition != "none"
        # Until keys are conditioned, the slots hold all tokens.
        ring = max(self.config.held_length, MAX_WAITING_TOKENS) if conditioned else self.config.residual_length
        self.exact = SlotBuffer(shapes, batch, heads, device, self.config.sink_length, ring)
        self.found = None if conditioned else NOT_CONDITIONED
        self.quantizers = quantizers
        self.dtype, self.device = key_states.dtype, device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Appends new tokens and returns what attention reads.

        Args:
            key_states, value_states (`torch.Tensor`): of shape `[batch, num_key_value_heads, tokens, head_dim]`; keys
                and values may differ in head_dim and dtype. If the dtype differs from that of the tokens held, as when
                autocast begins or ends, both get the wider one.

        Returns:
            Keys and values of all tokens, as [`QuantizedStates`] or, if all of them are exact, as plain tensors. They
            are valid until the next update. The states given belong to the caller again once this returns or, if
            attention read what it returned the last time, once attention does.
            Attention reads the first prefill, and any chunk longer than the recent window, exactly. If the new states
            require gradients, these flow to them through plain tensors; none flow to tokens of earlier calls.

        Raises:
            `ValueError`: the states don't fit what the layer holds. The layer is left unchanged.
        """
        update = self._untraced_update if torch.compiler.is_compiling() else self._update
        return update(key_states, value_states)

    # Lengths change with every step: a graph that contained them would be compiled again each time.
    @torch.compiler.disable
    def _untraced_update(self, key_states, value_states) -> tuple[torch.Tensor, torch.Tensor]:
        return self._update(key_states, value_states)

    def _update(self, key_states, value_states) -> tuple[torch.Tensor, torch.Tensor]:
        previous = self.step
        held = self._append(key_states, value_states)
        if previous is not None:
            previous.outdated = True
            if self.step is previous:
                self.step = None
        return self._train(held, key_states, value_states) if ops.trains(key_states, value_states) else held

    def _append(self, key_states, value_states) -> tuple[torch.Tensor, torch.Tensor]:
        as_held = self._check(key_states, value_states)
        if self.pending is not None or (self.step is not None and self.step.newest is not None):
            self.settle()
        if self.lent:
            # Others read and write there.
            self._replace(torch.clone)
            self.lent = False
        if self.is_offloaded:
            self.prefetch()
        fresh = not self.is_initialized
        if fresh:
            self.lazy_initialization(key_states, value_states)
        states = {"keys": key_states, "values": value_states}
        if not as_held:
            states = self._in_one_dtype(states)
        try:
            return self._take(states)
        except BaseException:
            # A smaller batch may come next.
            if fresh:
                TurboQuantLayer.reset(self)
            raise

    def _take(self, states: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends states that fit; returns what attention reads."""
        if self.found is None:
            return self._wait(states)
        sinks, window = self.config.sink_length, self.config.residual_length
        before, tokens = self.length, states["keys"].shape[2]
        coded = self.codes["keys"].length > 0 or before + tokens > sinks + window
        if before > 0 and coded and tokens == 1:
            return self._step(*states.values())
        self.attended = False
        # Attention reads the first tokens, or the sinks, and the new ones exactly. Allocate that before anything
        # changes: memory may run out.
        exact = None
        if before == 0:
            exact = states
        elif not coded or 0 < window < tokens:
            exact = self._with_exact(states, min(before, sinks) if coded else before)
        self._store(states)
        if exact is not None and (not coded or before <= sinks):
            return tuple(exact.values())
        # Between the sinks and a long chunk, all tokens are in codes.
        self.step = self._read() if exact is None else self._read_from(exact, before - sinks, self.length - before, 0)
        return _handles(self.step)

    def observe(self, query: torch.Tensor | None, attention_mask: torch.Tensor | None) -> None:
        """
        What attention to the tokens of the last update calls, with its query and mask. Stores the tokens or, if they
        are few, leaves that to the next update: see [`_defers`].

        Args:
            query (`torch.Tensor`, *optional*): of shape `[batch, num_attention_heads, query_length, head_dim]`; `None`
                if something else than attention reads the tokens.
            attention_mask (`torch.Tensor`, *optional*): the mask of that query; distinguishes padding from tokens.
        """
        if query is not None and self.pending is not None and not self.is_offloaded and self._defers():
            self._observe(query, attention_mask)
        elif self.observed is None:
            self.settle(query, attention_mask)

    def settle(self, query: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None) -> None:
        """
        Stores the tokens of the last update if they wait.

        The first tokens wait because conditioning needs queries; the token of a decode step waits because attention
        stores it. Without a query, now or before, keys are only centred. Arguments are those of [`observe`].
        """
        if self.step is not None and self.step.newest is not None:
            # No attention has read it: the next token may not wait where the caller may write.
            self.attended = False
            self.step.settle()
        if self.pending is None:
            return
        self._observe(query, attention_mask)
        with self._all_or_nothing():
            self._store(self.pending, *self.observed)
        self.pending = self.observed = None
        if self.is_offloaded:
            self.offload()

    def _observe(self, query: torch.Tensor | None, attention_mask: torch.Tensor | None) -> None:
        """Keeps what conditioning needs of the query of the tokens that wait; does nothing if it is known."""
        if self.observed is not None:
            return
        kv_len, energy = self.get_seq_length(), self.query_energy
        valid = valid_tokens(attention_mask, kv_len)
        if query is not None and self.config.condition == "attention":
            # In the first prefill queries are padded like keys; later queries are all tokens.
            known = valid if query.shape[2] == kv_len else None
            new = energy_of_queries(query, known, self.pending["keys"].shape[1])
            energy = new if energy is None else new + energy
            compile_ahead(self, self.pending["keys"], self.pending["values"], query, valid is not None)
        # After an error the same query may come again: it counts once.
        self.query_energy, self.observed = energy, (valid,)

    def _defers(self) -> bool:
        """
        Whether tokens that wait may do so until the next update. On a GPU it takes the host longer to launch their
        quantising than everything else in a short prompt, and the first token need not wait for that.
        """
        batch, _, tokens, _ = self.pending["keys"].shape
        return self.device.type == "cuda" and batch * tokens <= MAX_DEFERRED_TOKENS

    def come_to_rest(self) -> None:
        """Stores all waiting tokens and brings offloaded ones back to the layer's device."""
        self.settle()
        if self.is_offloaded and torch.cuda.is_available():
            # A copy may be in progress on another stream.
            torch.cuda.synchronize()
        self.prefetch()

    def _store(self, states: dict[str, torch.Tensor], valid: torch.Tensor | None = None) -> None:
        """Writes new tokens to the exact slots, and quantises what leaves them."""
        # Without detach, buffers would keep every autograd graph alive.
        states = {role: states[role].detach() for role in ROLES}
        if self.found is not None:
            self._write(states)
            return
        held = {role: self._exact(role) for role in ROLES}
        everything = {role: torch.cat([held[role], states[role]], dim=2) for role in ROLES} if self.length else states
        valid = self._valid(valid, everything["keys"])
        step = self.length > 0 and states["keys"].shape[2] == 1
        if step:
            # As with a static capacity, where keys are conditioned before the token of a step comes.
            self._learn(held, valid, coming=1)
        if step or not self._learn(everything, valid):
            self._write(states)
        self.valid = valid if self.found is None else None

    def _write(self, states: dict[str, torch.Tensor]) -> None:
        # As long as there is room for them, tokens that wait to be learned from don't leave.
        sinks, window = self.config.sink_length, self.exact.ring if self.found is None else self.config.residual_length
        before, after = self.length, self.length + states["keys"].shape[2]
        quantized = sinks + self.codes["keys"].length
        # Everything that can run out of memory comes first; codes beyond a buffer's length are ignored.
        self.exact.reserve(min(after, sinks + window), limit=sinks + self.exact.ring)
        if after - window > quantized:
            tokens = {role: self._leaving(states[role], role, quantized, after - window) for role in ROLES}
            ops.quantize_pair(tokens, self.quantizers, self.codes, self.config.backend)
        for start, stop in ((before, min(after, sinks)), (max(before, sinks, after - window), after)):
            if start < stop:
                for role in ROLES:
                    self.exact.write(role, start, states[role][:, :, start - before : stop - before])
        self.length = after

    def _step(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends one token, which pushes at most one out of the recent window; returns what attention reads."""
        if key_states.requires_grad or value_states.requires_grad:
            key_states, value_states = key_states.detach(), value_states.detach()
        if not self.attended:
            key_states, value_states = key_states.clone(), value_states.clone()
        sinks, window, quantized = self.config.sink_length, self.config.residual_length, self.codes["keys"].length
        leaving = int(self.length + 1 - sinks - window > quantized)
        if not leaving:
            self.exact.reserve(min(self.length + 1, sinks + window), limit=sinks + window)
        elif quantized % BLOCK == 0:
            # Buffers grow by whole blocks.
            for buffer in self.codes.values():
                buffer.reserve(quantized + 1)
        states = self._read(leaving)
        states.newest = key_states, value_states
        # Offloaded tensors move before attention reads them, so the token must be stored now.
        if self.is_offloaded:
            states.settle()
        for buffer in self.codes.values():
            buffer.length += leaving
        self.length += 1
        self.step, self.attended = states, True
        return _handles(states)

    def _train(self, held, *new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lets gradients flow from what attention reads to the new tokens, the last of it: codes have none."""
        if held[0].shape[2] > new[0].shape[2] and self.cut_off:
            _log_cut_off()
        self.cut_off = True
        if self.step is not None:
            self.step.training = dict(zip(ROLES, new, strict=True))
        return held

    def _leaving(self, states: torch.Tensor, role: str, start: int, stop: int) -> torch.Tensor:
        """The tokens at positions `start` to `stop`, taken from the recent window and then from `states`."""
        pieces = self.exact.pieces(role, start, min(self.length, stop))
        if stop > self.length:
            pieces.append(states[:, :, max(start - self.length, 0) : stop - self.length])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def _learn(self, states: dict[str, torch.Tensor], valid: torch.Tensor | None, coming: int = 0) -> bool:
        """
        Conditions keys by `states`, all tokens so far, and stores these anew, unless there are too few or, as long as
        there is room for them and `coming` ones, too few different ones. Returns whether it did.
        """
        length = states["keys"].shape[2]
        beside = length + coming - self.config.sink_length
        if beside <= self.config.held_length:
            return False
        quantizers, found = self._conditioned(states, None if valid is None else valid[:, :length])
        if beside <= self.exact.ring and not self._differ(found, length):
            return False
        self.exact, self.length, self.quantizers, self.found = self._slots(), 0, quantizers, found
        self._write(states)
        self.query_energy = None
        return True

    def _differ(self, found: torch.Tensor, length: int) -> bool:
        """
        Whether enough of the first `length` tokens differ. The host has to wait for the device to know: it does so in
        the first layer of a model, and the others follow.
        """
        if self.layer_idx <= self.verdict.get("layer_idx", self.layer_idx) or self.verdict["length"] != length:
            self.verdict.update(layer_idx=self.layer_idx, length=length, enough=learned(found).enough)
        return self.verdict["enough"]

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Within this context, an error leaves the tokens and what is known of them as they were."""
        known = {name: vars(self)[name] for name in ("exact", "length", "quantizers", "found", "query_energy", "valid")}
        codes = [(buffer, buffer.length) for buffer in self.codes.values()]
        try:
            yield
        except BaseException:
            vars(self).update(known)
            for buffer, length in codes:
                buffer.length = length
            raise

    def _conditioned(self, states: dict[str, torch.Tensor], valid: torch.Tensor | None):
        """The quantizers, conditioned by `states`, all tokens so far, except the sinks; and what was found."""
        sinks = self.config.sink_length
        valid = None if valid is None else valid[:, sinks:]
        # Constants must be ordinary tensors even if the first prefill runs in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            plain = replace(self.quantizers["keys"], mean=None, scale=None)
            seen = *(states[role][:, :, sinks:] for role in ROLES), self.query_energy, valid
            conditioned, found = condition(plain, *seen, self.frequencies, sinks, self.config.backend)
        return {**self.quantizers, "keys": conditioned}, found

    def _valid(self, valid: torch.Tensor | None, keys: torch.Tensor) -> torch.Tensor | None:
        """Which of all tokens are no padding, boolean `[batch, tokens]`; without a mask, those after the last mask."""
        if valid is not None:
            return valid.expand(keys.shape[0], -1).clone()
        if self.valid is None:
            return None
        return torch.nn.functional.pad(self.valid, (0, keys.shape[2] - self.valid.shape[1]), value=True)

    def _slots(self) -> SlotBuffer:
        """Empty slots for sinks and recent tokens, once keys are conditioned."""
        slots = self.exact.snapshot()
        slots.ring = self.config.residual_length
        slots.map(lambda tensor: tensor.new_empty((*tensor.shape[:2], 0, tensor.shape[3])))
        return slots

    def _exact(self, role: str) -> torch.Tensor:
        """All tokens, as long as none is quantised."""
        return self.exact[role][:, :, : self.length]

    def _in_one_dtype(self, states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As `torch.cat` would: exact tokens and new ones in the wider dtype of both, for keys and for values."""
        dtypes = {role: torch.promote_types(self.exact[role].dtype, states[role].dtype) for role in ROLES}
        if any(dtypes[role] != self.exact[role].dtype for role in ROLES):
            self._widen(dtypes)
        return {role: states[role].to(dtypes[role]) for role in ROLES}

    def _widen(self, dtypes: dict[str, torch.dtype]) -> None:
        # Handles returned earlier keep the tensors they read.
        self.exact = self.exact.snapshot()
        self.exact.to(dtypes)

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Raises a `ValueError` if the states don't fit; returns whether they have the dtypes of the tokens held."""
        given = None
        if isinstance(key_states, torch.Tensor) and isinstance(value_states, torch.Tensor):
            keys, values = key_states, value_states
            given = keys.shape, values.shape, keys.dtype, values.dtype, keys.device, values.device
            if given == self.checked:
                return True
        for name, states in (("key_states", key_states), ("value_states", value_states)):
            if not isinstance(states, torch.Tensor) or states.dim() != 4 or not states.is_floating_point():
                got = f"{states.dtype} of shape {list(states.shape)}" if isinstance(states, torch.Tensor) else states
                raise ValueError(
                    f"`{name}` must be a floating-point tensor of shape [batch, num_key_value_heads, tokens, "
                    f"head_dim], got {got} at layer {self.layer_idx}."
                )
        keys, values = key_states, value_states
        if keys.shape[:3] != values.shape[:3] or keys.device != values.device:
            raise ValueError(
                "`key_states` and `value_states` must agree in batch, heads, tokens and device, got "
                f"{list(keys.shape)} {keys.device} and {list(values.shape)} {values.device} at layer {self.layer_idx}."
            )
        if not self.is_initialized:
            return True
        for name, states, held in (
            ("key_states", keys, self.exact["keys"]),
            ("value_states", values, self.exact["values"]),
        ):
            expected = (*held.shape[:2], held.shape[3], self.device)
            got = (*states.shape[:2], states.shape[3], states.device)
            if expected != got:
                raise ValueError(
                    f"`{name}` must keep the batch size, heads, head_dim and device of the cached tokens, "
                    f"{expected}, got {got} at layer {self.layer_idx}. Use a new cache or `reset()` for another "
                    "batch, and `batch_repeat_interleave` or `batch_select_indices` to change the batch of this one."
                )
        if (keys.dtype, values.dtype) != (self.exact["keys"].dtype, self.exact["values"].dtype):
            return False
        # Steps have the same shapes: the next one can skip the check.
        self.checked = given
        return True

    def _held(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Handles of all tokens held, which the next update leaves what they are."""
        self.lent = True
        if self.codes["keys"].length:
            return _handles(self._read())
        return _handles(ExactStates({role: self._exact(role) for role in ROLES}, lambda *_: None, writable=True))

    def _wait(self, states: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps a copy of the states until the query that attends to them is seen; returns what attention reads."""
        before = self.length
        # Ordinary tensors even in inference mode, whose versions show whether they were written to.
        with torch.inference_mode(False):
            exact = self._with_exact(states, before)
        self.pending = {role: tensor[:, :, before:].detach() for role, tensor in exact.items()}
        return _handles(ExactStates(exact, self.observe))

    def _outdate(self) -> None:
        """What the last update returned must not be read any more."""
        if self.step is not None:
            self.step.outdated, self.step = True, None

    def _read(self, leaving: int | None = None) -> LayerStates:
        """What attention reads now or, with `leaving`, after one more token, with `leaving` more tokens quantised."""
        ring, quantized = self.exact.ring, self.codes["keys"].length + (leaving or 0)
        states = self._read_from(self.exact.tensors, quantized, ring, quantized % ring if ring else 0)
        if leaving is not None:
            states.kv_len += 1
            states.leaving = leaving
        return states

    def _with_exact(self, states: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
        """The first `count` tokens, which are exact, followed by new ones, in memory of their own."""
        return {role: torch.cat([self.exact[role][:, :, :count], states[role]], dim=2) for role in ROLES}

    def _read_from(self, exact: dict[str, torch.Tensor], quantized: int, ring: int, phase: int) -> LayerStates:
        sinks, backend = self.config.sink_length, self.config.backend
        return LayerStates(
            self.quantizers, self.codes, exact, self.length, quantized, sinks, ring, phase, backend, None, self.plans
        )

    @property
    def nbytes(self) -> int:
        """Bytes allocated for tokens."""
        return sum(buffer.nbytes for buffer in (*self.codes.values(), self.exact))

    def measure(self) -> None:
        """Fetches lengths to the host; in this class they are always there."""

    def get_seq_length(self) -> int:
        """Number of tokens held."""
        return self.length + (self.pending["keys"].shape[2] if self.pending else 0)

    def crop(self, tokens_to_remove: int) -> None:
        """
        Removes the last `-tokens_to_remove` tokens from the codes and the exact slots. The remaining tokens are
        unchanged: exact tokens stay exact, quantised ones stay quantised.
        """
        if not self.is_initialized:
            return
        self.settle()
        # Ask transformers' own layer what the argument means: this changed between releases.
        positions = DynamicLayer()
        positions.lazy_initialization(torch.empty(0, device="meta"), torch.empty(0, device="meta"))
        positions.keys = positions.values = torch.empty(1, 1, self.length, 1, device="meta")
        positions.crop(tokens_to_remove)
        self.length = positions.get_seq_length()
        if not self.length:
            # What comes next has nothing to do with what was learned.
            empty = [self.exact[role][:, :, :0] for role in ROLES]
            TurboQuantLayer.reset(self)
            self.lazy_initialization(*empty)
            return
        self.valid = None if self.valid is None else self.valid[:, : self.length]
        for role in ROLES:
            self.codes[role].length = min(self.codes[role].length, max(self.length - self.config.sink_length, 0))

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies `function` to every tensor of tokens; either all of them change or none."""
        if not self.is_initialized:
            return
        self.come_to_rest()
        valid = None if self.valid is None else function(self.valid)
        self._replace(function)
        self.valid = valid
        if self.is_offloaded:
            self.offload()

    def _replace(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        # Handles returned earlier keep the tensors they read.
        buffers = [buffer.snapshot() for buffer in (*self.codes.values(), self.exact)]
        for buffer in buffers:
            buffer.map(function)
        self.codes = dict(zip(ROLES, buffers, strict=False))
        self.exact = buffers[-1]
        # Old plans would keep the old buffers alive.
        self.plans = Plans()
        self.checked = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the batch for beam search."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch `repeats` times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices` of the batch (indices or a boolean mask)."""
        self._map(lambda tensor: tensor[indices, ...])

    def offload(self) -> None:
        """
        Moves codes and exact tokens to pinned host memory on the current stream. Tokens whose query was not seen yet
        are moved when they are stored.
        """
        self.is_offloaded = self.is_initialized
        if self.observed is not None:
            # This comes back here.
            self.settle()
        elif self.is_offloaded and self.pending is None:
            self.settle()
            # A non-blocking copy to the CPU goes to pinned memory.
            self._replace(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves codes and exact tokens back to the layer's device on the current stream."""
        if self.is_offloaded and self.exact["keys"].device != self.device:
            self._replace(lambda tensor: tensor.to(self.device, non_blocking=True))


@lru_cache(maxsize=1)
def _log_cut_off() -> None:
    logger.warning(
        "Gradients flow to the keys and values of a call's own tokens, and to none of earlier calls: a TurboQuantCache "
        "holds these as codes. Pass all tokens in one call or use a `DynamicCache` to train with them, and call the "
        "model under `torch.no_grad()` if nothing is trained."
    )


def _handles(states: LayerStates | ExactStates) -> tuple[torch.Tensor, torch.Tensor]:
    return QuantizedStates(states, "keys"), QuantizedStates(states, "values")
