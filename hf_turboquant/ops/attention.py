"""Attention and scores straight from the codes: three launches of the kernels, or two."""

import torch

from ..packing import BLOCK
from ..plans import Plan
from ..quantizer import Quantizer
from .attention_plan import (
    COMBINE_COLUMNS,
    EXACT_TILE,
    MAX_SPLITS,
    ROWS,
    NewScratch,
    constants_of,
    count_splits,
    is_portable,
    kernels_for,
    scratch_of,
)
from .launch import DTYPES, INTERPRETED, addresses, at, on_other_device, stream_of

LOG2E = 1.4426950408889634


def supports(query: torch.Tensor, states, **_) -> str | None:
    """`None` if the kernels can serve this call, else the reason why not, in words. Reads no device memory."""
    for role in ("keys", "values"):
        quantizer, exact = states.quantizers[role], states.exact[role]
        if quantizer.nbits not in (2, 3, 4):
            return f"the kernels read 2, 3 and 4 bits, and the {role} have {quantizer.nbits}"
        if quantizer.head_dim % 16 or not 32 <= quantizer.head_dim <= 256:
            return f"the kernels take a head_dim of 32 to 256 in steps of 16, and the {role} have {quantizer.head_dim}"
        if exact.dtype not in DTYPES or not exact.is_contiguous() or exact.data_ptr() % 16:
            return f"the exact {role} are {exact.dtype} or not contiguous"
    if query.dtype not in DTYPES:
        return f"the query is {query.dtype}"
    if query.device.type != "cuda" and not INTERPRETED:
        return f"the tensors are on {query.device.type}"
    return None


def attention(
    query: torch.Tensor,
    states,
    *,
    scaling: float,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    portable: bool | None = None,
) -> torch.Tensor:
    """
    [`ops.attention`] in three launches: query, exact tokens | codes | merge and un-rotate.

    Args:
        portable (`bool`, *optional*): run the kernels without inline assembly; by default only where it cannot run.
    """
    return AttentionCall(query, states, attention_mask, is_causal, softcap, portable).run(scaling, sinks)


def attention_again(
    query: torch.Tensor, states, scaling: float, is_causal: bool, softcap, sinks
) -> torch.Tensor | None:
    """[`attention`] without a mask if it was done before to the same buffers with a query like this; else `None`."""
    key = _key(query, _NO_MASK, is_causal, softcap, None)
    plan = states.plans.find(key, states)
    if plan is None:
        return None
    return AttentionCall(query, states, None, is_causal, softcap, None, plan).run(scaling, sinks)


def warm(states) -> None:
    """See `ops.warm`."""
    keys, values, dtype = states.quantizers["keys"], states.quantizers["values"], states.exact["keys"].dtype
    constants_of(keys).query_operators(keys, dtype)
    constants_of(values).dual_operator(values, torch.float16)


