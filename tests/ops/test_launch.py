"""Compiled launches take as many arguments as their kernels have: without a GPU nothing else would show it."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_turboquant import TurboQuantCache, TurboQuantConfig
from hf_turboquant.quantizer import Quantizer

PROGRAM = """
import json
import sys

import torch

from hf_turboquant import TurboQuantConfig, ops
from hf_turboquant.layer import TurboQuantLayer
from hf_turboquant.ops import attend, attention_plan as plan, encode, launch, statistics

assert not launch.INTERPRETED
seen = set()


class Compiled:
    function, packed_metadata = 0, (4, 1, 0)

    def __init__(self, kernel):
        self.kernel = kernel

    # grid, stream, function, metadata and three hooks come first
    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        name, names = self.kernel.__name__, self.kernel.arg_names
        assert len(args) == len(names), (name, len(args), len(names))
        seen.add((name, any(torch.is_tensor(arg) for arg in args)))


def compile(self, *args):
    assert len(args) + len(self.values) == len(self.kernel.arg_names), self.kernel.__name__
    self.compiled = Compiled(self.kernel)
    return self.compiled


launch.Launcher.compile, plan.Kernels.wave = compile, property(lambda self: 264)
attend.supports = encode.supports = statistics.supports = lambda *args: None
layer = TurboQuantLayer(TurboQuantConfig(backend="triton", condition="none", key_estimator=sys.argv[1]), 0)
tokens, query = torch.randn(2, 2, 600, 64).half(), torch.randn(2, 8, 1, 64).half()
layer.update(tokens, tokens)
for _ in range(3):
    states = layer.update(tokens[:, :, :1], tokens[:, :, :1])[0].states
    assert ops.attention(query, states, scaling=1.0).shape == query.shape
    ops.attention(query, states, scaling=1.0, attention_mask=torch.ones(1, 1, 1, 700, dtype=torch.bool))
    ops.scores(query, states, scaling=1.0)
for conditioned in (TurboQuantConfig(backend="triton"), TurboQuantConfig(backend="triton", condition="center")):
    layer = TurboQuantLayer(conditioned, 0)
    layer.update(tokens, tokens)
    layer.settle(tokens.repeat(1, 2, 1, 1))
print(json.dumps(sorted(seen)))
"""

AHEAD = (
    PROGRAM.split("launch.Launcher.compile, plan")[0]
    + """
from triton.runtime.jit import JITFunction

from hf_turboquant import ahead


def warmup(self, *args, grid, **options):
    given = dict(zip(self.arg_names, args)) | options
    assert given.keys() >= set(self.arg_names), self.__name__
    seen.add((self.__name__, given.get("MASK")))
    order.append(self.__name__)


def fail(*args):
    raise AssertionError("launched")


JITFunction.warmup, launch.launch, order = warmup, fail, []
attend.supports = encode.supports = statistics.supports = lambda *args: None
config = TurboQuantConfig(backend="triton", max_cache_len=4096 if sys.argv[1] == "static" else None)
half = (torch.float16,) * 3
for _ in range(2):
    ahead._start(config, None, TurboQuantLayer, (2, 64, 64), half, 4, True, False, torch.device("cpu"))
    [future.result() for future in launch._in_background]
    launch.wait_for_background()
    assert not launch.is_only_compiling()
    print(json.dumps(sorted(seen, key=str)))
    seen.clear()
# what takes long begins first
assert {*order} > {*launch.SLOW} and order == sorted(order, key=lambda name: name not in launch.SLOW)
order.clear()
attend.attention = fail
ahead._start(config, None, TurboQuantLayer, (4, 64, 64), half, 4, True, False, torch.device("cpu"))
try:
    launch._in_background[0].result()
except AssertionError:
    # and what comes after it is compiled even if an error comes first
    assert "sum_kernel" in order
else:
    raise AssertionError("the error is lost")
"""
)


SAME = (
    PROGRAM.split("launch.Launcher.compile, plan")[0]
    + """
import dataclasses
from types import SimpleNamespace

from triton.runtime.jit import JITFunction

from hf_turboquant import ahead


class Found(Compiled):
    n_regs, metadata = 128, SimpleNamespace(shared=40_000)

    def run(self, *args):
        pass

    def _init_handles(self):
        pass


