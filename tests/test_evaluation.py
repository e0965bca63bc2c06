"""The parts of `hf-turboquant evaluate`, on a real small model and on tensors whose answers are known."""

import functools
import io
import json
import re
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from load_model import default_model
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import hf_turboquant
from hf_turboquant import TurboQuantCache, cli
from hf_turboquant._supported import cache_name
from hf_turboquant.estimate import Estimate
from hf_turboquant.evaluation import benchmark, caches, claims, fidelity, load, needle, plots, quality, run
from hf_turboquant.evaluation.run import Results

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.125,
}
_ALL_CODES = "condition=none,residual_length=32,sink_length=0"
# every estimator of the papers: only keys, only values (the other in 8 bits), then both with exact tokens
ESTIMATORS = [
    f"turboquant:key_bits=4/3/2,value_bits=8,key_estimator=mse/rescaled,{_ALL_CODES}",
    f"turboquant:key_bits=4/3/2,value_bits=8,key_estimator=qjl,sketch=orthogonal/gaussian,{_ALL_CODES}",
    f"turboquant:key_bits=8,key_estimator=rescaled,value_bits=4/3/2,value_estimator=mse/rescaled,{_ALL_CODES}",
    "turboquant:nbits=4/3/2,key_estimator=mse/rescaled,condition=none/center",
    "turboquant:nbits=4/3/2,key_estimator=qjl,condition=none",
]
TEXT = "".join(f"Line {i} of the log says that nothing happened at {i * 7 % 24} o'clock.\n" for i in range(200))


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY)).eval()


def test_the_cache_arrives_without_the_old_name(tiny, monkeypatch):
    """In transformers 5.40 `forward` loses `past_key_values` among its other keywords."""
    if cache_name(tiny) != "cache":
        pytest.skip("before transformers 5.24 there is the old name alone")

    def stripped(shimmed):
        @functools.wraps(shimmed)
        def forward(*args, past_key_values=None, **kwargs):
            return shimmed(*args, **kwargs)

        return forward

    for kind in (type(tiny), type(tiny.model)):
        monkeypatch.setattr(kind, "forward", stripped(kind.forward))
    arrived, update = [], TurboQuantCache.update
    monkeypatch.setattr(TurboQuantCache, "update", lambda *args, **kwargs: arrived.append(1) or update(*args, **kwargs))
    ids = torch.randint(0, 97, (1, 60), generator=torch.Generator().manual_seed(0))
    for run_model in (
        lambda: quality.measure(tiny, ids, [{"nbits": 2}], block=20),
        lambda: fidelity.capture(tiny, ids),
        lambda: benchmark.generate(
            tiny, ids[:, :20], 3, benchmark.Times(), **{cache_name(tiny): TurboQuantCache(tiny.config)}
        ),
    ):
        arrived.clear()
        run_model()
        assert arrived
    assert len(Estimate.from_config(tiny.config).compressed()) == 2


def test_specs():
    found = caches.parse("turboquant:nbits=4/2,key_estimator=qjl/mse,residual_length=0")
    assert [(o["nbits"], o["key_estimator"], o["residual_length"]) for o in found] == [
        (4, "qjl", 0),
        (4, "mse", 0),
        (2, "qjl", 0),
        (2, "mse", 0),
    ]
    assert caches.label(found[0]) == "turboquant 4 bits qjl, window 0"
    assert caches.parse("dynamic") == [{"cache": "dynamic"}]
    for spec in ("other:nbits=4", "turboquant:nbits", "turboquant:=4"):
        with pytest.raises(ValueError, match="KIND:OPTION=VALUE"):
            caches.parse(spec)


def named(*specs):
    return [options for spec in specs for options in caches.parse(spec)]


def test_caches_that_differ_in_bits_share_a_line():
    many = named(*ESTIMATORS)
    found = caches.lines(many)
    assert len(found) == 11 and all(len(members) == 3 for members in found.values())
    # every cache is on one line, and its words tell it from all others
    assert sorted(caches.label(o) for members in found.values() for o in members) == sorted(map(caches.label, many))
    assert len(set(map(caches.label, many))) == 33
    assert list(found)[:2] == [
        f"turboquant {name}, values 8 bits, plain, window 32, 0 sinks" for name in ("mse", "rescaled")
    ]
    assert "turboquant, keys 8 bits rescaled mse, plain, window 32, 0 sinks" in found
    assert "turboquant mse, centred" in found
    found = caches.lines(named("turboquant:nbits=4/2,residual_length=32", "quanto:nbits=4,axis_key=0/-1", "fp8"))
    assert {name: len(members) for name, members in found.items()} == {
        "turboquant, window 32": 2,
        "quanto 4 bits, axis_key 0": 1,
        "quanto 4 bits, axis_key -1": 1,
        "fp8": 1,
    }


