"""What all launches share: who runs kernels, on which stream, and how their arguments come to them quickly."""

import torch
import triton
import triton.language as tl

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
INTERPRETED = triton.knobs.runtime.interpret


def stream_of(device: torch.device) -> int:
    """The current stream of a device, as kernels are launched on it."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def launch(compiled, grid: tuple[int, int, int], stream: int, args: tuple) -> None:
    """What `compiled[grid](*args)` does, in a third of the time; without the hooks of Triton's own profiler."""
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)


def addresses(tree):
    """
    Tensors, also those in tuples, as compiled kernels take them: reading an address anew takes longer at each launch
    than all else. Whoever keeps the result keeps the tensors.
    """
    if isinstance(tree, torch.Tensor):
        return tree.data_ptr()
    return tuple(addresses(item) for item in tree) if isinstance(tree, tuple) else tree
