"""Attention and scores straight from the codes, in three and two kernel launches."""

from itertools import chain

import torch

from ..packing import BLOCK
from ..plans import Plan
from ..quantizer import ROLES
from ..states import AttentionOptions, LayerStates
from .attention_plan import (
    CODED_SPLITS,
    COMBINE_COLUMNS,
    EXACT_TILE,
    ROWS,
    NewScratch,
    constants_of,
    count_splits,
    is_portable,
    kernels_for,
    scratch_of,
)
from .launch import DTYPES, INTERPRETED, is_only_compiling, on_other_device, stream_of

LOG2E = 1.4426950408889634

# The launches of attention, in order.
LAUNCHES = "prepare", "attend", "combine"


def supports(query: torch.Tensor, states: LayerStates) -> str | None:
    """`None` if the kernels support this call, else the reason why not, in words. Reads no device memory."""
    reason = _decline(states)
    if reason is not None:
        return reason
    if query.dtype not in DTYPES:
        return f"the query is {query.dtype}"
    if query.device.type != "cuda" and not INTERPRETED:
        return f"the tensors are on {query.device.type}"
    return None


def _decline(states: LayerStates) -> str | None:
    for role in ROLES:
        quantizer, exact = states.quantizers[role], states.exact[role]
        if quantizer.head_dim % 16 or not 32 <= quantizer.head_dim <= 256:
            return f"the kernels take a head_dim of 32 to 256 in steps of 16, and the {role} have {quantizer.head_dim}"
        if exact.dtype not in DTYPES or not exact.is_contiguous() or exact.data_ptr() % 16:
            return f"the exact {role}, of {exact.dtype}, are not contiguous and aligned fp16, bf16 or fp32"
    return None


def attention(
    query: torch.Tensor,
    states: LayerStates,
    options: AttentionOptions,
    portable: bool | None = None,
    launches: tuple[str, ...] = LAUNCHES,
) -> torch.Tensor:
    """
    [`ops.attention`] in three launches: query and exact tokens | codes | merge and rotate back.

    Args:
        portable (`bool`, *optional*): run the kernels without inline assembly; by default only if it cannot run.
        launches (`tuple[str, ...]`): for timing, the launches to do; an earlier call must have done the others.
    """
    query = query if query.stride(3) == 1 else query.contiguous()
    mask, mask_kind = _mask(options.attention_mask, query)
    return _plan(query, states, options, mask_kind, portable).run(query, states, options, mask, launches)


def attention_again(query: torch.Tensor, states: LayerStates, options: AttentionOptions) -> torch.Tensor | None:
    """[`attention`] without a mask if an earlier call prepared a plan for the same buffers; else `None`."""
    plan = states.plans.get(_key(query, options, _NO_MASK, None))
    return plan.run(query, states, options, (query, 0, 0, 0, 0)) if plan is not None and plan.fits(states) else None


def warm(states: LayerStates) -> None:
    """See `ops.warm`."""
    if _decline(states) is not None:
        # The reference has no constants of its own.
        return
    keys, values = states.quantizers["keys"], states.quantizers["values"]
    constants_of(keys).query_matrices(keys, is_portable(keys.dual.device))
    constants_of(values).dual_operator(values, torch.float16)
    if keys.annealing is not None:
        constants_of(keys).search_operator(keys)