@pytest.mark.parametrize(
    "specs, lines",
    [
        (["turboquant:nbits=4", "fp8"], 2),
        (
            [
                "turboquant:nbits=4/3/2,key_estimator=rescaled,residual_length=32",
                "quanto:nbits=4/2,axis_key=0/-1",
                "fp8",
            ],
            4,
        ),
        (ESTIMATORS, 11),
    ],
)
def test_plots_of_few_and_many_caches(tiny, tmp_path, specs, lines):
    found, qualities, units = named(*specs), {}, {}
    for index, options in enumerate(found):
        name, error = caches.label(options), 0.01 * (index + 1)
        qualities[name] = quality.Quality(tokens=1, kls=[error], total_bits=3 + index % 3)
        units[name] = {"layer": [0, 1], "output_error": [error, 2 * error]}
    figure = plots.overview_figure(qualities, found, tiny.config)
    by_layer = plots.fidelity_figure(units, "Error by layer")
    with warnings.catch_warnings():
        # matplotlib only warns when a legend leaves no room for the axes
        warnings.simplefilter("error")
        figure.savefig(tmp_path / "overview.png", dpi=120)
        by_layer.savefig(tmp_path / "fidelity.png", dpi=120)
    assert len(by_layer.axes[0].get_lines()) == len(found)
    drawn = figure.axes[0].get_lines()
    assert len(drawn) == lines
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle(), line.get_markerfacecolor()) for line in drawn}
    assert len(looks) == lines
    assert all(axis.get_window_extent().height > figure.bbox.height / 2 for axis in figure.axes)
    legend = [text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()]
    assert legend == list(caches.lines(found))
    for legend in [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]:
        box = legend.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0


def test_bits_are_counted(tiny):
    tokens = torch.randint(0, 97, (1, 400))
    expected = {
        # codes, and 16 bits of scale over 16 dimensions; with the sketch, keys have two
        "turboquant:nbits=4,key_estimator=rescaled": 5,
        "turboquant:nbits=2,key_estimator=qjl": 3.5,
        "dynamic": 16,
        "fp8": 8,
    }
    for spec, bits in expected.items():
        (options,) = caches.parse(spec)
        try:
            cache = caches.new_cache(tiny.config, options)
        except ValueError as error:
            # transformers 5.17 has no fp8 cache
            assert spec == "fp8" and "Unknown quantization backend" in str(error)
            continue
        with torch.no_grad():
            tiny(tokens, **{cache_name(tiny): cache})
        assert caches.bits_per_coordinate(cache) == pytest.approx(bits, rel=0.01)
        if spec == "dynamic":
            assert caches.held_bytes(cache) == 2 * 2 * 2 * 400 * 16 * 4


def test_integers_of_transformers(tiny):
    pytest.importorskip("optimum.quanto")
    tokens = torch.randint(0, 97, (1, 400))
    (options,) = caches.parse("quanto:nbits=4")
    cache = caches.new_cache(tiny.config, options)
    with torch.no_grad():
        tiny(tokens, **{cache_name(tiny): cache})
    # a group is one vector of 16: two bytes of scale, and of zero point
    assert caches.bits_per_coordinate(cache) == pytest.approx(4 + 32 / 16)


def test_integers_of_hqq(tiny):
    pytest.importorskip("hqq")
    tokens, found = torch.randint(0, 97, (1, 400)), {}
    for spec, bits in {
        "hqq:nbits=4": 4 + 32 / 16,
        "hqq:nbits=2": 2 + 32 / 16,
        "hqq:nbits=4,axis_key=0,axis_value=0": 4 + 32 / 16,
    }.items():
        cache = caches.new_cache(tiny.config, *caches.parse(spec))
        with torch.no_grad():
            tiny(tokens, **{cache_name(tiny): cache})
            logits = tiny(tokens[:, :8], **{cache_name(tiny): cache}).logits
        assert caches.bits_per_coordinate(cache) == pytest.approx(bits)
        found[spec] = logits
        layer = cache.layers[1]
        # a scale for every vector, or for every place of a group that runs across tokens
        assert layer._quantized_keys[1]["scale"].shape == ((1, 800) if "0" in spec else (800, 1))
    assert not torch.equal(found["hqq:nbits=4"], found["hqq:nbits=4,axis_key=0,axis_value=0"])
    for spec in ("hqq:nbits=3", "hqq:nbits=4,axis_key=-1", "hqq:nbits=7"):
        with pytest.raises(ValueError, match="`axis_key`|`nbits`"):
            caches.new_cache(tiny.config, *caches.parse(spec))