def special(parameter, value):
    \"""What Triton compiles an argument for.\"""
    if isinstance(value, tuple):
        return tuple(special(parameter, item) for item in value)
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if isinstance(value, torch.dtype):
        return str(value), True
    if type(value) is float and not parameter.is_constexpr:
        return "float"
    if type(value) is not int or parameter.is_constexpr:
        return repr(value)
    return "integer" if parameter.do_not_specialize else (value == 1, value % 16 == 0)


def compile(self, *args, grid=None, warmup=False, **options):
    given = dict(zip(self.arg_names, args)) | options
    parameters = {parameter.name: parameter for parameter in self.params}
    of = lambda name: parameters.get(name, SimpleNamespace(is_constexpr=True))
    seen.add((self.__name__, *((name, special(of(name), value)) for name, value in given.items())))
    return Found(self)


JITFunction.warmup = JITFunction.run = compile
launch.launch = lambda *args: None
gpu = {"regs_per_multiprocessor": 2**16, "warp_size": 32, "shared_memory_per_multiprocessor": 2**17}
torch.cuda.get_device_properties = lambda device: SimpleNamespace(**gpu, multi_processor_count=132)
attend.supports = encode.supports = statistics.supports = lambda *args: None
static, masked = sys.argv[1] == "static", sys.argv[2] == "masked"
room = {"max_cache_len": 8192} if static else {}
config, dtypes = TurboQuantConfig(backend="triton", nbits=3, **room), (torch.bfloat16,) * 3
frequencies = tuple(10_000 ** (-i / 32) for i in range(32))
new = lambda heads, tokens: torch.zeros(1, tokens, heads, 64, dtype=torch.bfloat16).transpose(1, 2)
ones = lambda tokens: torch.ones(1, 1, 1, tokens, dtype=torch.bool)
ahead._start(config, frequencies, TurboQuantLayer, (2, 64, 64), dtypes, 4, False, masked, torch.device("cpu"))
[future.result() for future in launch._in_background]
launch.wait_for_background()
known, count = set(seen), len(seen)
for tokens in (3000, 12_000):
    # of a length that needs as many splits as there can be, too
    layer = TurboQuantLayer(dataclasses.replace(config, max_cache_len=tokens + 100) if static else config, 3)
    layer.frequencies = list(frequencies)
    layer.update(new(2, tokens), new(2, tokens))
    layer.settle(new(8, tokens), ones(tokens) if masked else None)
    for step in range(2):
        states = layer.update(new(2, 1), new(2, 1))[0].states
        mask = ones(tokens + 100) if static else None
        ops.attention(new(8, 1), states, scaling=0.1, attention_mask=mask)
print(json.dumps([count, sorted(map(str, seen - known))]))
"""
)


def test_what_fails_in_the_background_fails_no_launch():
    launch = pytest.importorskip("hf_turboquant.ops.launch")
    failed, slow = Future(), ThreadPoolExecutor(1).submit(time.sleep, 0.2)
    failed.set_exception(MemoryError("of a layer that nobody asked for"))
    launch._in_background += [failed, slow]
    waiting = [Thread(target=launch.wait_for_background) for _ in range(2)]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join()
    assert slow.done() and not launch._in_background


def test_front_ends_take_turns(monkeypatch):
    launch = pytest.importorskip("hf_turboquant.ops.launch")
    running, most = [], []

    def make_ir(source, *args, **kwargs):
        running.append(source)
        most.append(len(running))
        time.sleep(0.02)
        running.remove(source)
        return args, kwargs

    monkeypatch.setattr(launch.ASTSource, "make_ir", make_ir)
    sources = [object.__new__(launch._Source) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda source: source.make_ir(1, context=2), sources))
    assert made == [((1,), {"context": 2})] * 4 and most == [1] * 4


def test_a_cache_starts_the_compiler_where_there_is_a_gpu(monkeypatch):
    launch = pytest.importorskip("hf_turboquant.ops.launch")
    started = []
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "start_compiler", lambda: started.append(1))
    for in_use, backend, expected in ((False, "auto", 0), (True, "torch", 0), (True, "auto", 1)):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda in_use=in_use: in_use)
        TurboQuantCache(backend=backend)
        assert len(started) == expected


def test_constants_are_made_by_no_threads_of_torch():
    plan = pytest.importorskip("hf_turboquant.ops.attention_plan")
    quantizer = Quantizer.create(TurboQuantConfig(nbits=3), "keys", 0, 128)
    called = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Record():
        constants = plan.QuantizerConstants(quantizer)
        constants.query_matrices(quantizer, False)
        constants.decode_operators(quantizer, torch.float16)
    # moved, converted, and one product
    cheap = {"select", "new_ones", "new_zeros", "detach", "lift_fresh", "clone"}
    assert {"_to_copy", "mm"} <= called <= {"_to_copy", "mm", *cheap}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU tells by itself")
@pytest.mark.parametrize("masked", ["masked", "plain"])
@pytest.mark.parametrize("kind", ["growing", "static"])
def test_prompt_and_steps_compile_nothing_but_what_was_compiled_ahead(kind, masked):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", SAME, kind, masked], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    count, more = json.loads(done.stdout)
    assert count >= 8 and more == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU tells by itself")
@pytest.mark.parametrize("estimator", ["qjl", "rescaled"])
def test_launches_have_all_arguments(estimator):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", PROGRAM, estimator]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    launched = json.loads(done.stdout)
    names = {name for name, _ in launched}
    assert names == {
        "prepare_kernel",
        "attend_kernel",
        "combine_kernel",
        "scores_kernel",
        "quantize_kernel",
        "step_kernel",
        "compare_kernel",
        "sum_kernel",
        "finish_kernel",
    }
    # the first time with tensors, later with addresses
    for name in ("prepare_kernel", "step_kernel"):
        assert {tensors for launch, tensors in launched if launch == name} == {True, False}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU tells by itself")
@pytest.mark.parametrize("kind", ["growing", "static"])
def test_what_a_layer_launches_is_compiled_ahead(kind):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", AHEAD, kind], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    first, again = map(json.loads, done.stdout.splitlines())
    expected = {f"{name}_kernel" for name in "attend combine compare finish prepare quantize step sum".split()}
    assert {name for name, _ in first} == expected
    # a step over a static capacity has a mask
    assert {mask for name, mask in first if name == "prepare_kernel"} == {int(kind == "static")}
    # once for every kind of layer
    assert again == []
