"""Any sequence of operations against a slow model of the layer, failing allocations, and the edges of the drop-in."""

import copy
import dataclasses
import threading
from collections import Counter

import pytest
import torch
from conftest import forget_quantizers
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import hf_turboquant.conditioning
import hf_turboquant.config
import hf_turboquant.layer
import hf_turboquant.quantizer
from hf_turboquant import QuantizedStates, TurboQuantCache, TurboQuantConfig, ops
from hf_turboquant._supported import cache_name
from hf_turboquant.conditioning import condition, energy_of_queries, learned
from hf_turboquant.layer import TurboQuantLayer
from hf_turboquant.ops import reference
from hf_turboquant.quantizer import Quantizer
from hf_turboquant.search import ANNEALINGS
from hf_turboquant.tokens import ROLES

HEADS, HEAD_DIM, LAYER_IDX = 2, 16, 3
# keys wait for so many tokens, and for so many different ones while there are at most so many
LEARNED_TOKENS, MIN_TOKENS, MAX_WAITING_TOKENS = 24, 12, 60


def coarse_condition(*args):
    """Whole means and scales that are powers of two: with whole states, products with the rotation are exact."""
    quantizer, found = condition(*args)
    # a rotation of 16 dimensions has entries of ± 1/4: one token gives the same bits as a hundred, on any machine
    mean = None if quantizer.mean is None else quantizer.mean.round()
    scale = None if quantizer.scale is None else quantizer.scale.log2().round().clamp(-1, 1).exp2()
    return dataclasses.replace(quantizer, mean=mean, scale=scale), learned(found)


@pytest.fixture(scope="module", autouse=True)
def exact_arithmetic():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_turboquant.conditioning, "condition", coarse_condition)
        patch.setattr(hf_turboquant.config, "LEARNED_TOKENS", LEARNED_TOKENS)
        patch.setattr(hf_turboquant.conditioning, "MIN_TOKENS", MIN_TOKENS)
        patch.setattr(hf_turboquant.tokens, "MAX_WAITING_TOKENS", MAX_WAITING_TOKENS)
        # soft rounds round, and a token that comes alone has fewer of them
        for bits, annealing in ANNEALINGS.items():
            patch.setitem(ANNEALINGS, bits, dataclasses.replace(annealing, rounds=0, single_rounds=0))
        forget_quantizers()
        yield
    forget_quantizers()


def integers(*shape, seed):
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def plain(tensor):
    return tensor.dequantize() if isinstance(tensor, QuantizedStates) else tensor


class OutOfMemoryAt(TorchDispatchMode):
    """Raises in place of the allocation of number `at`: what returns neither a view nor its argument allocates."""

    def __init__(self, at):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(result.alias_info for result in func._schema.returns):
            self.count += 1
            if self.count == self.at:
                raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


