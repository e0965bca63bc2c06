"""Attention and scores straight from the codes: the launchers of `attention_kernels`."""

from functools import cache, lru_cache
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton
import triton.language as tl

from ..packing import BLOCK
from ..quantizer import Quantizer
from .attention_kernels import attend_kernel, combine_kernel, prepare_kernel, scores_kernel
from .ptx import key_snippet, value_snippet

LOG2E = 1.4426950408889634
# a combine program reads the maxima of all splits at once
MAX_SPLITS = 256
# exact slots of one program
EXACT_TILE = 64
# rows of one matrix product: 8 is the narrowest of NVIDIA's, 16 what every GPU has
ROWS, PORTABLE_ROWS = 8, 16
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
INTERPRETED = triton.knobs.runtime.interpret


def supports(query: torch.Tensor, states, **_) -> str | None:
    """`None` if the kernels can serve this call, else the reason why not, in words. Reads no device memory."""
    for role in ("keys", "values"):
        quantizer, exact = states.quantizers[role], states.exact[role]
        if quantizer.nbits not in (2, 3, 4):
            return f"the kernels read 2, 3 and 4 bits, and the {role} have {quantizer.nbits}"
        if quantizer.head_dim % 16 or not 32 <= quantizer.head_dim <= 256:
            return f"the kernels take a head_dim of 32 to 256 in steps of 16, and the {role} have {quantizer.head_dim}"
        if exact.dtype not in DTYPES or not exact.is_contiguous() or exact.storage_offset():
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
        self.padded_rows = -(-self.rows // 16) * 16
        length = states.codes["keys"].length
        self.blocks = -(-length // BLOCK)
        self.lengths = (self.query_length, self.groups, self.kv_heads, states.kv_len, states.sink_length, length)
        self.slots = min(states.sink_length + states.ring, states.exact["keys"].shape[2])
        self.value_dim = values.head_dim
        self.key_constants, self.value_constants = _constants(keys), _constants(values)
        self.key_planes = _planes(keys, key_codes) + (key_codes.get("residual_norms", scales),)
        self.value_planes = _planes(values, value_codes)
        self.mask, self.mask_strides, mask_kind = _mask(attention_mask, self.query)
        self.softcap = 1.0 if softcap is None else softcap * LOG2E
        self.kernels = _kernels(
            query.device,
            _is_portable(query.device) if portable is None else portable,
            query.dtype,
            states.exact["keys"].dtype,
            (keys.nbits, keys.estimator == "qjl", keys.head_dim, keys.mean is not None, keys.codebook),
            (values.nbits, values.head_dim, values.mean is not None, values.codebook),
            mask_kind,
            # the last query sees everything
            is_causal and self.query_length > 1,
            softcap is not None,
        )
        self.row_tiles = -(-self.rows // self.kernels.rows)
        # one call's splits are those of the codes, then those of the exact tokens
        self.code_splits = _splits(self.kernels.wave, self.pairs * self.row_tiles, self.blocks)
        self.splits = self.code_splits - (-self.slots // EXACT_TILE)
        scratch = _scratch(query.device)
        results = self.pairs * self.rows * self.splits
        self.partial = scratch.get("partial", results * self.value_dim)
        self.stats = scratch.get("stats", results * 2)
        self.operands = scratch.get("operands", self.pairs * self.padded_rows * self.kernels.operand_bytes)
        self.constants = scratch.get("constants", self.pairs * self.padded_rows * 8)
        other = query.device.type == "cuda" and query.device.index != torch.cuda.current_device()
        self.device_guard = torch.cuda.device(query.device) if other else _NO_GUARD

    def prepare(self, scaling: float, logits: torch.Tensor | None = None) -> None:
        """Turns the query and attends to exact tokens, or writes their `logits`."""
        kernels, keys, states = self.kernels, self.key_constants, self.states
        launch = kernels.prepare if logits is None else kernels.prepare_scores
        key_states, value_states = states.exact["keys"], states.exact["values"]
        launch(
            (kernels.terms + self.splits - self.code_splits, self.padded_rows // 16, self.pairs),
            self.query,
            keys.query_operators(kernels.operator_dtype),
            keys.mean,
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
            keys.mean_heads,
            states.kv_len,
            states.recent_start,
            states.sink_length,
            states.ring,
            states.phase,
            self.slots,
            key_states.stride(1),
            value_states.stride(1),
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
            self.padded_rows,
            self.splits,
            self.code_splits,
            self.softcap,
        )

    def combine(self, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """Merges the splits, turns values back."""
        query, values, kernels = self.query, self.value_constants, self.kernels
        heads = self.groups * self.kv_heads
        # where the model wants it: heads next to each other
        out = query.new_empty((query.shape[0], self.query_length, heads, self.value_dim))
        launch = kernels.combine(self.pairs * self.rows, self.splits, sinks is not None)
        launch(
            (self.pairs * self.rows, -(-self.value_dim // launch.constants["COLUMNS"]), 1),
            self.partial,
            self.stats,
            values.dual,
            values.mean,
            self.partial if sinks is None else sinks,
            out,
            self.rows,
            self.query_length,
            self.groups,
            self.kv_heads,
            values.heads,
            values.mean_heads,
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
            self.padded_rows,
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


class _Constants:
    """The constants of a quantizer as the kernels read them."""

    def __init__(self, quantizer: Quantizer):
        dual, mean = quantizer.dual.float(), quantizer.mean
        codebook = quantizer.codebook
        self.heads = dual.shape[0]
        self._operators: dict[torch.dtype, torch.Tensor] = {}
        self.scale, self.offset = codebook.scale, codebook.offset
        table = np.zeros((2, 16), dtype=np.float32)
        if quantizer.role == "keys":
            # what a row of queries is multiplied with
            self.factors = [dual.mT]
            table[0, : 2**quantizer.nbits] = np.tile(codebook.levels, 2 ** (quantizer.nbits - quantizer.code_bits))
            if quantizer.sketch is not None:
                self.factors.append(dual.double().mT @ quantizer.sketch.double().mT)
                # the sign is the highest bit of the code; the operand is 1 where it is minus
                table[1, : 2**quantizer.code_bits] = 1
            self.tables = torch.from_numpy(table.astype(np.int8)).to(dual.device)
        else:
            table[0, : 2**quantizer.nbits] = codebook.levels + codebook.offset
            self.tables = torch.from_numpy(table).to(dual.device)
        self.dual = dual.contiguous()
        self.mean = self.dual if mean is None else mean.float().contiguous()
        self.mean_heads = 1 if mean is None else mean.shape[0]

    def query_operators(self, dtype: torch.dtype) -> torch.Tensor:
        """`[operators, passes, heads, head_dim, head_dim]`: see `prepare_kernel`."""
        operators = self._operators.get(dtype)
        if operators is None:
            passes = []
            for factor in self.factors:
                high = factor.to(dtype)
                passes.append(
                    [high] if dtype == torch.float32 else [high, ((factor - high.to(factor.dtype)) * 2048).to(dtype)]
                )
            operators = self._operators[dtype] = torch.stack([torch.stack(p) for p in passes]).contiguous()
        return operators


_CONSTANTS: WeakKeyDictionary[Quantizer, _Constants] = WeakKeyDictionary()


def _constants(quantizer: Quantizer) -> _Constants:
    constants = _CONSTANTS.get(quantizer)
    if constants is None:
        constants = _CONSTANTS[quantizer] = _Constants(quantizer)
    return constants


class _Scratch:
    """Memory between the launches of a call, shared by all layers of one device and stream."""

    dtypes = {"operands": torch.int8}

    def __init__(self, device: torch.device):
        self.device = device
        self.tensors: dict[str, torch.Tensor] = {}
        # a captured graph may go on writing to what was outgrown
        self.outgrown: list[torch.Tensor] = []

    def get(self, name: str, size: int) -> torch.Tensor:
        tensor = self.tensors.get(name)
        if tensor is None or tensor.numel() < size:
            if tensor is not None:
                self.outgrown.append(tensor)
            dtype = self.dtypes.get(name, torch.float32)
            tensor = torch.empty(max(2**18, triton.next_power_of_2(size)), dtype=dtype, device=self.device)
            self.tensors[name] = tensor
        return tensor


_SCRATCH: dict[tuple, _Scratch] = {}


def _scratch(device: torch.device) -> _Scratch:
    key = (device, torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0)
    scratch = _SCRATCH.get(key)
    if scratch is None:
        scratch = _SCRATCH[key] = _Scratch(device)
    return scratch


@cache
def _is_portable(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip:
        return True
    return torch.cuda.get_device_capability(device) < (8, 0)


@cache
def _splits(wave: int, programs: int, blocks: int) -> int:
    """Splits of a sequence of `blocks` blocks so that `programs * splits` fills whole waves of `wave` programs."""
    best = 1
    for waves in (1, 2, 3, 4):
        splits = waves * wave // programs
        if splits and splits * programs > 0.9 * waves * wave:
            best = splits
            break
        best = max(best, splits)
    # two blocks at least: a program has to start, load its query and store what it found
    return max(min(best, -(-blocks // 2), MAX_SPLITS - 64), min(blocks, 1))


class _Launcher:
    """A kernel with its compile-time arguments, compiled on the first call; later calls skip Triton's dispatch."""

    def __init__(self, kernel, constants: dict, **options):
        self.kernel, self.constants, self.options = kernel, constants, options
        self.compiled = None
        self.values = tuple(constants.values())

    def compile(self, *args):
        if self.compiled is None and not INTERPRETED:
            self.compiled = self.kernel.warmup(*args, **self.constants, **self.options, grid=(1,))
            self.compiled._init_handles()
        return self.compiled

    def __call__(self, grid: tuple[int, int, int], *args) -> None:
        if INTERPRETED:
            self.kernel[grid](*args, **self.constants)
            return
        if self.compiled is None:
            self.compile(*args)
        self.compiled[grid](*args, *self.values)


class _Kernels:
    """The kernels of one configuration: everything that is known at compile time, and what follows from it."""

    def __init__(self, device, portable, query_dtype, exact_dtype, keys, values, mask_dtype, causal, softcap):
        key_bits, qjl, key_dim, key_mean, key_codebook = keys
        value_bits, value_dim, value_mean, value_codebook = values
        exact_dot = tl.float32 if INTERPRETED or torch.float32 in (query_dtype, exact_dtype) else DTYPES[query_dtype]
        count = 2 if key_bits == 4 else 4
        # matrix products of int8 are 32 deep or more
        width = max(32, triton.next_power_of_2(key_dim // count))
        parts = 2 if value_bits == 4 else 4
        halves = 2 if value_bits == 3 else 1
        value_rows = max(16, triton.next_power_of_2(value_dim // halves))
        self.device = device
        self.rows = PORTABLE_ROWS if INTERPRETED or torch.version.hip else ROWS
        self.terms = 1 + qjl
        self.operator_dtype = torch.float32 if exact_dot == tl.float32 else query_dtype
        self.operand_bytes = self.terms * 2 * count * width
        self.score_blocks = 4
        # a warp's share of a product is at least 16 tokens or 16 dimensions
        warps = max(1, min(4, 128 // parts // 16, value_rows // 16))
        empty = ("", "")
        key_text, value_text = (
            (empty, empty)
            if portable
            else (key_snippet(key_bits, qjl, key_codebook), value_snippet(value_bits, value_codebook))
        )
        dot = tl.float32 if INTERPRETED else tl.float16
        mask = {
            "MASK": 0 if mask_dtype is None else 1 if mask_dtype == torch.bool else 2,
            "CAUSAL": causal,
            "SOFTCAP": softcap,
        }
        codes = {"DIM": key_dim, "WIDTH": width, "KEY_BITS": key_bits, "QJL": qjl}
        prepare = {
            "DIM": key_dim,
            "DIM_PAD": count * width,
            "VALUE_DIM": value_dim,
            "VALUE_PAD": triton.next_power_of_2(value_dim),
            "BITS": key_bits,
            "WIDTH": width,
            "TERMS": self.terms,
            "PASSES": 1 if exact_dot == tl.float32 else 2,
            "TILE": EXACT_TILE,
            "MEAN": key_mean,
            **mask,
        }
        last = {
            "DOT": exact_dot,
            "PRECISION": "tf32x3" if not portable and exact_dot == tl.float32 else "ieee",
            "ASM": not portable,
        }
        self.prepare = _Launcher(prepare_kernel, {**prepare, "SCORES": False, **last}, num_warps=8)
        self.prepare_scores = _Launcher(prepare_kernel, {**prepare, "SCORES": True, **last}, num_warps=8)
        self.attend = _Launcher(
            attend_kernel,
            {
                **codes,
                "VALUE_DIM": value_dim,
                "VALUE_ROWS": value_rows,
                "VALUE_BITS": value_bits,
                "PARTS": parts,
                "ROWS": self.rows,
                "MEAN": key_mean,
                **mask,
                "DOT": dot,
                "ASM": not portable,
                "KEY_SNIPPET": key_text[0],
                "KEY_CONSTRAINTS": key_text[1],
                "VALUE_SNIPPET": value_text[0],
                "VALUE_CONSTRAINTS": value_text[1],
            },
            num_warps=warps,
            num_stages=3,
        )
        self.scores = _Launcher(
            scores_kernel,
            {
                **codes,
                "PARTS": 2,
                "ROWS": self.rows,
                "MEAN": key_mean,
                **mask,
                "ASM": not portable,
                "SNIPPET": key_text[0],
                "CONSTRAINTS": key_text[1],
                "BLOCKS": self.score_blocks,
            },
            num_warps=4,
            num_stages=3,
        )
        self.warps = warps
        self.portable, self.value_dim, self.value_mean = portable, value_dim, value_mean
        self._combine: dict[tuple, _Launcher] = {}
        self._wave = None
        self._mask_dtype = mask_dtype or query_dtype

    def combine(self, rows: int, splits: int, sinks: bool) -> _Launcher:
        # few rows: many small programs
        columns = min(32 if rows <= 128 else 64, triton.next_power_of_2(self.value_dim))
        chunk = 16 if splits <= 16 else 32
        launcher = self._combine.get((columns, chunk, sinks))
        if launcher is None:
            constants = {
                "DIM": self.value_dim,
                "DIM_PAD": triton.next_power_of_2(self.value_dim),
                "COLUMNS": columns,
                "CHUNK": chunk,
                "MEAN": self.value_mean,
                "SINKS": sinks,
                "ASM": not self.portable,
            }
            launcher = _Launcher(combine_kernel, constants, num_warps=4 if chunk == 16 else 8)
            self._combine[columns, chunk, sinks] = launcher
        return launcher

    @property
    def wave(self) -> int:
        """Programs of `attend` that the device runs at a time."""
        if self._wave is None:
            self._wave = 8 if INTERPRETED else self._count_wave()
        return self._wave

    def _count_wave(self) -> int:
        byte, wide = torch.uint8, torch.float32
        scale = torch.bfloat16
        pointers = (torch.int8, wide, byte, byte, scale, scale, torch.int8, byte, byte, scale, wide)
        compiled = self.attend.compile(*pointers, self._mask_dtype, wide, wide, *[1] * 16, 1.0)
        properties = torch.cuda.get_device_properties(self.device)
        # registers come in steps of 8 per thread, and each quarter of a multiprocessor has a quarter of them
        registers = -(-compiled.n_regs // 8) * 8 * properties.warp_size
        warps = 4 * (properties.regs_per_multiprocessor // 4 // registers)
        shared = properties.shared_memory_per_multiprocessor // (compiled.metadata.shared + 1024)
        return max(1, min(warps // self.warps, shared)) * properties.multi_processor_count


_kernels = lru_cache(maxsize=None)(_Kernels)