@pytest.mark.parametrize("kind, package", [("quanto", "optimum.quanto"), ("hqq", "hqq")])
def test_tokens_that_an_integer_cache_cannot_hold(tiny, kind, package):
    pytest.importorskip(package)
    options = {"cache": kind, "nbits": 4, "q_group_size": 10_000}
    with pytest.raises(ValueError, match=f"{kind} 4 bits, q_group_size 10000 cannot hold these tokens"):
        quality.measure(tiny, torch.randint(0, 97, (1, 64)), [options], prefill=48)


def test_options_that_no_cache_has(tiny):
    for spec in ("turboquant:colour=3", "dynamic:nbits=4", "quanto:q_group_size=0"):
        with pytest.raises(ValueError, match="colour|nbits|q_group_size"):
            caches.new_cache(tiny.config, *caches.parse(spec))


def test_quality_adds_up(tiny):
    windows = torch.randint(0, 97, (2, 200), generator=torch.Generator().manual_seed(0))
    configurations = [{"cache": "dynamic"}, {"nbits": 2, "key_estimator": "rescaled"}]
    options = {"block": 16, "prefill": 160, "score_from": 160}
    full, same, coded = quality.measure(tiny, windows, configurations, batch=2, **options)
    # the last token of a window has no next one
    assert full.tokens == same.tokens == coded.tokens == 2 * 39 == len(coded.kls)
    assert same.kl == 0 and same.agreement == 1 and same.perplexity == full.perplexity and same.compression_ratio == 1
    assert coded.kl > 0 and coded.kl_p99 > coded.kl and coded.compression_ratio > 1
    with torch.no_grad():
        cache = TurboQuantCache(tiny.config, **configurations[1])
        logits = [tiny(part, **{cache_name(tiny): cache}).logits for part in (windows[:, :160], windows[:, 160:176])]
        plain = tiny(windows).logits[:, 160:176].log_softmax(-1)
    kl = (plain.exp() * (plain - logits[1].log_softmax(-1))).sum(-1)
    assert torch.tensor(coded.kls[: kl.numel()]) == pytest.approx(kl.flatten(), abs=1e-5)
    halves = [quality.measure(tiny, half, configurations, **options)[0] for half in windows.split(1)]
    assert (halves[0] + halves[1]).perplexity == pytest.approx(full.perplexity, rel=1e-5)
    assert sum(halves, quality.Quality()).nll_sum == pytest.approx(full.nll_sum, rel=1e-5)


def test_needles_lie_where_they_should(smollm2):
    _, tokenizer = smollm2
    for depth in (0.0, 0.5, 1.0):
        context, question = needle.haystack(tokenizer, TEXT, 150, depth, "12345")
        assert context.shape == (1, 150)
        before, _, after = tokenizer.decode(context[0]).partition("12345")
        assert abs(len(before) / len(before + after) - depth) < 0.15
        assert tokenizer.decode(question[0]).endswith("lighthouse is")
    with pytest.raises(ValueError, match="haystack of 10 tokens"):
        needle.haystack(tokenizer, TEXT, 10, 0, "12345")


def test_attention_is_compared_on_what_the_model_computes(tiny):
    ids = torch.randint(0, 97, (1, 320), generator=torch.Generator().manual_seed(0))
    layers = fidelity.capture(tiny, ids)
    assert [layer.layer_idx for layer in layers] == [0, 1]
    cache = DynamicCache(config=tiny.config)
    with torch.no_grad():
        tiny(ids, **{cache_name(tiny): cache})
    for layer, held in zip(layers, cache.layers, strict=True):
        assert torch.allclose(layer.keys, held.keys, atol=1e-5) and torch.allclose(layer.values, held.values, atol=1e-5)
        assert layer.query.shape == (1, 4, 320, 16)
    exact = fidelity.compare(tiny.config, layers[1], {"cache": "dynamic"}, 320)
    scores = [f"{name}{measure}" for name in ("", "all_", "key_") for measure in ("cosine", "top1")]
    assert [exact[name] for name in scores] == pytest.approx([1] * 6) and exact["output_error"] < 1e-6
    errors = [fidelity.compare(tiny.config, layers[1], {"nbits": nbits}, 320) for nbits in (8, 4, 2)]
    for name, order in (("cosine", -1), ("all_cosine", -1), ("key_cosine", -1), ("output_error", 1)):
        assert [found[name] for found in errors] == sorted((found[name] for found in errors), reverse=order < 0)
    assert errors[0]["output_error"] < 0.02 < errors[2]["output_error"]
    with pytest.raises(ValueError, match="must be from 149 to 320"):
        fidelity.compare(tiny.config, layers[1], {"nbits": 4}, 148)