class SlowLayer:
    """What a layer should hold: lists of tokens, each exact or as the codes that it got once."""

    def __init__(self, config):
        self.config = config
        self.reset()

    def reset(self):
        # by role, of every token the exact vector, or its codes and scales
        self.tokens = {role: [] for role in ROLES}
        self.coded = {role: {} for role in ROLES}
        # no token, of the right shape
        self.none = {}
        self.is_waiting = False
        self.newest = 0
        self.forget()

    def forget(self):
        self.energy = None
        self.kind = "none" if self.config.condition == "none" else None
        self.quantizers = {role: Quantizer.create(self.config, role, LAYER_IDX, HEAD_DIM) for role in ROLES}

    @property
    def length(self):
        return len(self.tokens["keys"])

    def update(self, states):
        """Appends, and returns what attention should read."""
        self.settle()
        before, self.newest = self.length, states["keys"].shape[2]
        for role in ROLES:
            self.none[role] = states[role][:, :, :0]
            self.tokens[role] += [states[role][:, :, i : i + 1] for i in range(states[role].shape[2])]
        if self.kind is None:
            self.is_waiting = True
            return {role: self.exact(role) for role in ROLES}
        self.store()
        if before == 0:
            return states
        held = {role: self.held(role) for role in ROLES}
        if 0 < self.config.residual_length < states["keys"].shape[2]:
            held = {role: torch.cat([held[role][:, :, :before], states[role]], dim=2) for role in ROLES}
        return held

    def settle(self, query=None):
        if not self.is_waiting:
            return
        if query is not None and self.config.condition == "attention":
            energy = energy_of_queries(query, None, HEADS)
            self.energy = energy if self.energy is None else energy + self.energy
        self.is_waiting = False
        self.store()

    def store(self):
        """Quantizes, one by one, what left the recent window."""
        if self.kind is None:
            self.learn()
        if self.kind is None:
            return
        for token in range(self.config.sink_length, self.length - self.config.residual_length):
            for role in ROLES:
                if token not in self.coded[role]:
                    vector = self.tokens[role][token]
                    buffer = self.quantizers[role].new_buffer(vector.shape[0], HEADS)
                    ops.quantize((vector, self.quantizers[role], buffer))
                    self.coded[role][token] = reference.codes_of(buffer, self.quantizers[role], 0, 1)

    def learn(self):
        sinks = self.config.sink_length
        beside, window = self.length - sinks, self.config.residual_length
        if beside <= max(LEARNED_TOKENS, window):
            return
        # the token of a step comes too late
        known = self.length - (self.newest == 1 < self.length)
        seen = [self.exact(role)[:, :, sinks:known] for role in ROLES]
        quantizer, found = coarse_condition(self.quantizers["keys"], *seen, self.energy, None)
        if found.enough or beside > max(LEARNED_TOKENS, MAX_WAITING_TOKENS, window):
            self.quantizers["keys"], self.kind = quantizer, found.condition

    def exact(self, role):
        return torch.cat([self.none[role], *self.tokens[role]], dim=2)

    def held(self, role):
        vectors, coded, quantizer = self.exact(role).clone(), self.coded[role], self.quantizers[role]
        if coded:
            # decoded in one go: a product of other shape may round otherwise
            codes = torch.cat([codes for codes, _ in coded.values()], dim=2)
            names = next(iter(coded.values()))[1]
            scales = {name: torch.cat([s[name] for _, s in coded.values()], dim=2) for name in names}
            decoded = reference.decode(codes, scales, quantizer) @ quantizer.dual
            decoded = decoded if quantizer.scale is None else decoded / quantizer.scale
            vectors[:, :, list(coded)] = decoded if quantizer.mean is None else decoded + quantizer.mean
        return vectors

    def crop(self, count):
        self.settle()
        left = max(self.length - count, 0)
        for role in ROLES:
            self.tokens[role] = self.tokens[role][:left]
            self.coded[role] = {token: coded for token, coded in self.coded[role].items() if token < left}
        if not left:
            self.forget()

    def map(self, function):
        self.settle()
        self.none = {role: function(tensor) for role, tensor in self.none.items()}
        for role in ROLES:
            self.tokens[role] = [function(vector) for vector in self.tokens[role]]
            self.coded[role] = {
                token: (function(codes), {name: function(scale) for name, scale in scales.items()})
                for token, (codes, scales) in self.coded[role].items()
            }


