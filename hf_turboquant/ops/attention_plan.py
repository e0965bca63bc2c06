"""What is prepared before a call: compiled kernels, the constants of quantizers, scratch memory."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakIdKeyDictionary

from ..quantizer import Quantizer
from .attention_kernels import attend_kernel, combine_kernel
from .launch import DTYPES, INTERPRETED, addresses, launch, stream_of
from .prepare_kernel import prepare_kernel
from .ptx import level_snippet, value_snippet
from .scores_kernel import scores_kernel

# Most splits of the codes: `combine_kernel` merges them in one step.
MAX_SPLITS = 64
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
        codebook = quantizer.codebook
        self.heads = quantizer.dual.shape[0]
        self._matrices: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self.scale, self.offset = codebook.scale, codebook.offset
        table = np.zeros((2, 16), dtype=np.float32)
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

    def query_operators(self, quantizer: Quantizer, dtype: torch.dtype) -> torch.Tensor:
        """The matrices that multiply a row of queries, `[operators, passes, heads, head_dim, head_dim]`."""

        def make() -> torch.Tensor:
            passes = []
            for factor in _factors(quantizer):
                high = factor.to(dtype)
                rest = [] if dtype == torch.float32 else [((factor - high.to(factor.dtype)) * 2048).to(dtype)]
                passes.append(torch.stack([high, *rest]))
            return torch.stack(passes)

        return self._keep("query", dtype, make)

    def search_operator(self, quantizer: Quantizer) -> torch.Tensor:
        """S √d, used to search codes and signs: entries of size one, which 16 bits hold exactly."""
        dtype = torch.float32 if INTERPRETED else torch.float16
        return self._keep("search", dtype, lambda: (quantizer.sketch * quantizer.head_dim).to(dtype))

    def decode_levels(self, quantizer: Quantizer, dtype: torch.dtype) -> torch.Tensor:
        """The codebook in multiples of its scale."""
        return self._keep("levels", dtype, lambda: (quantizer.centroids / self.scale).to(dtype))

    def decode_operators(self, quantizer: Quantizer, dtype: torch.dtype) -> torch.Tensor:
        """The matrices that multiply rotated vectors and signs, `[operators, heads, head_dim, head_dim]`."""
        return self._keep("decode", dtype, lambda: torch.stack([factor.mT.to(dtype) for factor in _factors(quantizer)]))

    def _keep(self, name: str, dtype: torch.dtype, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        matrices = self._matrices.get((name, dtype))
        if matrices is None:
            matrices = self._matrices[name, dtype] = make().contiguous()
        return matrices


def _factors(quantizer: Quantizer) -> list[torch.Tensor]:
    """The matrices that multiply rows of queries: A⁻¹ and, with a sketch, A⁻¹ (κS)ᵀ."""
    factors = [quantizer.dual.mT]
    if quantizer.sketch is not None:
        factors.append(quantizer.dual.double().mT @ quantizer.sketch.double().mT)
    return factors


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


SCRATCH: dict[tuple, Scratch] = {}


def scratch_of(device: torch.device) -> Scratch:
    key = device, stream_of(device)
    scratch = SCRATCH.get(key)
    if scratch is None:
        scratch = SCRATCH[key] = Scratch(device)
    return scratch


@cache
def is_portable(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip:
        return True
    return torch.cuda.get_device_capability(device) < (8, 0)


@cache
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


class Launcher:
    """A kernel with its compile-time arguments. The first call compiles it; later calls skip Triton's dispatch."""

    def __init__(self, kernel, constants: dict, **options):
        self.kernel, self.constants, self.options = kernel, constants, options
        self.compiled = None
        self.values = tuple(constants.values())

    def compile(self, *args):
        if self.compiled is None and not INTERPRETED:
            self.compiled = self.kernel.warmup(*args, **self.constants, **self.options, grid=(1,))
            self.compiled._init_handles()
        return self.compiled

    def __call__(self, grid: tuple[int, int, int], stream: int, args: tuple, fixed: tuple) -> None:
        """Launches with `args` and then `fixed`, which this launcher's [`fix`] must have made."""
        if INTERPRETED:
            self.kernel[grid](*args, *fixed, **self.constants)
        else:
            # The first call passes tensors, because compilation depends on their types.
            compiled = self.compiled or self.compile(*args, *fixed[: len(fixed) - len(self.values)])
            launch(compiled, grid, stream, args, fixed)

    def fix(self, args: tuple) -> tuple[tuple, tuple]:
        """Arguments that many launches share, as `__call__` takes them: as tensors and as addresses."""
        if INTERPRETED:
            return args, args
        return (*args, *self.values), (*addresses(args), *self.values)