def test_who_asks_and_which_tokens_are_compared(tiny):
    """Written out: the last key in codes as in the benchmark, and queries over all tokens as the cache is used."""
    generator = torch.Generator().manual_seed(0)
    layer = fidelity.capture(tiny, torch.randint(0, 97, (1, 320), generator=generator))[1]
    found = fidelity.compare(tiny.config, layer, {"nbits": 2}, 320)
    cache = TurboQuantCache(tiny.config, nbits=2)
    cache.layers[1].update(layer.keys[:, :, :304].contiguous(), layer.values[:, :, :304].contiguous())
    cache.layers[1].settle(layer.query[:, :, :304])
    cache.layers[1].update(layer.keys[:, :, 304:], layer.values[:, :, 304:])
    both = layer.keys, cache.layers[1].keys.dequantize()
    by_key = [layer.keys[:, :, 175:176] @ keys[:, :, 4:176].mT for keys in both]
    by_query = [layer.query[:, :, 304:] @ keys.repeat_interleave(2, 1)[:, :, :305].mT for keys in both]
    for name, scores in (("key", by_key), ("all", [x - x.mean(-1, keepdim=True) for x in by_query])):
        cosine = torch.cosine_similarity(*scores, dim=-1).mean().item()
        assert found[f"{name}_cosine"] == pytest.approx(cosine, abs=1e-5) and cosine < 0.99
        assert found[f"{name}_top1"] == (scores[0].argmax(-1) == scores[1].argmax(-1)).float().mean().item()


def test_claims_of_the_papers():
    for nbits, gaussian in ((2, 0.1175), (3, 0.03455), (4, 0.0095)):
        found = claims.distortion(nbits, 128)
        assert found["measured"] == pytest.approx(found["codebook"], rel=0.02)
        assert found["lower_bound"] < found["measured"] < gaussian < found["upper_bound"]
    found = {
        (estimator, sketch): claims.inner_product(estimator, 2, 128, sketch, seeds=8)
        for estimator, sketch in (
            ("mse", "orthogonal"),
            ("rescaled", "orthogonal"),
            ("qjl", "gaussian"),
            ("qjl", "orthogonal"),
        )
    }
    expected = {"mse": (0.883, 0.1156), "rescaled": (1, 0.1299)}
    for (estimator, sketch), measured in found.items():
        slope, variance = expected.get(estimator, (1, 0.565 if sketch == "gaussian" else 0.086))
        assert measured["slope"] == pytest.approx(slope, abs=0.01)
        assert measured["variance"] == pytest.approx(variance, rel=0.05)


@pytest.fixture
def arguments(smollm2, tmp_path):
    text = tmp_path / "log.txt"
    text.write_text(TEXT)
    found = ["evaluate", str(default_model()), "--text", str(text), "--out", str(tmp_path / "out")]
    found += ["--caches", "turboquant:nbits=4,key_estimator=rescaled", "--window", "224", "--prefill", "160"]
    found += ["--score-from", "160", "--needle-lengths", "200", "--needle-depths", "0.2"]
    return [*found, "--fidelity-lengths", "200"]