class Both:
    """The layer and its slow model: every operation on both, then a look at both."""

    def __init__(self, config, done, defers):
        self.layer, self.slow = TurboQuantLayer(config, LAYER_IDX), SlowLayer(config)
        self.layer._defers = lambda: defers
        self.batch, self.seed, self.done = 2, 0, done

    def new_states(self, tokens, alike=False):
        self.seed += 1
        shape = (self.batch, HEADS, tokens, HEAD_DIM)
        values = integers(*shape, seed=-self.seed)
        if alike:
            # one token over and over
            values[:] = integers(HEADS, 1, HEAD_DIM, seed=1)
        return {"keys": integers(*shape, seed=self.seed), "values": values}

    def update(self, tokens, attend, alike=False):
        states = self.new_states(tokens, alike)
        handles = self.layer.update(*states.values())
        expected = self.slow.update(states)
        for handle, role in zip(handles, ROLES, strict=True):
            assert torch.equal(plain(handle), expected[role])
        if attend:
            query = self.query(tokens)
            out = sdpa(query, *handles, enable_gqa=True)
            if tokens:
                torch.testing.assert_close(out, sdpa(query, *expected.values(), enable_gqa=True), rtol=1e-3, atol=1e-3)
            self.slow.settle(query)

    def query(self, tokens):
        return integers(self.batch, 2 * HEADS, tokens, HEAD_DIM, seed=self.seed)

    def update_without_memory(self, tokens, at):
        states, waited = self.new_states(tokens), self.slow.is_waiting
        try:
            with OutOfMemoryAt(at):
                self.layer.update(*states.values())
        except torch.OutOfMemoryError:
            self.done["failed update"] += 1
            # the tokens before may have been stored by then, or still wait
            if waited and self.layer.pending is None:
                self.slow.settle()
        else:
            self.slow.update(states)

    def attend_without_memory(self, tokens, at):
        states = self.new_states(tokens)
        handles = self.layer.update(*states.values())
        self.slow.update(states)
        query = self.query(tokens)
        try:
            with OutOfMemoryAt(at):
                sdpa(query, *handles, enable_gqa=True)
        except torch.OutOfMemoryError:
            self.done["failed attention"] += 1
            if self.slow.is_waiting and (self.layer.pending is None or self.layer.observed is not None):
                self.slow.settle(query)
        else:
            self.slow.settle(query)

    def crop(self, count):
        self.layer.crop(-count)
        self.slow.crop(count)

    def reorder(self, seed):
        rows = torch.randint(0, self.batch, (self.batch,), generator=torch.Generator().manual_seed(seed))
        self.layer.reorder_cache(rows)
        self.slow.map(lambda tensor: tensor[rows])

    def select(self, seed):
        rows = torch.randperm(self.batch, generator=torch.Generator().manual_seed(seed))[: 1 + seed % 2]
        if seed % 3 == 0:
            # by a mask
            rows = torch.zeros(self.batch, dtype=torch.bool).index_fill(0, rows, True)
        self.layer.batch_select_indices(rows)
        self.slow.map(lambda tensor: tensor[rows])
        self.set_batch(int(rows.sum()) if rows.dtype == torch.bool else len(rows))

    def repeat(self, repeats):
        if self.batch <= 2:
            self.layer.batch_repeat_interleave(repeats)
            self.slow.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))
            self.set_batch(self.batch * repeats)

    def set_batch(self, batch):
        # before the first token there is no batch to change
        self.batch = batch if self.layer.is_initialized else self.batch

    def offload(self):
        self.layer.offload()
        self.layer.prefetch()

    def reset(self):
        self.layer.reset()
        self.slow.reset()

    def deepcopy(self):
        twin, original = copy.deepcopy(self.layer), self.layer
        self.layer = twin
        # what happens to the original does not show
        original.update(*self.new_states(20).values())
        original.crop(-30)

    def look(self):
        self.slow.settle()
        self.layer.settle()
        if self.slow.length:
            for held, role in ((self.layer.keys, "keys"), (self.layer.values, "values")):
                expected = self.slow.held(role)
                assert plain(held).dtype == expected.dtype and torch.equal(plain(held), expected)
        assert self.layer.condition == self.slow.kind

    def check(self):
        slow, layer = self.slow, self.layer
        assert layer.get_seq_length() == slow.length
        if layer.observed is not None:
            # the query was seen, and storing is left to what comes next
            assert layer.pending is not None and not slow.is_waiting
            self.done["deferred"] += 1
            return
        assert (layer.pending is not None) == slow.is_waiting
        if not slow.is_waiting:
            assert layer.condition == slow.kind
            assert not layer.is_initialized or layer.tokens.quantized == len(slow.coded["keys"])
            # with nothing waiting, a look changes nothing
            self.look()
        held = layer.config.sink_length + layer.config.held_length
        if slow.kind is None and not slow.is_waiting and slow.length > held:
            self.done["waiting for different tokens"] += 1
        if slow.length:
            self.done["coded"] = max(self.done["coded"], len(slow.coded["keys"]))
            self.done[f"kind {slow.kind}"] += 1