def scores(
    query: torch.Tensor,
    states,
    *,
    scaling: float,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    portable: bool | None = None,
) -> torch.Tensor:
    """[`ops.scores`] in two launches: query, logits of exact tokens | logits of codes."""
    call = AttentionCall(query, states, attention_mask, is_causal, softcap, portable)
    out = torch.empty((*query.shape[:3], states.kv_len), dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        call.prepare(scaling, out)
        call.scores(out)
    return out


class AttentionPlan(Plan):
    """
    What calls on the same buffers have in common while the codes fill the same blocks: a step of decoding finds all of
    it done, but for the lengths.

    Args:
        query, states, is_causal, portable: as of [`attention`].
        mask_kind, softcap (`bool`): of what kind the mask is, see [`_mask`], and whether there is a softcap.
    """

    def __init__(self, query, states, mask_kind, is_causal, softcap, portable):
        super().__init__(states)
        keys, values = states.quantizers["keys"], states.quantizers["values"]
        batch, heads, query_length, _ = query.shape
        self.heads, self.query_length, self.value_dim = heads, query_length, values.head_dim
        codes = [buffer.tensors for buffer in states.codes.values()]
        scales = codes[0]["scales"]
        kv_heads = scales.shape[1]
        self.pairs = batch * kv_heads
        groups = heads // kv_heads
        self.rows = rows = groups * query_length
        # with a static capacity the kernels read the lengths from device memory, and these are bounds
        static = states.counters is not None
        self.blocks = -(-states.codes["keys"].length // BLOCK)
        key_constants, value_constants = constants_of(keys), constants_of(values)
        self.kernels = kernels = kernels_for(
            query.device,
            is_portable(query.device) if portable is None else portable,
            query.dtype,
            states.exact["keys"].dtype,
            (
                keys.nbits,
                keys.estimator == "qjl",
                keys.head_dim,
                keys.scale is not None,
                keys.mean is not None,
                keys.codebook,
            ),
            (values.nbits, values.head_dim, values.mean is not None, values.codebook),
            mask_kind,
            # the last query sees everything
            is_causal and query_length > 1,
            softcap,
            rows <= ROWS // 2,
            static,
        )
        self.row_tiles = -(-rows // kernels.rows)
        # one call's splits are those of the codes, then those of the exact tokens
        slots = min(states.sink_length + states.ring, states.exact["keys"].shape[2])
        exact_splits = max(-(-slots // EXACT_TILE), int(static))
        self.code_splits = count_splits(kernels.wave, self.pairs * self.row_tiles, self.blocks, MAX_SPLITS)
        splits = self.code_splits + exact_splits
        scratch = NewScratch(query.device) if static else scratch_of(query.device)
        partial = scratch.get("partial", self.pairs * rows * splits * self.value_dim)
        stats = scratch.get("stats", self.pairs * rows * splits * 2)
        operands = scratch.get("operands", self.pairs * rows * kernels.operand_bytes)
        row_constants = scratch.get("constants", self.pairs * rows * 8)
        key_states, value_states = states.exact["keys"], states.exact["values"]
        operators = key_constants.query_operators(keys, kernels.operator_dtype)
        key_planes = _planes(keys, codes[0]) + (codes[0].get("residual_norms", scales),)
        head_sizes = key_constants.heads, *(1 if x is None else len(x) for x in (keys.scale, keys.mean))
        sizes = query_length, groups, kv_heads
        tiles = -(-rows // 16)
        # rows that share an operator fill tiles of 16 together
        query_tiles = -(-self.pairs * rows // 16) if key_constants.heads == 1 else self.pairs * tiles
        self.prepare_grid = kernels.terms * query_tiles + self.pairs * tiles * exact_splits, 1, 1
        dual = value_constants.dual_operator(values, kernels.dual_dtype)
        codes_of_keys = operands, row_constants, *key_planes, key_constants.tables
        # of each launch, what comes between the arguments that differ from call to call
        self.tensors = {
            "prepare": (
                (operators, *(operators if x is None else x for x in (keys.scale, keys.mean)), operands, row_constants)
                + (key_states, value_states),
                (partial, stats),
                (*query.stride()[:3],),
                (*sizes, *head_sizes),
                (states.sink_length, states.ring),
                (slots, key_states.stride(1), value_states.stride(1), self.pairs, splits, self.code_splits),
                (key_constants.scale, key_constants.offset),
            ),
            "attend": (
                (*codes_of_keys, *_planes(values, codes[1]), value_constants.tables),
                (partial, stats),
                sizes,
                (scales.shape[2], codes[1]["scales"].shape[2], self.row_tiles, splits, self.code_splits),
            ),
            "scores": (codes_of_keys, sizes, (scales.shape[2], self.row_tiles)),
            "combine": (
                (partial, stats, dual, dual if values.mean is None else values.mean),
                (rows, *sizes, value_constants.heads, 1 if values.mean is None else len(values.mean))
                + (splits, self.code_splits, query_length * heads * self.value_dim, self.value_dim)
                + (heads * self.value_dim, value_constants.scale),
            ),
        }
        self.addresses = {name: addresses(args) for name, args in self.tensors.items()}
        # without sinks and with
        self.combine = [kernels.combine(self.code_splits, sinks) for sinks in (False, True)]

    def args(self, name: str, launcher) -> tuple:
        """As [`at`]."""
        return (self.tensors if launcher.compiled is None else self.addresses)[name]

    def fits(self, states) -> bool:
        """Whether these are the same buffers, and the codes fill the same blocks."""
        return self.blocks == -(-states.codes["keys"].length // BLOCK) and super().fits(states)


class AttentionCall:
    """The launches of one call."""

    def __init__(self, query, states, attention_mask, is_causal, softcap, portable, plan=None):
        self.query = query if query.stride(3) == 1 else query.contiguous()
        self.mask, self.mask_strides, mask_kind = _mask(attention_mask, self.query)
        self.softcap = 1.0 if softcap is None else softcap * LOG2E
        key = None
        if plan is None and states.plans is not None:
            key = _key(self.query, mask_kind, is_causal, softcap, portable)
            plan = states.plans.find(key, states)
        if plan is None:
            plan = AttentionPlan(self.query, states, mask_kind, is_causal, softcap is not None, portable)
            if key is not None:
                states.plans.keep(key, plan, states)
        self.plan = plan
        self.kv_len, self.length = states.kv_len, states.codes["keys"].length
        self.sink_length, self.phase = states.sink_length, states.phase
        self.recent_start = self.sink_length + self.length
        if states.counters is not None:
            self.kv_len = states.counters
            self.recent_start = self.length = states.counters[:, :, 1:]

    def run(self, scaling: float, sinks: torch.Tensor | None) -> torch.Tensor:
        """All of them."""
        if on_other_device(self.query.device):
            with torch.cuda.device(self.query.device):
                return self.run(scaling, sinks)
        self.prepare(scaling)
        self.attend()
        return self.combine(sinks)

    def prepare(self, scaling: float, logits: torch.Tensor | None = None) -> None:
        """Turns the query and attends to exact tokens, or writes their `logits`."""
        plan = self.plan
        launch = plan.kernels.prepare if logits is None else plan.kernels.prepare_scores
        constants, results, query_strides, sizes, ring, layout, levels = plan.args("prepare", launch)
        launch(
            plan.prepare_grid,
            at(launch, self.query),
            *constants,
            at(launch, self.mask),
            *results,
            results[0] if logits is None else logits,
            *query_strides,
            *self.mask_strides,
            *sizes,
            self.kv_len,
            self.recent_start,
            *ring,
            self.phase,
            *layout,
            scaling,
            self.softcap,
            *levels,
        )

    def attend(self) -> None:
        """Attends to the codes, split by split."""
        plan = self.plan
        if not plan.code_splits:
            return
        launch = plan.kernels.attend
        codes, results, sizes, layout = plan.args("attend", launch)
        launch(
            (plan.code_splits * plan.row_tiles, plan.pairs, 1),
            *codes,
            at(launch, self.mask),
            *results,
            *self.mask_strides,
            *sizes,
            self.kv_len,
            self.sink_length,
            self.length,
            *layout,
            self.softcap,
        )

    def combine(self, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """Merges the splits, turns values back."""
        plan, query = self.plan, self.query
        # where the model wants it: heads next to each other
        out = query.new_empty((query.shape[0], plan.query_length, plan.heads, plan.value_dim))
        launch = plan.combine[sinks is not None]
        results, sizes = plan.args("combine", launch)
        launch(
            (plan.pairs * plan.rows, -(-plan.value_dim // COMBINE_COLUMNS), 1),
            *results,
            results[0] if sinks is None else sinks,
            at(launch, out),
            *sizes,
        )
        return out.transpose(1, 2)

    def scores(self, out: torch.Tensor) -> None:
        """Writes the logits of the codes."""
        plan = self.plan
        chunks = -(-plan.blocks // plan.kernels.score_blocks)
        if not chunks:
            return
        launch = plan.kernels.scores
        codes, sizes, layout = plan.args("scores", launch)
        launch(
            (chunks * plan.row_tiles, plan.pairs, 1),
            *codes,
            self.mask,
            out,
            *self.mask_strides,
            *sizes,
            self.kv_len,
            self.sink_length,
            self.length,
            *layout,
            self.softcap,
        )


def _planes(quantizer: Quantizer, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The 4-bit or 2-bit plane, the 1-bit plane (at 3 bits, else any tensor) and the scales."""
    wide = tensors["plane4" if quantizer.nbits == 4 else "plane2"]
    return wide, tensors["plane1"] if quantizer.nbits == 3 else wide, tensors["scales"]


# a kind of mask: its dtype, and whether one serves all heads and queries
_NO_MASK = None, False


def _key(query: torch.Tensor, mask_kind: tuple, is_causal: bool, softcap: float | None, portable: bool | None) -> tuple:
    # scratch belongs to a stream
    stream = stream_of(query.device)
    kind = mask_kind, is_causal, softcap is None, portable
    return "attention", query.shape, query.stride(), query.dtype, query.device, stream, kind


def _mask(mask: torch.Tensor | None, query: torch.Tensor):
    """
    Mask, strides with zeros where it is broadcast, and its kind: dtype, and whether all heads and queries of a sequence
    share one that lies token by token. Without a mask any tensor, to have a pointer.
    """
    if mask is None:
        return query, (0, 0, 0, 0), _NO_MASK
    strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    kind = mask.dtype, strides[1:] == (0, 0, 1)
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask, strides, kind