def test_the_command_and_an_interrupted_run(arguments, tmp_path, capsys, monkeypatch):
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert all(f"plot: {tmp_path / 'out' / name}.png\n" in text for name in ("overview", "fidelity"))
    for title in ("Quality", "Needle", "Attention", "Distortion", "Inner products"):
        assert title in text
    # what others published stands beside it
    rows = (
        r"3 +128 .* 0\.03 .* 0\.000270",
        r"qjl, gaussian sketch +2 .* 0\.56",
        r"published, 2 bits +8,192 +0\.9846 +0\.694",
    )
    assert all(re.search(f"^ {row} *$", text, re.M) for row in rows) and "Published of Qwen2.5-3B-Instruct" in text
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "results.json",
        *(f"{name}.png" for name in ("overview", "fidelity")),
    }
    found = json.loads((out / "results.json").read_text())
    assert found["conditions"]["window"] == 224 and {"dtype", "device", "torch"} <= set(found["conditions"])
    name = "turboquant 4 bits rescaled"
    measured = found["results"][f"quality: window 0, {name}"]
    assert measured["tokens"] == 63 and 0 < sum(measured["kls"]) / 63 < 0.05 and measured["total_bits"] == 4.25
    needles = {key: unit for key, unit in found["results"].items() if key.startswith("needle")}
    # found at 4 bits, as through the full cache
    assert len(re.findall(r"^ (dynamic|turboquant 4 bits rescaled) +✓ 1/1 *$", text, re.M)) == 2
    assert len(needles) == 2 and all(unit["exact"] for unit in needles.values())
    assert len(found["results"][f"fidelity: {name}, 200 tokens"]["cosine"]) == 30

    # what is there is kept, what is missing is measured
    lost = f"needle: {name}, 200 tokens, depth 0.2"
    del found["results"][lost]
    (out / "results.json").write_text(json.dumps(found))
    monkeypatch.setattr(quality, "Full", lambda *args, **kwargs: pytest.fail("measured again"))
    calls = []
    find = needle.find_needle
    monkeypatch.setattr(needle, "find_needle", lambda *args: calls.append(args) or find(*args))
    assert cli.main(arguments) == 0
    assert len(calls) == 1 and json.loads((out / "results.json").read_text())["results"][lost]["exact"]

    # other conditions are another run, which is said before the weights are loaded
    capsys.readouterr()
    monkeypatch.setattr(load, "load_model", lambda *args: pytest.fail("weights loaded"))
    assert cli.main([*arguments, "--block", "8"]) == 2
    assert "holds results of other conditions: block 64, now 8" in one_line(capsys)


def test_ctrl_c_and_going_on(arguments, tmp_path, capsys, monkeypatch):
    """`--window` alone, stopped at the second cache of the first window: what was finished before it is kept."""
    command = [*arguments[:5], str(tmp_path / "out"), "--parts", "quality", "--window", "256", "--caches"]
    command.append("turboquant:nbits=4/2,key_estimator=rescaled")
    compare, left = quality.Full.compare, [1]

    def stopped(*args, **kwargs):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return compare(*args, **kwargs)

    monkeypatch.setattr(quality.Full, "compare", stopped)
    assert cli.main(command) == 130
    assert "stopped. Give the same command to go on: what --out holds is not measured again." in one_line(capsys)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    names = ["full cache", "turboquant 4 bits rescaled", "turboquant 2 bits rescaled"]
    assert list(found["results"]) == [f"quality: window 0, {name}" for name in names[:2]]
    assert (found["conditions"]["prefill"], found["conditions"]["score_from"]) == (128, 128)
    left += [1]
    assert cli.main(command) == 0 and not left
    again = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert list(again) == [f"quality: window 0, {name}" for name in names]
    assert (
        all(unit["tokens"] == 127 for unit in again.values()) and again[f"quality: window 0, {names[2]}"]["kls"][-1] > 0
    )


def test_windows_that_share_a_cache(tiny, tmp_path):
    """`batch` windows at a time: as `measure` reads them, and otherwise than one by one."""
    found = {}
    for batch in (1, 2):
        caches_ = ["turboquant:nbits=2,key_estimator=rescaled"]
        settings = load.Settings("tiny", "log", caches_, ("quality",), window=320, windows=2, batch=batch)
        console = Console(file=io.StringIO())
        units = run.evaluate(tiny, letters, TEXT, settings, tmp_path / str(batch), console).units
        assert len(units) == 2 * 2 // batch
        ours = [quality.Quality(**unit) for name, unit in units.items() if name.endswith("2 bits rescaled")]
        found[batch] = sum(ours, quality.Quality())
    windows = quality.split_windows(letters, TEXT, 320, 2)
    expected = quality.measure(tiny, windows, settings.caches, batch=2, block=64, prefill=160, score_from=160)[1]
    assert found[2].kl == pytest.approx(expected.kl, rel=1e-3) and found[1].tokens == found[2].tokens == 2 * 159
    assert found[1].kl != pytest.approx(expected.kl, rel=1e-3)


def letters(text, **options):
    return {"input_ids": torch.tensor([[ord(letter) % 97 for letter in text]])}


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"hf-turboquant {hf_turboquant.__version__}\n"