class Kernels:
    """The kernels of one configuration: everything known at compile time and all that follows from it."""

    def __init__(
        self, device, portable, query_dtype, exact_dtypes, keys, values, mask, causal, softcap, few_rows, static
    ):
        mask_dtype, alike = mask
        key_bits, qjl, key_dim, key_scale, key_mean, key_codebook = keys
        value_bits, value_dim, value_mean, value_codebook = values
        # Different 16 bits have no product without loss.
        exact_dot = tl.float32 if INTERPRETED or {*exact_dtypes} != {query_dtype} else DTYPES[query_dtype]
        count = 2 if key_bits == 4 else 4
        # Matrix products of int8 are at least 32 deep.
        width = max(32, triton.next_power_of_2(key_dim // count))
        parts = 2 if value_bits == 4 else 4
        halves = 2 if value_bits == 3 else 1
        value_rows = max(16, triton.next_power_of_2(value_dim // halves))
        self.rows = PORTABLE_ROWS if INTERPRETED or torch.version.hip else ROWS
        self.terms = 1 + qjl
        self.operator_dtype = torch.float32 if exact_dot == tl.float32 else query_dtype
        self.operand_bytes = self.terms * 2 * count * width
        self.score_blocks = 4
        # A warp's share of a product is at least 16 tokens or 16 dimensions.
        warps = max(1, min(4, 128 // parts // 16, value_rows // 16))
        # int8 values need fewer instructions than fp16 but their weights need more; at 4 bits, too many unless folded.
        int8 = not portable and (value_bits < 4 or few_rows)
        if portable:
            key_text = value_text = ("", "")
        else:
            key_text = level_snippet(key_bits, qjl, key_codebook)
            value_text = level_snippet(value_bits, False, value_codebook) if int8 else value_snippet(value_codebook)
        dot = tl.float32 if INTERPRETED else tl.int8 if int8 else tl.float16
        masking = {
            "MASK": 0 if mask_dtype is None else 1 if mask_dtype == torch.bool else 2,
            "CAUSAL": causal,
            "SOFTCAP": softcap,
        }
        lengths = {"STATIC": static}
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
            "SCALE": key_scale,
            "MEAN": key_mean,
            **lengths,
            **masking,
        }
        last = {
            "DOT": exact_dot,
            "PRECISION": "tf32x3" if not portable and exact_dot == tl.float32 else "ieee",
            "ASM": not portable,
            # Nothing to append.
            **dict.fromkeys(("KEYS", "VALUES", "RING")),
        }
        self._prepare = {**prepare, "SCORES": False, **last}
        self.prepare = Launcher(prepare_kernel, self._prepare, num_warps=8)
        self.prepare_scores = Launcher(prepare_kernel, {**self._prepare, "SCORES": True}, num_warps=8)
        self._append: dict[tuple, Launcher] = {}
        self.attend = Launcher(
            attend_kernel,
            {
                **codes,
                "VALUE_DIM": value_dim,
                "VALUE_ROWS": value_rows,
                "VALUE_BITS": value_bits,
                "PARTS": parts,
                "ROWS": self.rows,
                "FOLD": dot == tl.int8 and few_rows,
                "MEAN": key_mean,
                **masking,
                **lengths,
                "ALIKE": alike,
                "DOT": dot,
                "ASM": not portable,
                "KEY_SNIPPET": key_text[0],
                "KEY_CONSTRAINTS": key_text[1],
                "VALUE_SNIPPET": value_text[0],
                "VALUE_CONSTRAINTS": value_text[1],
            },
            num_warps=warps,
            num_stages=3,
            # Limits registers: prefetching a mask would otherwise cost a third of a multiprocessor's resident warps.
            **({"maxnreg": 168} if alike and not portable and max(key_dim, value_dim) <= 128 else {}),
        )
        self.scores = Launcher(
            scores_kernel,
            {
                **codes,
                "PARTS": 2,
                "ROWS": self.rows,
                "MEAN": key_mean,
                **masking,
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
        # Halves the bytes of a matrix that every row reads; the error is below the output's own rounding.
        self.dual_dtype = torch.float32 if exact_dot == tl.float32 else torch.float16
        self._combine: dict[tuple, Launcher] = {}
        self._device, self._wave = device, None
        self._static = static
        self._mask_dtype = mask_dtype or query_dtype

    def append(self, key: tuple, specifications: list, ring: bool) -> Launcher:
        """`prepare_kernel` that also appends a token; `key` is that of `token_sides` with the token's alignment."""
        key = *key, ring
        launcher = self._append.get(key)
        if launcher is None:
            constants = dict(zip(("KEYS", "VALUES", "RING"), (*specifications, ring), strict=True))
            launcher = self._append[key] = Launcher(prepare_kernel, {**self._prepare, **constants}, num_warps=8)
        return launcher

    def combine(self, code_splits: int, sinks: bool) -> Launcher:
        """`combine_kernel` for this number of splits of codes."""
        coded = max(4, triton.next_power_of_2(code_splits))
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
            }
            warps = 4 if coded * constants["DIM_PAD"] <= 2**13 else 8
            launcher = self._combine[coded, sinks] = Launcher(combine_kernel, constants, num_warps=warps)
        return launcher

    @property
    def wave(self) -> int:
        """The number of programs of `attend` that the device runs at a time."""
        if self._wave is None:
            self._wave = 8 if INTERPRETED else self._count_wave()
        return self._wave

    def _count_wave(self) -> int:
        byte, wide = torch.uint8, torch.float32
        scale = torch.bfloat16
        pointers = (torch.int8, wide, byte, byte, scale, scale, torch.int8, byte, byte, scale, wide, wide, wide)
        length = torch.int32 if self._static else 1
        compiled = self.attend.compile(self._mask_dtype, *[1] * 4, length, length, 1.0, *pointers, *[1] * 9)
        properties = torch.cuda.get_device_properties(self._device)
        # Registers are allocated in steps of 8 per thread, and each quarter of a multiprocessor has a quarter of them.
        registers = -(-compiled.n_regs // 8) * 8 * properties.warp_size
        warps = 4 * (properties.regs_per_multiprocessor // 4 // registers)
        shared = properties.shared_memory_per_multiprocessor // (compiled.metadata.shared + 1024)
        return max(1, min(warps // self.warps, shared)) * properties.multi_processor_count


kernels_for = cache(Kernels)
