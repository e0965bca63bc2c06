"""Attention and scores straight from the codes: three launches of the kernels, or two."""

import torch

from ..packing import BLOCK
from ..quantizer import Quantizer
from .attention_plan import (
    COMBINE_COLUMNS,
    DTYPES,
    EXACT_TILE,
    INTERPRETED,
    MAX_SPLITS,
    ROWS,
    NewScratch,
    constants_of,
    count_splits,
    is_portable,
    kernels_for,
    scratch_of,
)

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
    call = AttentionCall(query, states, attention_mask, is_causal, softcap, portable)
    with call.device_guard:
        call.prepare(scaling)
        call.attend()
        return call.combine(sinks)


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
    with call.device_guard:
        call.prepare(scaling, out)
        call.scores(out)
    return out


class AttentionCall:
    """The launches of one call and what they share."""

    def __init__(self, query, states, attention_mask, is_causal, softcap, portable):
        keys, values = states.quantizers["keys"], states.quantizers["values"]
        key_codes, value_codes = states.codes["keys"].tensors, states.codes["values"].tensors
        self.states = states
        self.query = query if query.stride(3) == 1 else query.contiguous()
        batch, heads, self.query_length, _ = query.shape
        scales = key_codes["scales"]
        self.kv_heads = scales.shape[1]
        self.key_blocks, self.value_blocks = scales.shape[2], value_codes["scales"].shape[2]
        self.groups = heads // self.kv_heads
        self.pairs = batch * self.kv_heads
        self.rows = self.groups * self.query_length
        # with a static capacity these are bounds, and kernels read the lengths from device memory
        static = states.counters is not None
        kv_len, length, self.recent_start = states.kv_len, states.codes["keys"].length, states.recent_start
        self.blocks = -(-length // BLOCK)
        if static:
            kv_len = states.counters
            self.recent_start = length = states.counters[:, :, 1:]
        self.lengths = (self.query_length, self.groups, self.kv_heads, kv_len, states.sink_length, length)
        self.slots = min(states.sink_length + states.ring, states.exact["keys"].shape[2])
        self.value_dim = values.head_dim
        self.key_constants, self.value_constants = constants_of(keys), constants_of(values)
        self.key_planes = _planes(keys, key_codes) + (key_codes.get("residual_norms", scales),)
        self.value_planes = _planes(values, value_codes)
        self.mask, self.mask_strides, mask_kind = _mask(attention_mask, self.query)
        self.softcap = 1.0 if softcap is None else softcap * LOG2E
        self.kernels = kernels_for(
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
            is_causal and self.query_length > 1,
            softcap is not None,
            self.rows <= ROWS // 2,
            static,
        )
        self.row_tiles = -(-self.rows // self.kernels.rows)
        # one call's splits are those of the codes, then those of the exact tokens
        exact_splits = max(-(-self.slots // EXACT_TILE), int(static))
        self.code_splits = count_splits(self.kernels.wave, self.pairs * self.row_tiles, self.blocks, MAX_SPLITS)
        self.splits = self.code_splits + exact_splits
        scratch = NewScratch(query.device) if static else scratch_of(query.device)
        results = self.pairs * self.rows * self.splits
        self.partial = scratch.get("partial", results * self.value_dim)
        self.stats = scratch.get("stats", results * 2)
        self.operands = scratch.get("operands", self.pairs * self.rows * self.kernels.operand_bytes)
        self.constants = scratch.get("constants", self.pairs * self.rows * 8)
        other = query.device.type == "cuda" and query.device.index != torch.cuda.current_device()
        self.device_guard = torch.cuda.device(query.device) if other else _NO_GUARD

    def prepare(self, scaling: float, logits: torch.Tensor | None = None) -> None:
        """Turns the query and attends to exact tokens, or writes their `logits`."""
        kernels, keys, states = self.kernels, self.key_constants, self.states
        quantizer = states.quantizers["keys"]
        operators = keys.query_operators(quantizer, kernels.operator_dtype)
        launch = kernels.prepare if logits is None else kernels.prepare_scores
        key_states, value_states = states.exact["keys"], states.exact["values"]
        tiles = -(-self.rows // 16)
        # rows that share an operator fill tiles of 16 together
        query_tiles = -(-self.pairs * self.rows // 16) if keys.heads == 1 else self.pairs * tiles
        exact_tiles = self.pairs * tiles * (self.splits - self.code_splits)
        launch(
            (kernels.terms * query_tiles + exact_tiles, 1, 1),
            self.query,
            operators,
            operators if quantizer.scale is None else quantizer.scale,
            operators if quantizer.mean is None else quantizer.mean,
            self.operands,
            self.constants,
            key_states,
            value_states,
            self.mask,
            self.partial,
            self.stats,
            self.partial if logits is None else logits,
            *self.query.stride()[:3],
            *self.mask_strides,
            self.query_length,
            self.groups,
            self.kv_heads,
            keys.heads,
            1 if quantizer.scale is None else len(quantizer.scale),
            1 if quantizer.mean is None else len(quantizer.mean),
            self.lengths[3],
            self.recent_start,
            states.sink_length,
            states.ring,
            states.phase,
            self.slots,
            key_states.stride(1),
            value_states.stride(1),
            self.pairs,
            self.splits,
            self.code_splits,
            scaling,
            self.softcap,
            keys.scale,
            keys.offset,
        )

    def attend(self) -> None:
        """Attends to the codes, split by split."""
        if not self.code_splits:
            return
        self.kernels.attend(
            (self.code_splits * self.row_tiles, self.pairs, 1),
            self.operands,
            self.constants,
            *self.key_planes,
            self.key_constants.tables,
            *self.value_planes,
            self.value_constants.tables,
            self.mask,
            self.partial,
            self.stats,
            *self.mask_strides,
            *self.lengths,
            self.key_blocks,
            self.value_blocks,
            self.row_tiles,
            self.splits,
            self.code_splits,
            self.softcap,
        )

    def combine(self, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """Merges the splits, turns values back."""
        query, values, kernels = self.query, self.value_constants, self.kernels
        quantizer = self.states.quantizers["values"]
        dual = values.dual_operator(quantizer, kernels.dual_dtype)
        heads = self.groups * self.kv_heads
        # where the model wants it: heads next to each other
        out = query.new_empty((query.shape[0], self.query_length, heads, self.value_dim))
        launch = kernels.combine(self.code_splits, sinks is not None)
        launch(
            (self.pairs * self.rows, -(-self.value_dim // COMBINE_COLUMNS), 1),
            self.partial,
            self.stats,
            dual,
            dual if quantizer.mean is None else quantizer.mean,
            self.partial if sinks is None else sinks,
            out,
            self.rows,
            self.query_length,
            self.groups,
            self.kv_heads,
            values.heads,
            1 if quantizer.mean is None else len(quantizer.mean),
            self.splits,
            self.code_splits,
            self.query_length * heads * self.value_dim,
            self.value_dim,
            heads * self.value_dim,
            values.scale,
        )
        return out.transpose(1, 2)

    def scores(self, out: torch.Tensor) -> None:
        """Writes the logits of the codes."""
        chunks = -(-self.blocks // self.kernels.score_blocks)
        if not chunks:
            return
        self.kernels.scores(
            (chunks * self.row_tiles, self.pairs, 1),
            self.operands,
            self.constants,
            *self.key_planes,
            self.key_constants.tables,
            self.mask,
            out,
            *self.mask_strides,
            *self.lengths,
            self.key_blocks,
            self.row_tiles,
            self.softcap,
        )


def _planes(quantizer: Quantizer, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The 4-bit or 2-bit plane, the 1-bit plane (at 3 bits, else any tensor) and the scales."""
    wide = tensors["plane4" if quantizer.nbits == 4 else "plane2"]
    return wide, tensors["plane1"] if quantizer.nbits == 3 else wide, tensors["scales"]


def _mask(mask: torch.Tensor | None, query: torch.Tensor):
    """Mask, strides with zeros where it is broadcast, and its dtype; without one any tensor, to have a pointer."""
    if mask is None:
        return query, (0, 0, 0, 0), None
    strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    return (mask.view(torch.uint8), strides, mask.dtype) if mask.dtype == torch.bool else (mask, strides, mask.dtype)


class _NoGuard:
    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


_NO_GUARD = _NoGuard()
