"""What all launches share: who runs kernels, on which stream, and how their arguments come to them quickly."""

import torch
import triton
import triton.language as tl

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
INTERPRETED = triton.knobs.runtime.interpret
# kernels by the key that they were launched with
COMPILED: dict[tuple, object] = {}


def stream_of(device: torch.device) -> int:
    """The current stream of a device, as kernels are launched on it."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def launch(compiled, grid: tuple[int, int, int], stream: int, args: tuple, fixed: tuple = ()) -> None:
    """What `compiled[grid](*args, *fixed)` does, with less work on the host and without Triton's own profiler."""
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *fixed)


def run(kernel, key: tuple, grid: tuple[int, int, int], device: torch.device, args: tuple, options: dict) -> None:
    """`kernel[grid](*args, **options)`; `key` is all that Triton would look at, in a third of the time."""
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
    Tensors, also those in tuples, as compiled kernels take them: of a tensor every launch asks Python for the address
    and the driver whether it is one. Whoever keeps the result keeps the tensors.
    """
    if isinstance(tree, torch.Tensor):
        return tree.data_ptr()
    return tuple(addresses(item) for item in tree) if isinstance(tree, tuple) else tree