LENGTHS = st.sampled_from((0, 1, 1, 1, 2, 5, 9, 30, 70, 140))
OPERATIONS = st.one_of(
    st.tuples(st.just("update"), LENGTHS, st.booleans()),
    st.tuples(st.just("update"), LENGTHS, st.just(True)),
    st.tuples(st.just("update"), LENGTHS, st.just(True), st.just(True)),
    st.tuples(st.just("update_without_memory"), LENGTHS, st.sampled_from(range(1, 40))),
    st.tuples(st.just("attend_without_memory"), LENGTHS, st.sampled_from(range(1, 60))),
    st.tuples(st.just("crop"), st.sampled_from((0, 1, 3, 8, 20, 75, 500))),
    st.tuples(st.just("reorder"), st.integers(0, 5)),
    st.tuples(st.just("select"), st.integers(0, 5)),
    st.tuples(st.just("repeat"), st.integers(1, 3)),
    *(st.just((name,)) for name in ("offload", "reset", "deepcopy", "look")),
)
# one sequence that is sure to fill the codes of every setting and to do everything
EVERYTHING = [
    ("update", 5, True),
    ("update_without_memory", 140, 1),
    ("update_without_memory", 140, 5),
    ("update", 140, True),
    ("update", 0, True),
    ("repeat", 2),
    ("update", 140, True),
    ("attend_without_memory", 3, 1),
    ("attend_without_memory", 3, 12),
    ("deepcopy",),
    ("reorder", 1),
    ("crop", 20),
    ("offload",),
    ("update", 9, False),
    ("select", 1),
    ("look",),
    ("update", 30, True),
    ("reset",),
    ("update", 1, True),
]
# one token over and over teaches nothing
ALIKE = [
    ("update", 40, True, True),
    ("reorder", 1),
    ("crop", 3),
    ("update", 1, True),
    ("update", 1, True),
    ("select", 2),
    ("update", 9, True),
    ("look",),
    ("update", 9, True),
    ("update", 30, False),
    ("reset",),
    ("update", 140, True, True),
    ("look",),
]
METHODS = ("update", "crop", "reorder", "select", "repeat", "offload", "reset", "deepcopy", "look")
SETTINGS = [
    {"sink_length": 4, "residual_length": 8},
    {"sink_length": 0, "residual_length": 0, "nbits": 2},
    {"sink_length": 3, "residual_length": 40, "key_estimator": "rescaled", "nbits": 8},
    {"sink_length": 0, "residual_length": 16, "key_estimator": "mse", "value_estimator": "mse", "condition": "center"},
    {"sink_length": 5, "residual_length": 1, "nbits": 3, "condition": "none"},
    {"sink_length": 2, "residual_length": 0, "nbits": 8, "value_bits": 2, "condition": "center"},
    {"sink_length": 200, "residual_length": 7, "key_estimator": "rescaled", "nbits": 2.5},
]


DEFERRING = [{**SETTINGS[index], "defers": True} for index in (0, 3, 6)]


@pytest.mark.parametrize("options", SETTINGS + DEFERRING, ids=lambda options: "-".join(map(str, options.values())))
def test_any_sequence_of_operations(options):
    index, options = (SETTINGS + DEFERRING).index(options), dict(options)
    defers = options.pop("defers", False)
    config, done = TurboQuantConfig(**options), Counter()

    # the same in every run, another for every setting
    @seed(index)
    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(OPERATIONS, min_size=1, max_size=14))
    @example(EVERYTHING)
    @example(ALIKE)
    def run(operations):
        both = Both(config, done, defers)
        for name, *arguments in operations:
            getattr(both, name)(*arguments)
            done[name] += 1
            both.check()
        both.look()

    run()
    # what should have happened, did
    expected = {"coded", "failed update", "failed attention", *METHODS, *(["deferred"] if defers else [])}
    if config.condition == "attention":
        expected |= {"kind attention", "kind None"}
    if config.condition != "none" and config.held_length < MAX_WAITING_TOKENS and config.sink_length < 40:
        expected |= {"waiting for different tokens", "kind center"}
    assert expected - {name for name, count in done.items() if count} == set()
    assert done["coded"] > 40


