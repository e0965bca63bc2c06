"""What all launches share: which compiled kernel runs, on which stream, and fast ways to pass arguments."""

import torch
import triton
import triton.language as tl

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
INTERPRETED = triton.knobs.runtime.interpret
# Compiled kernels by the key that they were launched with. Keys must not hold lengths, of which there is no end.
COMPILED: dict[tuple, object] = {}


def stream_of(device: torch.device) -> int:
    """The current stream of a device, on which kernels are launched."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def launch(compiled, grid: tuple[int, int, int], stream: int, args: tuple, fixed: tuple = ()) -> None:
    """Does what `compiled[grid](*args, *fixed)` does, with less work on the host and without Triton's profiler."""
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *fixed)


def run(kernel, key: tuple, grid: tuple[int, int, int], device: torch.device, args: tuple, options: dict) -> None:
    """Does `kernel[grid](*args, **options)` in a third of the time; `key` has all that Triton specialises on."""
    if key in COMPILED:
        launch(COMPILED[key], grid, stream_of(device), args)
    else:
        compiled = kernel[grid](*args, **options)
        if not INTERPRETED:
            COMPILED[key] = compiled


def on_other_device(device: torch.device) -> bool:
    """Whether `device` is a GPU and not the current one, on which Triton launches."""
    return device.type == "cuda" and device.index != torch._C._cuda_getDevice()


def addresses(tree):
    """
    Turns tensors, also those in tuples, into addresses for compiled kernels: with a tensor, every launch asks Python
    for its address and the driver whether that is valid. The caller must keep the tensors alive.
    """
    if isinstance(tree, torch.Tensor):
        return tree.data_ptr()
    return tuple(addresses(item) for item in tree) if isinstance(tree, tuple) else tree
