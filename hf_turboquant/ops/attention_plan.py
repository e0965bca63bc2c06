"""What is prepared before a call: compiled kernels, the constants of quantizers, scratch memory."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakIdKeyDictionary

from ..packing import codes_per_byte
from ..quantizer import Quantizer
from .attention_kernels import attend_kernel, combine_kernel
from .launch import DTYPES, INTERPRETED, Launcher, is_only_compiling, overlaps, stream_of
from .prepare_kernel import prepare_kernel
from .ptx import level_snippet, operand_offsets, value_snippet
from .scores_kernel import scores_kernel

# Sizes of `combine_kernel`, which merges the splits of the codes in one step; the last is the most splits there are.
CODED_SPLITS = 4, 16, 64
# Output columns of one program of `combine_kernel`: with fewer, partial sums are read more often; more take longer.
COMBINE_COLUMNS = 64
# Exact slots of one program.
EXACT_TILE = 64
# Rows of one matrix product: 8 is the least on NVIDIA GPUs, 16 works on every GPU.
ROWS, PORTABLE_ROWS = 8, 16


class QuantizerConstants:
    """
    What the kernels read of a quantizer, except its mean and scale, which they read in place. Quantizers that
    conditioning makes from the same one share it.
    """

    def __init__(self, quantizer: Quantizer):
        codebook, sketch = quantizer.codebook, quantizer.sketch
        matrices = [quantizer.dual[0].double()]
        if sketch is not None:
            matrices.append(sketch.double() @ matrices[0])
        # A⁻ᵀ and S A⁻ᵀ with the units of their integers. On the host, looking at them makes nothing wait, and in numpy,
        # because torch's threads would go on to spin on the cores that compile kernels.
        self.hosted = [_integers(matrix.cpu().numpy()) for matrix in matrices]
        # Scale and mean of keys that have none.
        shape = 1, 1, quantizer.head_dim
        self.neutral = quantizer.dual.new_ones(shape), quantizer.dual.new_zeros(shape)
        self._matrices: dict[tuple, torch.Tensor] = {}
        self.scale, self.offset = codebook.scale, codebook.offset
        table = np.zeros((2, 2 ** max(4, quantizer.nbits)), dtype=np.float32)
        if quantizer.role == "keys":
            table[0, : 2**quantizer.nbits] = np.tile(codebook.levels, 2 ** (quantizer.nbits - quantizer.code_bits))
            if quantizer.sketch is not None:
                # The sign is the highest bit of the code; the operand is 1 where it is minus.
                table[1, : 2**quantizer.code_bits] = 1
            table = table.astype(np.int8)
        else:
            table[0, : 2**quantizer.nbits] = codebook.levels + codebook.offset
        self.tables = torch.from_numpy(table).to(quantizer.dual.device)

    def dual_operator(self, quantizer: Quantizer, dtype: torch.dtype) -> torch.Tensor:
        """A⁻ᵀ in another dtype."""
        if dtype == quantizer.dual.dtype:
            # Not kept: the weak dictionary's values would keep their own key alive.
            return quantizer.dual
        return self._keep("dual", dtype, lambda: quantizer.dual.to(dtype))

    def query_matrices(self, quantizer: Quantizer, portable: bool) -> torch.Tensor:
        """The matrices that `rotate_query` reads."""

        def make() -> torch.Tensor:
            order = operand_dimensions(quantizer.nbits, quantizer.head_dim, portable)
            inner = order >= 0
            shape = len(self.hosted), 2, len(order), triton.next_power_of_2(quantizer.head_dim)
            out = np.zeros(shape, dtype=np.int8)
            for (matrix, unit, _), to in zip(self.hosted, out, strict=True):
                integers = np.round(matrix / unit)
                high = np.floor((integers + 64) / 128)
                to[0, inner, : quantizer.head_dim] = high[order[inner]]
                to[1, inner, : quantizer.head_dim] = (integers - 128 * high)[order[inner]]
            # Integers below 64 need no high terms.
            return torch.from_numpy(out[:, int(not out[:, 0].any()) :]).to(quantizer.dual.device)

        return self._keep("query", portable, make)

    def search_operator(self, quantizer: Quantizer) -> torch.Tensor:
        """S √d, used to search codes and signs: entries of size one, which 16 bits hold exactly."""
        dtype = torch.float32 if INTERPRETED else torch.float16
        return self._keep("search", dtype, lambda: (quantizer.sketch * quantizer.head_dim).to(dtype))

    def decode_levels(self, quantizer: Quantizer, dtype: torch.dtype) -> torch.Tensor:
        """The codebook in multiples of its scale."""
        return self._keep("levels", dtype, lambda: (quantizer.centroids / self.scale).to(dtype))

    def decode_operators(self, quantizer: Quantizer, dtype: torch.dtype) -> torch.Tensor:
        """The matrices that multiply rotated vectors and signs, A⁻ᵀ and κS A⁻ᵀ, `[operators, head_dim, head_dim]`."""

        def make() -> torch.Tensor:
            matrices = np.stack([matrix for matrix, _, _ in self.hosted])
            return torch.from_numpy(matrices).to(quantizer.dual.device, dtype)

        return self._keep("decode", dtype, make)

    def _keep(self, name: str, kind, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        matrices = self._matrices.get((name, kind))
        if matrices is None:
            matrices = self._matrices[name, kind] = make().contiguous()
        return matrices


def _integers(matrix: np.ndarray) -> tuple[np.ndarray, float, float]:
    """
    A matrix, the unit in which its entries are integers of at most 14 bits, and a bound on the coordinates of its
    product with a vector of norm one. Rotations and sketches by Hadamard matrices, and their products, are multiples of
    a unit that leaves integers of 7 bits.
    """
    # After a random rotation, six standard deviations are never reached.
    bound = float(np.linalg.norm(matrix, axis=1).max()) * min(1, 6 / len(matrix) ** 0.5)
    for unit in (len(matrix) ** -0.5, 2 * len(matrix) ** -1.5):
        integers = matrix / unit
        if np.abs(integers).max() < 64.5 and np.abs(integers - np.round(integers)).max() < 1e-4:
            return matrix, unit, bound
    return matrix, float(np.abs(matrix).max()) / 16256, bound


def operand_dimensions(nbits: int, head_dim: int, portable: bool) -> np.ndarray:
    """The coordinate of every element of the operands of keys, `COUNT · WIDTH` in all; -1 where there is none."""
    stride, first, step = operand_offsets(nbits)
    count = len(first)
    element = np.arange(operand_width(nbits, head_dim))
    if portable:
        parts = [element * count + i for i in range(count)]
    else:
        parts = [element // 4 * stride + start + element % 4 * step for start in first]
    order = np.concatenate(parts)
    return np.where(order < head_dim, order, -1)


def operand_width(nbits: int, head_dim: int) -> int:
    """Elements of one operand of keys: matrix products of int8 are at least 32 deep."""
    return max(32, triton.next_power_of_2(head_dim // codes_per_byte(nbits)))


# By a matrix that a quantizer shares only with those that conditioning makes from it.
CONSTANTS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def constants_of(quantizer: Quantizer) -> QuantizerConstants:
    constants = CONSTANTS.get(quantizer.dual)
    if constants is None:
        constants = CONSTANTS[quantizer.dual] = QuantizerConstants(quantizer)
    return constants


class Scratch:
    """Scratch memory between the launches of a call, shared by all layers on one device and stream."""

    dtypes = {"operands": torch.int8}

    def __init__(self, device: torch.device):
        self.device = device
        self.tensors: dict[str, torch.Tensor] = {}
        # A captured graph may still write to memory that became too small.
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


class NewScratch(Scratch):
    """Scratch memory for one call, so that a captured graph holds no memory but its own."""

    def get(self, name: str, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=self.dtypes.get(name, torch.float32), device=self.device)


# torch has a pool of a few dozen streams for each device.
SCRATCH: dict[tuple, Scratch] = {}


def scratch_of(device: torch.device) -> Scratch:
    key = device, stream_of(device)
    scratch = SCRATCH.get(key)
    if scratch is None:
        scratch = SCRATCH[key] = Scratch(device)
    return scratch


@lru_cache(maxsize=64)
def is_portable(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip:
        return True
    return torch.cuda.get_device_capability(device) < (8, 0)


def count_splits(wave: int, programs: int, blocks: int, limit: int) -> int:
    """Number of splits, at most `limit`, for which `programs * splits` best fills whole waves of `wave` programs."""
    best = 1
    for waves in (1, 2, 3, 4):
        splits = waves * wave // programs
        best = max(best, splits)
        if splits * programs > 0.9 * waves * wave:
            break
    # At least two blocks each, to make up for starting a program, loading its query and storing its result.
    return min(best, -(-blocks // 2), limit)


class Kernels:
    """The kernels of one configuration: everything known at compile time and all that follows from it."""

    def __init__(
        self, device, portable, query_dtype, exact_dtypes, keys, values, mask, causal, softcap, few_rows, static
    ):
        mask_dtype, alike = mask
        key_bits, qjl, key_dim, passes, key_codebook = keys
        value_bits, value_dim, value_mean, value_codebook = values
        # Different 16 bits have no product without loss.
        exact_dot = tl.float32 if INTERPRETED or {*exact_dtypes} != {query_dtype} else DTYPES[query_dtype]
        width = operand_width(key_bits, key_dim)
        parts = codes_per_byte(value_bits) if portable else max(2, codes_per_byte(value_bits))
        value_rows = max(16, triton.next_power_of_2(value_dim // (2 if value_bits == 3 else 1)))
        self.rows = PORTABLE_ROWS if INTERPRETED or torch.version.hip else ROWS
        self.score_blocks = 4
        self.operand_bytes = (1 + qjl) * 2 * codes_per_byte(key_bits) * width
        # A warp's share of a product is at least 16 tokens or 16 dimensions.
        warps = max(1, min(4, 128 // parts // 16, value_rows // 16))
        # int8 values need fewer instructions than fp16 but their weights need more; at 4 bits, too many unless folded.
        int8 = not portable and (value_bits != 4 or few_rows)
        key_text = value_text = ("", "")
        if not portable and key_bits < 8:
            key_text = level_snippet(key_bits, qjl, key_codebook)
        if not portable and value_bits < 8:
            value_text = level_snippet(value_bits, False, value_codebook) if int8 else value_snippet(value_codebook)
        early = not portable and overlaps(device)
        # Passed on only where it exists.
        self.overlap = {"launch_pdl": True} if early else {}
        padded = triton.next_power_of_2(key_dim)
        # With 8 bits and wide heads a third buffer would exceed the shared memory of many GPUs.
        stages = 3 if 16 * (key_bits * key_dim + value_bits * value_dim) <= 2**15 else 2
        shared = {"DIM": key_dim, "WIDTH": width, "QJL": qjl, "ROWS": self.rows, "CAUSAL": causal, "SOFTCAP": softcap}
        shared |= {"MASK": 0 if mask_dtype is None else 1 if mask_dtype == torch.bool else 2, "ASM": not portable}
        prepare = {**shared, "DIM_PAD": padded, "COUNT": codes_per_byte(key_bits), "PASSES": passes}
        prepare |= {"VALUE_DIM": value_dim, "VALUE_PAD": triton.next_power_of_2(value_dim), "TILE": EXACT_TILE}
        prepare |= {"DOT": exact_dot, "EARLY": early}
        # A program holds the matrices of the query in registers.
        prepare_warps = 4 if passes * self.operand_bytes // 2 * padded <= 2**16 else 8
        self.prepare = Launcher(prepare_kernel, prepare, num_warps=prepare_warps, num_stages=1, **self.overlap)
        attend = {**shared, "KEY_BITS": key_bits, "VALUE_DIM": value_dim, "VALUE_ROWS": value_rows, "PARTS": parts}
        attend |= {"VALUE_BITS": value_bits, "FOLD": int8 and few_rows, "ALIKE": alike, "EARLY": early}
        attend |= {"DOT": tl.float32 if INTERPRETED else tl.int8 if int8 else tl.float16}
        attend |= {"KEY_SNIPPET": key_text[0], "KEY_CONSTRAINTS": key_text[1]}
        attend |= {"VALUE_SNIPPET": value_text[0], "VALUE_CONSTRAINTS": value_text[1]}
        # Limits registers: prefetching a mask would otherwise cost a third of a multiprocessor's resident warps.
        limit = {"maxnreg": 168} if alike and not portable and max(key_dim, value_dim) <= 128 else {}
        options = {"num_warps": warps, "num_stages": stages, **self.overlap, **limit}
        self.attend = Launcher(attend_kernel, attend, **options)
        scores = {"PARTS": 2, "SNIPPET": key_text[0], "CONSTRAINTS": key_text[1], "BLOCKS": self.score_blocks}
        scores |= {"DIM_PAD": padded, "KEY_BITS": key_bits, "TILE": EXACT_TILE, "EXACT_DOT": exact_dot}
        self.scores = Launcher(scores_kernel, {**shared, **scores}, num_warps=4, num_stages=3)
        self.warps = warps
        self.portable, self.value_dim, self.value_mean = portable, value_dim, value_mean
        # Halves the bytes of a matrix that every row reads; the error is below the output's own rounding.
        self.dual_dtype = torch.float32 if exact_dot == tl.float32 else torch.float16
        self._combine: dict[tuple, Launcher] = {}
        self._device, self._wave = device, None
        self._static = static
        # As masks are launched with: a kernel for another dtype would be compiled once more.
        self._mask_dtype = torch.uint8 if mask_dtype == torch.bool else mask_dtype or query_dtype

    def combine(self, code_splits: int, sinks: bool) -> Launcher:
        """`combine_kernel` for this number of splits of codes."""
        coded = next(size for size in CODED_SPLITS if code_splits <= size)
        launcher = self._combine.get((coded, sinks))
        if launcher is None:
            constants = {
                "DIM": self.value_dim,
                "DIM_PAD": triton.next_power_of_2(self.value_dim),
                "COLUMNS": COMBINE_COLUMNS,
                "CODED": coded,
                "EXACT": 4,
                "MEAN": self.value_mean,
                "SINKS": sinks,
                "ASM": not self.portable,
                "EARLY": bool(self.overlap),
            }
            warps = 4 if coded * constants["DIM_PAD"] <= 2**13 else 8
            launcher = self._combine[coded, sinks] = Launcher(
                combine_kernel, constants, num_warps=warps, **self.overlap
            )
        return launcher

    @property
    def wave(self) -> int:
        """The number of programs of `attend` that the device runs at a time."""
        if is_only_compiling():
            # Any number will do.
            return 264
        if self._wave is None:
            self._wave = 8 if INTERPRETED else self._count_wave()
        return self._wave

    def _count_wave(self) -> int:
        byte, wide, scale = torch.uint8, torch.float32, torch.bfloat16
        counters = torch.int32 if self._static else None
        pointers = counters, torch.int8, wide, byte, byte, scale, scale, torch.int8, byte, byte, scale, wide, wide, wide
        compiled = self.attend.compile(self._mask_dtype, *[1] * 6, 1.0, *pointers, *[1] * 9)
        properties = torch.cuda.get_device_properties(self._device)
        # Registers are allocated in steps of 8 per thread, and each quarter of a multiprocessor has a quarter of them.
        registers = -(-compiled.n_regs // 8) * 8 * properties.warp_size
        warps = 4 * (properties.regs_per_multiprocessor // 4 // registers)
        shared = properties.shared_memory_per_multiprocessor // (compiled.metadata.shared + 1024)
        return max(1, min(warps // self.warps, shared)) * properties.multi_processor_count


kernels_for = lru_cache(maxsize=1024)(Kernels)