def fingerprint(layer):
    """All that a layer is, with the values of its tensors up to their lengths; never settles what waits for a query."""
    # empty memory, made when the first tokens are stored, is no change
    roles = ROLES if layer.tokens.length else ()
    tensors = {f"{role} pending": states for role, states in (layer.pending or {}).items()}
    for role in roles:
        if layer.tokens.codes[role].length:
            codes, scales = reference.codes_of(
                layer.tokens.codes[role], layer.tokens.quantizers[role], 0, layer.tokens.codes[role].length
            )
            tensors |= {f"{role} codes": codes, **{f"{role} {name}": scale for name, scale in scales.items()}}
        start = max(layer.config.sink_length, layer.tokens.length - layer.config.residual_length)
        pieces = [*layer.tokens.exact.pieces(role, start, layer.tokens.length)]
        pieces += [layer.tokens.exact[role][:, :, : min(layer.tokens.length, layer.config.sink_length)]]
        tensors[f"{role} exact"] = torch.cat(pieces, dim=2)
    if layer.conditioning.query_energy is not None:
        tensors["energy"] = layer.conditioning.query_energy
    scalars = (layer.is_initialized, layer.tokens.length, layer.condition, layer.get_seq_length())
    quantizers = [id(layer.tokens.quantizers[role]) for role in roles]
    return scalars, quantizers, {name: tensor.clone() for name, tensor in tensors.items()}


def same(one, other):
    return (
        one[:2] == other[:2]
        and one[2].keys() == other[2].keys()
        and all(torch.equal(tensor, other[2][name]) for name, tensor in one[2].items())
    )


def attend(layer, tokens, seed=7):
    shape = (2, HEADS, tokens, HEAD_DIM)
    handles = layer.update(integers(*shape, seed=seed), integers(*shape, seed=seed + 1))
    return lambda: sdpa(integers(2, 2 * HEADS, tokens, HEAD_DIM, seed=seed), *handles, enable_gqa=True)


def update(layer, tokens):
    shape = (2, HEADS, tokens, HEAD_DIM)
    keys, values = integers(*shape, seed=5), integers(*shape, seed=6)
    return lambda: layer.update(keys, values)


# what a layer has been through, then what runs out of memory, at each of its allocations in turn
FAILURES = {
    "first update": ("none", (), lambda layer: update(layer, 200)),
    "step that grows": ("none", (140, 8), lambda layer: update(layer, 1)),
    "chunk": ("none", (20, 120), lambda layer: update(layer, 200)),
    "freezing the mean": ("center", (10,), lambda layer: attend(layer, 200)),
    "learning at a step": ("attention", (20, 8), lambda layer: attend(layer, 1)),
    "first attention": ("attention", (), lambda layer: attend(layer, 200)),
    "attention after attention": ("attention", (5, 6), lambda layer: attend(layer, 200, 9)),
    "update that waits": ("attention", (5,), lambda layer: update(layer, 200)),
    "reorder": ("none", (140,), lambda layer: lambda: layer.reorder_cache(torch.tensor([1, 0]))),
    "repeat": ("none", (140,), lambda layer: lambda: layer.batch_repeat_interleave(2)),
    "select": ("none", (140,), lambda layer: lambda: layer.batch_select_indices(torch.tensor([1]))),
    "crop": ("none", (140,), lambda layer: lambda: layer.crop(-30)),
}


ATTENTION_FAILURES = ("first attention", "attention after attention", "freezing the mean", "learning at a step")


@pytest.mark.parametrize("case", FAILURES)
def test_running_out_of_memory_anywhere_changes_nothing(case):
    kind, history, prepare = FAILURES[case]
    at, failures = 1, 0
    while True:
        layer = TurboQuantLayer(TurboQuantConfig(residual_length=16, condition=kind), 0)
        for index, tokens in enumerate(history):
            attend(layer, tokens, 20 + index)()
        operation = prepare(layer)
        before = fingerprint(layer)
        try:
            with OutOfMemoryAt(at):
                operation()
            break
        except torch.OutOfMemoryError:
            failures += 1
        # with the query seen and the tokens stored, only attention itself failed
        stored = case in ATTENTION_FAILURES and layer.pending is None
        assert stored or same(before, fingerprint(layer)), f"changed by a failure at allocation {at}"
        # kernels take one capacity for keys and values
        assert len({buffer.capacity for buffer in layer.tokens.codes.values()}) <= 1
        # and the second try gives what the first would have
        operation()
        retried = fingerprint(layer)
        at += 1
    clean = fingerprint(layer)
    assert failures >= (case != "crop") and at < 1000
    assert clean[0] == retried[0] and clean[2].keys() == retried[2].keys()
    assert all(torch.equal(tensor, retried[2][name]) for name, tensor in clean[2].items())


