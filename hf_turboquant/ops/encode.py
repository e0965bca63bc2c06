"""Quantizes and appends with Triton: launches `quantize_kernels` and `step_kernel`."""

from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl

from ..packing import BLOCK, plane_shapes
from ..plans import Plan
from ..quantizer import ROLES, Quantizer
from ..search import Annealing
from ..states import LayerStates
from ..storage import TokenBuffer
from .attention_plan import constants_of
from .launch import DTYPES, INTERPRETED, is_only_compiling, launcher_for, on_other_device, overlaps, run, stream_of
from .quantize_kernels import quantize_kernel
from .step_kernel import step_kernel

# What a launch needs of a quantizer, by the dtype of the states and the tile.
_prepared: WeakKeyDictionary[Quantizer, dict] = WeakKeyDictionary()


def supports(states: torch.Tensor, quantizer: Quantizer) -> str | None:
    """`None` if the kernel can quantize these states, else the reason why not, in words."""
    if quantizer.head_dim % 16 or quantizer.head_dim > 256:
        return f"the kernel takes a head_dim of 16 to 256 in steps of 16, and the states have {quantizer.head_dim}"
    if states.dtype not in DTYPES:
        return f"the states are {states.dtype}"
    if states.device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"the tensors are on {states.device.type}" + (", and Triton interprets" if INTERPRETED else "")
    return None


def quantize(*parts: tuple[torch.Tensor, Quantizer, TokenBuffer]) -> None:
    """
    [`ops.quantize`] to buffers that have the capacity: one launch for one token, else one for each part. Two parts must
    have the same batch, heads, tokens and device, and their buffers the same length and capacity.
    """
    for launched in [parts] if parts[0][0].shape[2] == 1 else zip(parts, strict=True):
        _launch(*launched)


def append(states: LayerStates, new: dict[str, torch.Tensor]) -> None:
    """[`ops.append`] in one launch for each token."""
    for index in range(new["keys"].shape[2]):
        token = tuple(x[:, :, index : index + 1] for x in new.values())
        if not append_again(states, *token):
            # Compiled kernels belong to a device.
            with torch.cuda.device_of(token[0]):
                plan = StepPlan(states, *token)
            if states.plans is not None:
                states.plans.keep("step", plan, states)
            plan.run(states, *token)


def append_again(states: LayerStates, key: torch.Tensor, value: torch.Tensor) -> bool:
    """[`append`] of one token if an earlier call prepared a plan for the same buffers; else does nothing."""
    plan = states.plans.get("step") if states.plans else None
    if plan is None or plan.token != _token_key(key, value) or not plan.fits(states):
        return False
    plan.run(states, key, value)
    return True


def _token_key(key: torch.Tensor, value: torch.Tensor) -> tuple:
    """All of a token that a plan depends on. A compiled kernel may rely on aligned addresses."""
    kinds = key.dtype, value.dtype, key.device, value.device
    return key.shape, value.shape, key.stride(), value.stride(), kinds, key.data_ptr() % 16, value.data_ptr() % 16


class StepPlan(Plan):
    """What steps over the same buffers share, whose tokens differ in nothing but their address."""

    def __init__(self, states: LayerStates, *token: torch.Tensor):
        super().__init__(states)
        self.token = _token_key(*token)
        sides, specs, key = [], [], []
        for role, x in zip(ROLES, token, strict=True):
            buffers, constants, spec, options, parts = _side(x, states.quantizers[role], states.codes[role], 1)
            sides.append((x.stride(), buffers, constants))
            specs.append(spec)
            key += *parts, x.data_ptr() % 16
        batch, heads, _, _ = token[0].shape
        self.device, self.grid = token[0].device, (1, batch * heads, len(token))
        early = overlaps(self.device)
        if early:
            options = {**options, "launch_pdl": True}
        constants = dict(zip(("KEYS", "VALUES", "RING", "EARLY"), (*specs, states.ring > 0, early), strict=True))
        key = step_kernel, self.device.index, states.ring > 0, states.counters is not None, *key
        self.launcher = launcher_for(step_kernel, key, options, constants)
        sizes = states.sink_length, states.ring, states.exact["keys"].shape[2], states.codes["keys"].capacity // BLOCK
        self.args = *sides, *states.exact.values(), states.counters, *sizes, heads
        # The first launch compiles, and takes tensors; later ones take addresses, which many plans never need.
        self.fixed: tuple | None = None
        self.launched = False

    def run(self, states: LayerStates, key: torch.Tensor, value: torch.Tensor) -> None:
        """Launches one step."""
        if on_other_device(self.device):
            with torch.cuda.device(self.device):
                self.run(states, key, value)
            return
        static = states.counters is not None
        lengths = (states.kv_len, 0, 0) if static else (2**31 - 1, states.kv_len, states.quantized)
        stream = stream_of(self.device)
        if not self.launched:
            self.launcher(self.grid, stream, (key, value, *lengths), (*self.args, *self.launcher.values))
            self.launched = not INTERPRETED and not is_only_compiling()
            return
        if self.fixed is None:
            _, self.fixed = self.launcher.fix(self.args)
        self.launcher(self.grid, stream, (key.data_ptr(), value.data_ptr(), *lengths), self.fixed)


