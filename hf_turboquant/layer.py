"""TurboQuantLayer: exact sinks and exact recent tokens, with codes for all tokens between them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import NamedTuple

import torch

from . import ops
from .ahead import compile_ahead
from .batch import BatchOperations
from .conditioning import NOT_CONDITIONED, Conditioning, valid_tokens
from .config import TurboQuantConfig
from .fixed import FixedTokens
from .handle import handles, log_cut_off
from .lengths import NOT_COMPILED, Lengths
from .quantizer import ROLES
from .states import ExactStates, LayerStates
from .tokens import Tokens
from .traced import append, handles_of

# Quantizing is deferred for prompts of at most this many tokens, all sequences together.
MAX_DEFERRED_TOKENS = 2_048
# The query of such a prompt is kept up to this size: copying it takes the host less time than summing its squares.
MAX_QUERY_BYTES = 2**22
# Most tokens of a step over a fixed capacity: one token of a compiled model, or those that a draft proposes.
STEP_TOKENS = 16


class Observed(NamedTuple):
    """
    What a layer has seen of the query that attended to its waiting tokens.

    Args:
        valid (`torch.Tensor`, *optional*): boolean, of shape `[batch, kv_len]`; false for padding, if the mask tells.
        query (`torch.Tensor`, *optional*): the query, if conditioning has not counted it yet.
        heads (`int`, *optional*), dtype (`torch.dtype`, *optional*): of the query.
    """

    valid: torch.Tensor | None
    query: torch.Tensor | None = None
    heads: int | None = None
    dtype: torch.dtype | None = None


class TurboQuantLayer(BatchOperations, Lengths):
    """
    The keys and values of one full-attention layer.

    The first `sink_length` tokens and the last `residual_length` tokens stay exact. A token is quantized once, when it
    leaves the recent tokens. All tokens stay exact until there are `LEARNED_TOKENS` to condition keys by, and longer,
    up to `MAX_WAITING_TOKENS`, while too few of them differ. The tokens of a first prompt wait for the query that
    attends to them; until they are stored, a layer that grows allocates nothing else.

    With `config.max_cache_len`, the capacity is fixed: see [`FixedTokens`]. Steps then never wait for the device, and
    everything else fetches the lengths from it first ([`measure`]). If keys are not conditioned yet, they are before a
    step whose tokens no longer fit in the exact slots. Callers that replay a graph must call `find_room` before and
    `count` afterwards. No step may come before the first prompt is stored.

    Args:
        config (`TurboQuantConfig`): options of the cache.
        layer_idx (`int`): index of the layer in the model; seeds its rotations.
    """

    # Repeated here because guards of a compiled step check it, and looking up an inherited attribute takes longer than
    # all other checks.
    is_sliding = False
    step: LayerStates | None = None
    # That of the first tokens.
    device: torch.device | None = None
    # With a fixed capacity, whether the caller promises to call `settle` before a step: a compiled step cannot.
    defers: bool = False

    def __init__(self, config: TurboQuantConfig, layer_idx: int):
        self.config = config
        self.layer_idx = layer_idx
        self.fixed = config.max_cache_len is not None
        if self.fixed:
            self.max_cache_len = config.max_cache_len
        # Of a longer chunk, some tokens would already be codes when attention reads them.
        self.step_tokens = max(1, min(STEP_TOKENS, config.residual_length))
        # The torch reference fetches lengths from the device, which a CUDA graph cannot do.
        self.is_compileable = self.fixed and config.backend != "torch"
        # Of the rotary embedding of the keys, if the model's config defines one: see `conditioning.condition`.
        self.frequencies: list[float] | None = None
        # Shared by the layers of a cache: see `Conditioning.differ` and `ahead`.
        self.verdict: dict = {}
        self.tokens = (FixedTokens if self.fixed else Tokens)(config, layer_idx)
        super().__init__()
        self.reset()

    def __repr__(self) -> str:
        c = self.config
        keys, values = f"keys {c.key_bits} bits {c.key_estimator}", f"values {c.value_bits} bits {c.value_estimator}"
        tokens, known = int(self.get_seq_length()), ""
        if c.condition != "none" and tokens:
            waiting = f"not conditioned yet, {tokens} tokens wait"
            known = f", {waiting if self.condition is None else self.conditioning.found}"
        room = f", room for {self.max_cache_len:,} tokens" if self.fixed else ""
        return f"{type(self).__name__}({keys}{known}, {values}{room})"

    def reset(self) -> None:
        """Forgets all tokens; frees their memory, unless the capacity is fixed."""
        self.is_initialized = False
        self.verdict.clear()
        self.tokens = self.tokens.forgotten()
        self.conditioning = Conditioning(self.config, self.layer_idx, self.frequencies, self.verdict)
        # The tokens of the last update, while they wait to be stored, and what was seen of their query.
        self.pending: dict[str, torch.Tensor] | None = None
        self.observed: Observed | None = None
        # Whether tokens are kept on the CPU between updates.
        self.is_offloaded = False
        # Whether a gradient could have flowed to a token that is held now.
        self.cut_off = False
        # Clears `step`, which is what the last update returned, if it reads codes.
        self._outdate()
        # Whether what `keys` and `values` returned shares memory with the layer.
        self.lent = False

    @property
    def condition(self) -> str | None:
        """What keys are conditioned by: see [`conditioning.Learned.condition`]; `None` until they are."""
        # A step over a fixed capacity may have quantized a token: then keys are conditioned.
        self.measure()
        self._store_deferred()
        return self.conditioning.condition

    def _store_deferred(self) -> None:
        if self.observed is not None:
            self.settle()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Draws the rotations and makes memory that fits the states, of shape `[batch, heads, tokens, head_dim]`."""
        # Not `self.conditioning.waits`, which may be that of an earlier sequence.
        waits = self.config.condition != "none"
        self.tokens.open({"keys": key_states, "values": value_states}, waits)
        self._initialize(key_states)

    def make_memory(self) -> None:
        """Makes memory for tokens that wait, if their update left that for later."""
        if self.tokens.exact is None:
            self.tokens.open(self.pending, self.conditioning.waits)

    def _initialize(self, key_states: torch.Tensor) -> None:
        """Begins a sequence of states like these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.conditioning = Conditioning(self.config, self.layer_idx, self.frequencies, self.verdict)
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
            are valid until the next update. The states given belong to the caller again once this returns.
            Attention reads the first prefill, and any chunk longer than `residual_length`, exactly. Gradients flow,
            through plain tensors, to new states that require them, and never to tokens of earlier calls. A step over a
            fixed capacity returns handles of `max_cache_len` tokens, of which attention ignores those to come.

        Raises:
            `ValueError`: the states don't fit what the layer holds, or its capacity. The layer is left unchanged.
        """
        if not torch.compiler.is_compiling():
            return self._update(key_states, value_states)
        if not self._is_step(key_states.shape[2]) or ops.trains(key_states, value_states):
            return self._untraced_update(key_states, value_states)
        append(self.tokens.arena, self.tokens.description, key_states, value_states)
        return handles_of(self.tokens.arena, self.tokens.description, self.max_cache_len, key_states, value_states)

    def _update(self, key_states, value_states) -> tuple[torch.Tensor, torch.Tensor]:
        previous = self.step
        held = self._append(key_states, value_states)
        if previous is not None:
            previous.outdated = True
            if self.step is previous:
                self.step = None
        return self._train(held, key_states, value_states) if ops.trains(key_states, value_states) else held

    # Lengths change with every step: a graph that contained them would be compiled again each time.
    _untraced_update = torch.compiler.disable(_update, reason=NOT_COMPILED)

    def _append(self, key_states, value_states) -> tuple[torch.Tensor, torch.Tensor]:
        states = {"keys": key_states, "values": value_states}
        if self.pending is not None:
            # New states are compared with it: refused ones must not store what waits.
            self.make_memory()
        as_held = self.tokens.check(states, self.device)
        if self.pending is not None:
            self.settle()
        if self.lent:
            # Whoever took `keys` or `values` may still read and write that memory.
            self._replace(self.tokens.mapped(torch.clone))
            self.lent = False
        if self.is_offloaded:
            self.prefetch()
        is_step = self._prepare_step(key_states.shape[2])
        fresh = not self.is_initialized
        if fresh and not self.fixed and self.conditioning.waits:
            # `settle` makes the memory, so that the first new token does not wait for that.
            self._initialize(key_states)
        elif fresh:
            self.lazy_initialization(key_states, value_states)
        if not as_held:
            self.measure()
            tokens, states = self.tokens.in_one_dtype(states)
            if tokens is not self.tokens:
                self._replace(tokens)
        try:
            if is_step:
                self.step = self.tokens.step(*states.values())
                return handles(self.step)
            return self._take(states)
        except BaseException:
            # The caller may try again with a smaller batch.
            if fresh:
                TurboQuantLayer.reset(self)
            raise

    def _take(self, states: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends states that fit and are no step; returns what attention reads."""
        if self.conditioning.waits:
            return self._wait(states)
        held, tokens = self.tokens, states["keys"].shape[2]
        before, sinks, window = held.length, held.sinks, held.window
        coded = held.are_coded_after(tokens)
        # What attention reads exactly: the new tokens and those before them or, once there are codes, the sinks. It is
        # allocated before anything changes, because memory may run out.
        exact = None
        if before == 0:
            exact = states
        elif not coded or 0 < window < tokens:
            exact = held.followed_by(states, min(before, sinks) if coded else before)
        self._store(states)
        if exact is not None and (not coded or before <= sinks):
            return tuple(exact.values())
        # Between the sinks and a long chunk, all tokens are in codes.
        self.step = held.read() if exact is None else held.read_from(exact, before - sinks, tokens, 0)
        return handles(self.step)

    def observe(self, query: torch.Tensor | None, attention_mask: torch.Tensor | None) -> None:
        """
        Attention to the tokens of the last update calls this with its query and mask. Stores the tokens or, if they are
        few, leaves that to the next update: see [`_defers`].

        Args:
            query (`torch.Tensor`, *optional*): of shape `[batch, num_attention_heads, query_length, head_dim]`; `None`
                if something other than attention reads the tokens.
            attention_mask (`torch.Tensor`, *optional*): the mask of that query; distinguishes padding from tokens.
        """
        if query is not None and self.pending is not None and not self.is_offloaded and self._defers():
            if self.observed is None:
                valid = valid_tokens(attention_mask, self.get_seq_length())
                # Copies, because query and mask belong to the caller.
                valid = None if valid is None else valid.clone()
                kept = query.detach().clone() if query.nbytes <= MAX_QUERY_BYTES else None
                if kept is None:
                    self._count(query, valid)
                self.observed = Observed(valid, kept, query.shape[1], query.dtype)
        elif self.observed is None:
            self.settle(query, attention_mask)

    def settle(self, query: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None) -> None:
        """
        Stores the tokens of the last update if they wait for a query to condition keys by. Without one, now or before,
        keys are only centred. Arguments are those of [`observe`].
        """
        if self.pending is None:
            return
        self.make_memory()
        with self._all_or_nothing():
            seen = self.observed
            if seen is None:
                valid = valid_tokens(attention_mask, self.get_seq_length())
                seen = Observed(valid) if query is None else Observed(valid, query, query.shape[1], query.dtype)
            if seen.dtype is not None:
                compile_ahead(self, self.pending, seen.heads, seen.dtype, seen.valid is not None)
            if seen.query is not None:
                self._count(seen.query, seen.valid)
            self._store(self.pending, seen.valid)
        self.pending = self.observed = None
        if self.is_offloaded:
            self.offload()

    def _count(self, query: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Gives conditioning the query of the waiting tokens."""
        self.conditioning.add_query(query, valid, self.pending["keys"].shape[1], self.get_seq_length())

    def _defers(self) -> bool:
        """
        Whether waiting tokens are stored only at the next update. On a GPU, launching what quantizes a short prompt
        takes the host longer than all its other work, and the first new token need not wait for that.
        """
        batch, _, tokens, _ = self.pending["keys"].shape
        return (self.defers or not self.fixed) and self.device.type == "cuda" and batch * tokens <= MAX_DEFERRED_TOKENS

    def _store(self, states: dict[str, torch.Tensor], valid: torch.Tensor | None = None) -> None:
        """Stores new tokens; `valid` tells which of all tokens are no padding, as far as that is known."""
        # Without detach, buffers would keep every autograd graph alive.
        states = {role: states[role].detach() for role in ROLES}
        if self.conditioning.waits:
            self._store_and_learn(states, valid)
        else:
            self.tokens.append(states)
        if self.fixed and self.conditioning.waits:
            self._condition_provisionally()
        self.tokens.write_lengths()

    def _store_and_learn(self, states: dict[str, torch.Tensor], valid: torch.Tensor | None) -> None:
        length, (batch, _, tokens, _) = self.tokens.length, states["keys"].shape
        self.conditioning.add_mask(valid, batch, length + tokens)
        if length > 0 and tokens == 1:
            # As with a fixed capacity, where keys are conditioned before the token of a step comes.
            self._learn({role: self.tokens.whole(role) for role in ROLES}, coming=1)
            self.tokens.append(states)
        elif not self._learn(self.tokens.followed_by(states, length) if length else states):
            self.tokens.append(states)

    def _train(self, held, *new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lets gradients flow to the `new` keys and values, the last that attention reads: codes have none."""
        if held[0].shape[2] > new[0].shape[2] and self.cut_off:
            log_cut_off()
        self.cut_off = True
        if self.step is not None:
            self.step.training = dict(zip(ROLES, new, strict=True))
        return held

    def _learn(self, states: dict[str, torch.Tensor], coming: int = 0) -> bool:
        """Conditions keys by `states` if [`Conditioning.learn`] finds enough in them; returns whether it did."""
        tokens = self.conditioning.learn(self.tokens, states, coming)
        if tokens is None:
            return False
        self.tokens = tokens
        tokens.keep_condition(tokens.quantizers["keys"])
        return True

    def _learn_now(self, coming: int) -> None:
        """Conditions keys that wait for it, unless the exact slots still have room for `coming` more tokens."""
        states = {role: self.tokens.whole(role).clone() for role in ROLES}
        with self._all_or_nothing():
            self.conditioning.add_mask(None, *states["keys"].shape[0:3:2])
            self._learn(states, coming)
        self.tokens.write_lengths()

    def _condition_provisionally(self) -> None:
        """Conditions keys by the tokens so far, in case steps of a graph, which run no Python, fill the exact slots."""
        keys, self.conditioning.provisional = None, NOT_CONDITIONED
        if self.tokens.length > self.tokens.sinks:
            states = {role: self.tokens.whole(role) for role in ROLES}
            keys, self.conditioning.provisional = self.conditioning.apply(self.tokens.quantizers["keys"], states)
        self.tokens.keep_condition(keys)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Within this context, an error leaves the tokens and what is known of them as they were."""
        tokens, conditioning = self.tokens.snapshot(), copy(self.conditioning)
        try:
            yield
        except BaseException:
            self.tokens, self.conditioning = tokens, conditioning
            raise

    def _wait(self, states: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps a copy of the states until the query that attends to them is seen; returns what attention reads."""
        before = self.tokens.length
        # Ordinary tensors even in inference mode: only these have versions, which show whether they were written to.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            exact = self.tokens.followed_by(states, before)
        self.pending = {role: (x[:, :, before:] if before else x).detach() for role, x in exact.items()}
        return handles(ExactStates(exact, self.observe))

    def _begin_again(self) -> None:
        """Forgets all tokens, and makes memory for new ones of the same kind."""
        empty = [self.tokens.exact[role][:, :, :0] for role in ROLES]
        # New tokens have nothing to do with what was learned. `self.reset` would also clear a recurrent part.
        TurboQuantLayer.reset(self)
        self.lazy_initialization(*empty)
        self.tokens.write_lengths()

    def _outdate(self) -> None:
        """From now on, reading codes that the last update returned raises a `ValueError`."""
        if self.step is not None:
            self.step.outdated, self.step = True, None