def test_after_a_failed_first_update_a_smaller_batch_is_fine():
    layer = TurboQuantLayer(TurboQuantConfig(residual_length=16, condition="none"), 0)
    with OutOfMemoryAt(25) as mode, pytest.raises(torch.OutOfMemoryError):
        update(layer, 200)()
    assert mode.count == 25 and layer.get_seq_length() == 0
    layer.update(integers(1, HEADS, 30, HEAD_DIM, seed=1), integers(1, HEADS, 30, HEAD_DIM, seed=2))
    assert layer.get_seq_length() == 30


CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=99, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def test_two_threads_with_two_caches(model):
    prompts = [torch.randint(3, 99, (1, 60), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]

    def generate(ids):
        cache = TurboQuantCache(CONFIG, residual_length=8)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, min_new_tokens=20, **{cache_name(model): cache}
        )
        assert cache.layers[0].tokens.quantized == 79 - 8 - 4
        return out

    alone, together, barrier = [generate(ids) for ids in prompts], [[], []], threading.Barrier(2)

    def work(index):
        barrier.wait()
        for _ in range(3):
            together[index].append(generate(prompts[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.equal(*alone)
    for expected, outputs in zip(alone, together, strict=True):
        assert len(outputs) == 3 and all(torch.equal(out, expected) for out in outputs)


@pytest.mark.parametrize("other", ({"num_key_value_heads": 4}, {"head_dim": 32}))
def test_a_cache_of_another_model_is_refused(model, other):
    config = copy.deepcopy(CONFIG)
    config.update(other)
    stranger, ids = LlamaForCausalLM(config).eval(), torch.arange(3, 43)[None]
    cache = TurboQuantCache(CONFIG, residual_length=8)
    with torch.no_grad():
        model(ids, **{cache_name(model): cache})
        before = [plain(layer.keys) for layer in cache.layers]
        with pytest.raises(ValueError, match="must keep the batch size, heads, head_dim and device .* at layer 0"):
            stranger(ids[:, :1], **{cache_name(stranger): cache})
        assert all(torch.equal(plain(layer.keys), held) for layer, held in zip(cache.layers, before, strict=True))
        # reset lets the other model have it
        cache.reset()
        stranger(ids, **{cache_name(stranger): cache})
    assert cache.get_seq_length() == 40


def outcome(function):
    try:
        return function()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("condition", ("attention", "none"))
def test_query_length_0_as_with_a_dynamic_cache(model, condition):
    ids = torch.arange(3, 63)[None]
    results = []
    for make in (DynamicCache, lambda config: TurboQuantCache(config, residual_length=8, condition=condition)):
        for before in (0, 60):
            cache = make(config=CONFIG)
            with torch.no_grad():
                if before:
                    model(ids[:, :before], **{cache_name(model): cache})
                empty = outcome(lambda: list(model(ids[:, :0], **{cache_name(model): cache}).logits.shape))  # noqa: B023
                after = outcome(lambda: list(model(ids[:, :5], **{cache_name(model): cache}).logits.shape))  # noqa: B023
            results.append((empty, after, cache.get_seq_length()))
    nothing, held = results[:2]
    assert nothing[0] is held[0] is RuntimeError
    # where tokens are held, the error says what to do, as for a prompt that is no longer than they are
    assert results[2:] == [nothing, (ValueError, *held[1:])]
    assert cache.layers[0].tokens.quantized == 65 - 8 - 4


@pytest.mark.parametrize("condition", ("attention", "center", "none"))
@pytest.mark.parametrize("window", (0, 8))
def test_batch_0_as_with_a_dynamic_cache(model, condition, window):
    results = []
    options = {"residual_length": window, "condition": condition}
    for cache in (DynamicCache(config=CONFIG), TurboQuantCache(CONFIG, **options)):
        ids = torch.zeros(0, 40, dtype=torch.long)
        with torch.no_grad():
            shapes = [
                outcome(lambda: list(model(piece, **{cache_name(model): cache}).logits.shape))  # noqa: B023
                for piece in (ids, ids[:, :1], ids[:, :20])
            ]
        results.append(shapes)
    assert results[0] == results[1]