def _launch(*parts: tuple[torch.Tensor, Quantizer, TokenBuffer]) -> None:
    states, _, first = parts[0]
    (batch, heads, tokens, _), device, length = states.shape, states.device, first.length
    if not states.numel():
        return
    if on_other_device(device):
        with torch.cuda.device(device):
            _launch(*parts)
        return
    tile = 1 if tokens == 1 else BLOCK
    sides, specs, key = [None, None], [None, None], [device.index]
    for i, (x, quantizer, buffer) in enumerate(parts):
        outputs, constants, specs[i], options, more = _side(x, quantizer, buffer, tile)
        sides[i] = x, (x.stride(), outputs, constants)
        key += *more, x.data_ptr() % 16
    grid = ((length + tokens - 1) // tile - length // tile + 1, batch * heads, len(parts))
    args = (*sides, length, tokens, first.capacity // BLOCK, heads, *specs, tile)
    run(quantize_kernel, (quantize_kernel, *key), grid, device, args, options)
    # Lengths change last, once everything is launched.
    for _, _, buffer in parts:
        buffer.length += tokens


def _side(x: torch.Tensor, quantizer: Quantizer, buffer: TokenBuffer, tile: int):
    """For keys or values: buffers and constants for the kernels, specification, options, and a part of the key."""
    planes, constants, spec, options = _prepare(quantizer, x.dtype, tile)
    buffers = tuple(buffer[name] for name in planes), buffer["scales"], buffer.tensors.get("residual_norms")
    # Triton specialises on these properties of an integer. The strides themselves differ for every length of a prompt.
    strides = tuple((n == 1, n % 16 == 0, n >= 2**31) for n in x.stride())
    key = (spec, x.dtype, quantizer.mean is None, quantizer.scale is None, strides)
    return buffers, constants, spec, options, key


def _prepare(quantizer: Quantizer, dtype: torch.dtype, tile: int):
    """Names of the planes, the constants for the kernel, its specification and its launch options."""
    prepared = _prepared.setdefault(quantizer, {})
    if (dtype, tile) not in prepared:
        planes = tuple(plane_shapes(quantizer.nbits, quantizer.role, quantizer.head_dim))
        by_head = []
        for x in (quantizer.transform, quantizer.mean, quantizer.scale):
            # Constants that all heads share have a stride of zero.
            by_head += (None, 0) if x is None else (x.contiguous(), x[0].numel() if len(x) > 1 else 0)
        sketch = quantizer.sketch
        if quantizer.annealing is not None:
            # Quantizers that conditioning makes from one share this operator, so that a captured graph finds it again.
            sketch = constants_of(quantizer).search_operator(quantizer)
        constants = (*by_head, sketch, quantizer.boundaries, quantizer.centroids)
        prepared[dtype, tile] = planes, constants, *_specify(quantizer, dtype, tile)
    return prepared[dtype, tile]


def _specify(quantizer: Quantizer, dtype: torch.dtype, tile: int) -> tuple[tuple, dict]:
    head_dim = quantizer.head_dim
    padded = triton.next_power_of_2(head_dim)
    operand = tl.float32
    # 16 bits are enough for a search, and for a sketch of which only the sign counts.
    sketch_operand = tl.float32 if INTERPRETED or (tile == 1 and quantizer.annealing is None) else tl.float16
    precision = "ieee"
    if not INTERPRETED and tile > 1:
        # Three products in tf32 are as precise as fp32.
        precision = "tf32x3"
        if quantizer.scale is None or dtype != torch.float16:
            # States are exact in their own dtype, and the matrix is nearly exact as a sum of two. A scale may take the
            # matrix out of fp16's range.
            operand = DTYPES[dtype]
    if tile == 1:
        chunk = min(padded, 128)
    else:
        chunk = min(head_dim & -head_dim, 64 if padded < 256 else 32)
    specification = (
        quantizer.role == "keys",
        quantizer.nbits,
        quantizer.estimator,
        head_dim,
        padded,
        chunk,
        operand,
        sketch_operand,
        precision,
        len(quantizer.stretches),
        *(quantizer.stretches[:2] or (1.0, 1.0)),
        _flat(quantizer.annealing),
    )
    # Two programs share a multiprocessor if registers and shared memory allow; the boundaries of 4 bits take many.
    exact = operand != tl.float32
    small = padded <= 128 and (tile == 1 or (quantizer.sketch is None and exact and quantizer.nbits < 4))
    options = {"num_warps": 4 if small else 8, "num_stages": 1}
    return specification, options


def _flat(annealing: Annealing | None) -> tuple | None:
    if annealing is None:
        return None
    fields = annealing.first, annealing.last, annealing.overshoots
    rounds = annealing.rounds, annealing.single_rounds
    return annealing.grid, annealing.amplitude, *(x for pair in fields for x in pair), *rounds