def one_line(capsys) -> str:
    message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-turboquant: ")]
    assert len(message) == 1
    return message[0]


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--window", "9000"], "within the 8,192 tokens"),
        (["--needle-lengths", "8190"], "within the 8,192 tokens"),
        (["--window", "100"], "must leave tokens of the window to score, got 160 and 160 of 100"),
        (["--text", "{empty}"], "must hold words"),
        (["--text", "{missing}"], "must be a text file"),
        (["--out", "{text}/out"], "must be a folder that can be written to"),
        (["--parts", "speed"], "--parts must be of"),
        (["--needle-depths", "2"], "--needle-depths must be from 0"),
        (["--caches", "turboquant:nbits=9"], "`nbits` must be"),
        (["--caches", "turboquant:nbits=4/2/4"], "--caches must differ from each other"),
        (["--caches", "hqq:nbits=3"], "must not be 3"),
        (["--caches", "hqq:nbits=7"], "transformers' hqq cache must fit this model"),
        (["--caches", "turboquant:nbit=4"], "Did you mean `nbits`?"),
        (["--dtype", "float33"], "--dtype must be"),
        (["--dtype", "float8_e4m3fn"], "--dtype must be"),
        (["--device", "gpu"], "--device must be one that this machine"),
        (["--device", "meta"], "--device must be one that this machine"),
        (["--windows", "900"], "must hold 900 windows"),
    ],
)
def test_bad_input_is_one_line(arguments, tmp_path, capsys, monkeypatch, extra, message):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    if extra[0] not in ("--out", "--windows"):
        monkeypatch.setattr(load, "load_model", lambda *args: pytest.fail("weights loaded"))
    places = {"empty": empty, "missing": tmp_path / "missing.txt", "text": tmp_path / "log.txt"}
    assert cli.main([*arguments, *(word.format(**places) for word in extra)]) == 2
    assert message in one_line(capsys)
    # nothing that the next run would take for results of other conditions
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "files, message",
    [
        ({"config.json": "{"}, "not a valid JSON file"),
        ({"config.json": '{"model_type": "llama", "hidden_size": "x"}'}, "hidden_size"),
        ({"config.json": '{"model_type": "llama"}'}, "no file named model.safetensors"),
        ({"config.json": '{"model_type": "llama"}', "model.safetensors": "no tensors"}, "MODEL must be a causal"),
        ({}, "is not a valid JSON file"),
    ],
)
def test_a_broken_model_is_one_line(arguments, tmp_path, capsys, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    arguments[1] = str(tmp_path if files else tmp_path / "log.txt")
    assert cli.main(arguments) == 2
    assert message in one_line(capsys)


def test_out_of_memory_is_one_line(arguments, capsys, monkeypatch):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(quality.Full, "compare", fail)
    assert cli.main(arguments) == 2
    assert "out of memory. Take shorter contexts" in one_line(capsys)


def test_a_run_that_was_over_at_once_leaves_nothing_to_agree_with(tmp_path):
    Results(tmp_path, {"window": 1})
    Results(tmp_path, {"window": 2}).get("unit", dict)
    with pytest.raises(ValueError, match="other conditions: window 2, now 3"):
        Results(tmp_path, {"window": 3})


def test_an_unknown_model_is_one_line(arguments, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments[1] = "no-such/model"
    assert cli.main(arguments) == 2
    assert "MODEL must be a name on the Hub" in one_line(capsys)
    arguments[1] = str(default_model() / "config.json")
    assert cli.main(arguments) == 2
    assert "a folder with weights, got the file" in one_line(capsys)


def test_a_missing_package_is_one_line(arguments, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "hf_turboquant.evaluation.run", raising=False)
    monkeypatch.delattr("hf_turboquant.evaluation.run", raising=False)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(arguments) == 2
    message = one_line(capsys)
    assert "needs the package 'rich'" in message and "`python -m pip install rich matplotlib`" in message
    # what the extra does not bring
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert cli.main([*arguments, "--text", "hub:owner/name"]) == 2
    assert "pip install datasets`" in one_line(capsys)


def test_a_dataset_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return {"text": ["one", "two\n"], "other": ["three"]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load.read_text("hub:owner/name") == "one\ntwo"
    assert load.read_text("hub:owner/name:raw:train:other") == "three"
    assert asked == [("owner/name", None, "test"), ("owner/name", "raw", "train")]
    with pytest.raises(ValueError, match="hub:"):
        load.read_text("hub:owner/name:raw:train:missing")