def scores(
    query: torch.Tensor, states: LayerStates, options: AttentionOptions, portable: bool | None = None
) -> torch.Tensor:
    """[`ops.scores`] in two launches: rotate the query | logits."""
    query = query if query.stride(3) == 1 else query.contiguous()
    mask, mask_kind = _mask(options.attention_mask, query)
    plan = _plan(query, states, options, mask_kind, portable)
    out = torch.empty((*query.shape[:3], states.kv_len), dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        plan.run_scores(query, states, options, mask, out)
    return out


def _plan(query, states: LayerStates, options: AttentionOptions, mask_kind: tuple, portable) -> "AttentionPlan":
    key = _key(query, options, mask_kind, portable)
    # With a fixed capacity, a captured graph may hold no memory but its own.
    plans = states.plans if states.counters is None else None
    plan = None if plans is None else plans.get(key)
    if plan is None or not plan.fits(states):
        # Compiled kernels belong to a device.
        with torch.cuda.device_of(query):
            plan = AttentionPlan(query, states, options, mask_kind, portable)
        if plans is not None:
            plans.keep(key, plan, states)
    return plan


class AttentionPlan(Plan):
    """
    What calls on the same buffers share while the codes fill the same blocks: in a decode step everything but the
    lengths is ready.

    Args:
        query, states, options, portable: as for [`attention`]; of the options only those that [`_key`] tells apart.
        mask_kind (`tuple`): see [`_mask`].
    """

    def __init__(self, query, states: LayerStates, options: AttentionOptions, mask_kind: tuple, portable):
        keys, values = states.quantizers["keys"], states.quantizers["values"]
        self.stream = stream_of(query.device)
        super().__init__(states)
        batch, heads, query_length, _ = query.shape
        # The layout that the model needs: heads next to each other.
        width = heads * values.head_dim
        self.out_shape = batch, heads, query_length, values.head_dim
        self.out_strides = query_length * width, values.head_dim, width, 1
        kv_heads = self.key_codes["scales"].shape[1]
        self.sizes = query_length, heads // kv_heads, kv_heads
        self.pairs, self.rows = batch * kv_heads, heads // kv_heads * query_length
        self.blocks = -(-states.quantized // BLOCK)
        portable = is_portable(query.device) if portable is None else portable
        matrices = constants_of(keys).query_matrices(keys, portable)
        # With a fixed capacity the kernels read the lengths from device memory, and these are upper bounds.
        static = states.counters is not None
        self.kernels = kernels = kernels_for(
            query.device,
            portable,
            query.dtype,
            tuple(exact.dtype for exact in states.exact.values()),
            (keys.nbits, keys.estimator == "qjl", keys.head_dim, matrices.shape[1], keys.codebook),
            (values.nbits, values.head_dim, values.mean is not None, values.codebook),
            mask_kind,
            # A single query sees everything.
            options.is_causal and query_length > 1,
            options.softcap is not None,
            self.rows <= ROWS // 2,
            static,
        )
        self.row_tiles = -(-self.rows // kernels.rows)
        self.rotations = self.pairs * self.row_tiles
        # Partial results are those of the splits of the codes, then those of the tiles of exact tokens.
        self.slots = min(states.sink_length + states.ring, states.exact["keys"].shape[2])
        self.exact_tiles = max(-(-self.slots // EXACT_TILE), int(static))
        self.code_splits = count_splits(kernels.wave, self.rotations, self.blocks, CODED_SPLITS[-1])
        self.chunks = -(-self.blocks // kernels.score_blocks)
        # Longer contexts, with more splits, need other sizes, which are compiled ahead.
        sizes = CODED_SPLITS if is_only_compiling() else (self.code_splits,)
        self.combines = [kernels.combine(size, options.sinks is not None) for size in sizes]
        self.prepare_grid = self.rotations * (1 + self.exact_tiles), 1, 1
        self.attend_grid = self.code_splits * self.row_tiles, self.pairs, 1
        self.combine_grid = self.pairs * self.rows, -(-values.head_dim // COMBINE_COLUMNS), 1
        self._fix(query.stride()[:3], states, matrices, NewScratch if static else scratch_of)
        # Whether everything is compiled: launches then take addresses.
        self.compiled = False

    def _fix(self, strides: tuple, states: LayerStates, matrices: torch.Tensor, kind) -> None:
        """For each launch, the arguments that stay the same from call to call, as tensors and as addresses."""
        keys, values = states.quantizers["keys"], states.quantizers["values"]
        key_constants, value_constants = constants_of(keys), constants_of(values)
        scales, held = self.key_codes["scales"], states.exact["keys"].shape[2]
        splits = self.code_splits + self.exact_tiles
        scratch, rows = kind(matrices.device), self.pairs * self.rows
        partial = scratch.get("partial", rows * splits * values.head_dim)
        stats = scratch.get("stats", rows * splits * 2)
        operands = scratch.get("operands", rows * self.kernels.operand_bytes)
        constants = scratch.get("constants", rows * 8)
        factors = [x if x is not None else key_constants.neutral[i] for i, x in enumerate((keys.scale, keys.mean))]
        key_planes = _planes(self.key_codes) + (self.key_codes.get("residual_norms", scales),)
        of_keys = operands, constants, *key_planes, key_constants.tables
        (_, *units), (_, *sketch_units) = key_constants.hosted[0], key_constants.hosted[-1]
        units = key_constants.scale, key_constants.offset, *map(float, chain(*zip(units, sketch_units, strict=True)))
        dual = value_constants.dual_operator(values, self.kernels.dual_dtype)
        exact = states.sink_length, states.ring, self.slots, held
        self.fixed_prepare = self.kernels.prepare.fix(
            (states.counters, matrices, *factors, operands, constants, *states.exact.values(), partial, stats)
            + (*strides, *self.sizes, *map(len, factors), *exact, self.row_tiles, self.pairs, splits)
            + (self.code_splits, *units)
        )
        self.fixed_attend = self.kernels.attend.fix(
            (states.counters, *of_keys, *_planes(self.value_codes), value_constants.tables, partial, stats)
            + (*self.sizes, states.sink_length, scales.shape[2], self.value_codes["scales"].shape[2])
            + (self.row_tiles, splits, self.code_splits)
        )
        self.fixed_combine = self.combines[0].fix(
            (partial, stats, dual, dual if values.mean is None else values.mean, self.rows, *self.sizes)
            + (1 if values.mean is None else len(values.mean), splits, self.code_splits)
            + (*self.out_strides[:3], value_constants.scale)
        )
        self.fixed_scores = self.kernels.scores.fix(
            (*of_keys, states.exact["keys"], *strides, *self.sizes, *exact)
            + (scales.shape[2], self.row_tiles, self.exact_tiles)
        )

    def fits(self, states: LayerStates) -> bool:
        """Whether these are the same buffers and the codes fill the same blocks."""
        return self.blocks == -(-states.quantized // BLOCK) and super().fits(states)

    def run(self, query, states: LayerStates, options: AttentionOptions, mask: tuple, launches=LAUNCHES):
        """
        See [`attention`].

        Args:
            mask (`tuple`): a tensor and its four strides, see [`_mask`].
        """
        if on_other_device(query.device):
            with torch.cuda.device(query.device):
                return self.run(query, states, options, mask, launches)
        compiled, stream = self.compiled, self.stream
        at = torch.Tensor.data_ptr if compiled else _itself
        scaling, sinks = options.scaling, options.sinks
        softcap = 1.0 if options.softcap is None else options.softcap * LOG2E
        mask = at(mask[0]), *mask[1:]
        lengths = states.kv_len, states.quantized
        if "prepare" in launches:
            args = at(query), *mask, *lengths, states.phase, scaling, softcap
            self.kernels.prepare(self.prepare_grid, stream, args, self.fixed_prepare[compiled])
        if self.code_splits and "attend" in launches:
            args = *mask, *lengths, softcap
            self.kernels.attend(self.attend_grid, stream, args, self.fixed_attend[compiled])
        out = query.new_empty_strided(self.out_shape, self.out_strides)
        if "combine" in launches:
            args = at(query if sinks is None else sinks), at(out)
            for combine in self.combines:
                combine(self.combine_grid, stream, args, self.fixed_combine[compiled])
        self.compiled = not INTERPRETED and launches is LAUNCHES and not is_only_compiling()
        return out

    def run_scores(self, query, states: LayerStates, options: AttentionOptions, mask: tuple, out) -> None:
        """Writes the logits of exact tokens and of codes to `out`; arguments as for [`run`]."""
        scaling, softcap = options.scaling, 1.0 if options.softcap is None else options.softcap * LOG2E
        lengths = states.kv_len, states.quantized, states.phase
        args = query, *mask, *lengths, scaling, softcap
        self.kernels.prepare((self.rotations, 1, 1), self.stream, args, self.fixed_prepare[0])
        args += (out,)
        grid = (self.exact_tiles + self.chunks) * self.row_tiles, self.pairs, 1
        self.kernels.scores(grid, self.stream, args, self.fixed_scores[0])


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _planes(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The widest plane, the 1-bit plane (at 3 bits, else any tensor) and the scales."""
    planes = [tensor for name, tensor in tensors.items() if name.startswith("plane")]
    return planes[0], planes[-1], tensors["scales"]


# The kind of a mask: its dtype, and whether all heads and queries share one.
_NO_MASK = None, False


def _key(query, options: AttentionOptions, mask_kind: tuple, portable) -> tuple:
    """Everything but the buffers that a plan depends on."""
    kind = mask_kind, options.is_causal, options.softcap is None, options.sinks is None, portable
    # Scratch memory belongs to a stream.
    return query.shape, query.stride(), query.dtype, query.device, stream_of(query.device), kind


def _mask(mask: torch.Tensor | None, query: torch.Tensor) -> tuple[tuple, tuple]:
    """
    Mask and strides, with zeros where it is broadcast, and its kind: dtype, and whether all heads and queries of a
    sequence share a mask that is contiguous along tokens. Without a mask, any tensor serves as a pointer.
    """
    if mask is None:
        return (query, 0, 0, 0, 0), _NO_MASK
    strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    kind = mask.dtype, strides[1:] == (0, 0, 1)
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask, *strides), kind
