"""What all launches share: which compiled kernel runs, on which stream, and fast ways to pass arguments."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import ContextVar
from functools import lru_cache, partial
from threading import Lock, Thread
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
INTERPRETED = triton.knobs.runtime.interpret
# In a thread whose launches only compile: launchers, with arguments, that begin after all others. Elsewhere `None`.
_postponed: ContextVar[list[tuple] | None] = ContextVar("postponed", default=None)
# These take longest to compile, so they begin first, while no quick ones compete for the interpreter.
SLOW = "quantize_kernel", "step_kernel", "attend_kernel", "prepare_kernel"
# What compiles in another thread; the first real launch of a kernel waits for it.
_in_background: list[Future] = []
_front_end = Lock()


class _Source(ASTSource):
    """
    A kernel's source whose front end waits for those of others. Front ends are Python: several at once would all finish
    late, while one by one they soon pass most kernels on to compilers that run in parallel.
    """

    def make_ir(self, *args, **kwargs):
        with suppress(RuntimeError):
            Thread(target=self.make_c_launcher, daemon=True).start()
        with _front_end:
            return super().make_ir(*args, **kwargs)

    def make_c_launcher(self) -> None:
        """
        Has a C compiler make the kernel's launcher. Triton would do so after compiling the kernel, and then finds it on
        disk.
        """
        # That needs nothing of the compiled kernel. What Triton's class does next needs it, and fails.
        with suppress(Exception):
            triton.runtime.driver.active.launcher_cls(self, SimpleNamespace())


@lru_cache(maxsize=1)
def start_compiler() -> list[Future]:
    """Starts, in other threads, what Triton does before it compiles its first kernel; returns the futures."""
    # Triton reads all of its own library, and has a C compiler make its driver.
    work = getattr(triton.runtime.cache, "triton_key", bool), lambda: triton.runtime.driver.active
    threads = ThreadPoolExecutor(len(work))
    futures = [threads.submit(function) for function in work]
    threads.shutdown(wait=False)
    return futures


def compile_in_background(work: Callable[[], None], device: torch.device) -> None:
    """Calls `work` in another thread, and compiles what it would launch on `device` in several threads at once."""

    def compile():
        postponed: list[tuple] = []
        _postponed.set(postponed)
        on_device = torch.cuda.device_of(torch.empty(0, device=device))
        with on_device, ThreadPoolExecutor() as threads, triton.AsyncCompileMode(threads):
            try:
                work()
            finally:
                for launcher, args in postponed:
                    launcher.start(*args)
            if device.type == "cuda":
                # Constants that `work` made must be ready on every stream.
                torch.cuda.current_stream().synchronize()

    start_compiler()
    thread = ThreadPoolExecutor(1)
    _in_background.append(thread.submit(compile))
    thread.shutdown(wait=False)


def wait_for_background() -> None:
    """Waits for [`compile_in_background`]. What failed there is compiled at its launch, and raises there."""
    for future in list(_in_background):
        wait([future])
        # Another thread may have waited too.
        with suppress(ValueError):
            _in_background.remove(future)


def _load(device: int, future: Future) -> None:
    with suppress(Exception), torch.cuda.device(device):
        future.result()._init_handles()


def is_only_compiling() -> bool:
    """Whether launches of this thread only compile."""
    return _postponed.get() is not None


@lru_cache(maxsize=64)
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it runs (programmatic dependent launch, sm_90 and later)."""
    if device.type != "cuda" or torch.version.hip or INTERPRETED:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait_for_previous():
    """
    Waits until all memory written by earlier kernels is visible, then lets the next kernel start. Everything before it
    may overlap with the previous kernel, so it must read constants only and write nothing.
    """
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def prefetch(pointer, nbytes):
    """Starts to fetch `nbytes`, a multiple of 16, to the L2 cache (sm_90 and later)."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [pointer.to(tl.int64, bitcast=True), nbytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def stream_of(device: torch.device) -> int:
    """The current stream of a device, on which kernels are launched."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def launch(compiled, grid: tuple[int, int, int], stream: int, args: tuple, fixed: tuple = ()) -> None:
    """Does what `compiled[grid](*args, *fixed)` does, with less work on the host and without Triton's profiler."""
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *fixed)


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


class Launcher:
    """A kernel with its compile-time arguments. The first call compiles it; later calls skip Triton's dispatch."""

    def __init__(self, kernel, constants: dict, **options):
        self.kernel, self.constants, self.options = kernel, constants, options
        self.compiled = None
        # The interpreter takes them by name.
        self.values = () if INTERPRETED else tuple(constants.values())

    def compile(self, *args):
        if self.compiled is None and not INTERPRETED:
            wait_for_background()
            self.compiled = self.kernel.warmup(*args, **self.constants, **self.options, grid=(1,))
            self.compiled._init_handles()
        return self.compiled

    def start(self, *args) -> None:
        """Starts to compile within `triton.AsyncCompileMode`."""
        wait(start_compiler())
        # Triton sets the attribute when a kernel first sees the device.
        if torch.cuda.is_available() and self.kernel.device_caches[torch.cuda.current_device()]:
            self.kernel.ASTSource = _Source
        kernel = self.kernel.warmup(*args, **self.constants, **self.options, grid=(1,))
        future = getattr(kernel, "future", None)
        if future is not None:
            # The compiling thread then prepares the first launch, for which a C compiler makes the launcher.
            future.add_done_callback(partial(_load, torch.cuda.current_device()))

    def __call__(self, grid: tuple[int, int, int], stream: int, args: tuple, fixed: tuple) -> None:
        """Launches with `args` and then `fixed`, which this launcher's [`fix`] must have made."""
        postponed = _postponed.get()
        if INTERPRETED:
            self.kernel[grid](*args, *fixed, **self.constants)
        elif postponed is not None:
            args += fixed[: len(fixed) - len(self.values)]
            if self.kernel.__name__ in SLOW:
                self.start(*args)
            else:
                postponed.append((self, args))
        else:
            # The first call passes tensors, because compilation depends on their types.
            compiled = self.compiled or self.compile(*args, *fixed[: len(fixed) - len(self.values)])
            launch(compiled, grid, stream, args, fixed)

    def fix(self, args: tuple) -> tuple[tuple, tuple]:
        """Arguments that many launches share, as `__call__` takes them: as tensors and as addresses."""
        return (*args, *self.values), (*(args if INTERPRETED else addresses(args)), *self.values)


LAUNCHERS: dict[tuple, Launcher] = {}


def launcher_for(kernel, key: tuple, options: dict, constants: dict) -> Launcher:
    """
    The launcher of `kernel` with `constants`, by name. `key` has all that Triton specialises on, but no lengths, of
    which there is no end.
    """
    launcher = LAUNCHERS.get(key)
    if launcher is None:
        launcher = LAUNCHERS[key] = Launcher(kernel, constants, **options)
    return launcher


def run(kernel, key: tuple, grid: tuple, device: torch.device, args: tuple, options: dict, constants=None) -> None:
    """Launches `kernel` with `args` and then `constants`; see [`launcher_for`]."""
    launcher = launcher_for(kernel, key, options, constants or {})
    launcher(grid, stream_of(device), args, launcher.values)
