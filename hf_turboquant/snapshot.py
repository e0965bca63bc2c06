"""Snapshot: all that a cache layer holds as tensors and plain values, and a new layer made to hold it."""

from dataclasses import replace

import torch

from .layer import ROLES

# what a compressed layer makes anew, or saves token by token
_NOT_FIELDS = {"config", "layer_idx", "quantizers", "codes", "exact", "pending", "query_energy", "found", "length"}
_NOT_FIELDS |= {"is_initialized", "is_offloaded", "plans", "checked", "step"}


def layer_state(layer) -> dict:
    """Kind, fields and tokens of a layer; tokens that wait for their query or on the CPU come first."""
    compressed = hasattr(layer, "codes")
    if compressed:
        layer.come_to_rest()
    fields = {name: value for name, value in vars(layer).items() if not (compressed and name in _NOT_FIELDS)}
    tokens = _tokens(layer) if compressed and layer.is_initialized else None
    return {"kind": type(layer).__name__, "fields": fields, "tokens": tokens}


def _tokens(layer) -> dict:
    sinks, length, quantized = min(layer.config.sink_length, layer.length), layer.length, layer.codes["keys"].length
    keys, condition = layer.quantizers["keys"], layer.condition

    def exact(role: str) -> torch.Tensor:
        # in the order of the sequence; slots that hold no token stay behind
        runs = [(0, sinks), (sinks + quantized, length)]
        pieces = [piece for start, stop in runs for piece in layer.exact.pieces(role, start, stop)]
        return torch.cat([layer.exact[role][:, :, :0], *pieces], dim=2)

    return {
        "length": length,
        "quantized": quantized,
        "condition": condition,
        "exact": {role: exact(role) for role in ROLES},
        "codes": {
            role: {name: tensor[:, :, : -(-quantized // buffer.block)] for name, tensor in buffer.tensors.items()}
            for role, buffer in layer.codes.items()
        },
        # where statistics were degenerate, what is there changes nothing
        "mean": keys.mean if condition in ("center", "attention") else None,
        "scale": keys.scale if condition == "attention" else None,
        "query_energy": layer.query_energy,
        "constants": {role: _probe(quantizer) for role, quantizer in layer.quantizers.items()},
    }


def restore_layer(layer, state: dict) -> None:
    """
    Puts the state of a saved layer into a new one.

    Raises:
        `ValueError`: the state contradicts itself or the layer.
    """
    for name, value in state["fields"].items():
        # set by the first tokens only
        if name not in vars(layer) and name not in ("dtype", "device", "indexer_dtype", "indexer_device"):
            raise ValueError(f"{type(layer).__name__} must have a field `{name}`, and has none in this transformers")
        setattr(layer, name, value)
    if state["tokens"] is not None:
        _restore_tokens(layer, **state["tokens"])


def _restore_tokens(layer, length, quantized, condition, exact, codes, mean, scale, query_energy, constants) -> None:
    sinks, window = layer.config.sink_length, layer.config.residual_length
    layer.lazy_initialization(*(exact[role][:, :, :0] for role in ROLES))
    batch, heads, _, head_dim = exact["keys"].shape
    recent = length - min(sinks, length) - quantized
    _must(0 <= quantized and 0 <= recent <= window, "length", f"{length} of which {quantized} are quantised")
    for role in ROLES:
        buffer, held = layer.codes[role], exact[role]
        fits = held.shape[:3] == (batch, heads, length - quantized) and held.dtype == layer.dtype
        _must(fits, f"exact {role}", f"{held.dtype} {list(held.shape)}")
        expected = {
            name: (tensor.dtype, (batch, heads, -(-quantized // buffer.block), *tensor.shape[3:]))
            for name, tensor in buffer.tensors.items()
        }
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in codes[role].items()}
        _must(found == expected, f"codes of {role}", found)
        # another machine's rounding passes, another stream does not
        probes = list(zip(constants[role], _probe(layer.quantizers[role]), strict=True))
        _must(
            all(abs(held - made) < 1e-3 for held, made in probes),
            f"rotation and codebook of {role}",
            "others from the same seed",
        )
        buffer.tensors, buffer.length = codes[role], quantized
    per_channel = {"mean": mean, "scale": scale}
    for name, given in per_channel.items():
        wanted = {"mean": ("center", "attention"), "scale": ("attention",)}[name]
        shape = (heads, 1, head_dim) if condition in wanted else None
        _must(shape == (None if given is None else tuple(given.shape)), name, f"condition {condition!r}")
    layer.quantizers = {**layer.quantizers, "keys": replace(layer.quantizers["keys"], **per_channel)}
    layer.exact.reserve(min(length, sinks + window), limit=sinks + window)
    for role in ROLES:
        layer.exact.write(role, 0, exact[role][:, :, :sinks])
        layer.exact.write(role, sinks + quantized, exact[role][:, :, sinks:])
    if query_energy is not None:
        _must(query_energy.shape == (heads, head_dim), "query_energy", list(query_energy.shape))
        layer.query_energy = query_energy
    layer.length, layer.found = length, condition


def _probe(quantizer) -> list[float]:
    """A few sums that change with any number of the rotation, the sketch or the codebook: a rough checksum."""
    x = torch.arange(1, quantizer.head_dim + 1, dtype=torch.float64).cos()
    matrices = [m.double().cpu() for m in (quantizer.transform[0], quantizer.sketch) if m is not None]
    centroids = quantizer.centroids.double().cpu()
    return [*(float(x.sin() @ matrix @ x) for matrix in matrices), float(centroids.abs() @ centroids.exp())]


def _must(holds: bool, what: str, got) -> None:
    if not holds:
        raise ValueError(f"{what} must fit the rest of the layer, got {got}")
