"""How far stored codes deviate from the mathematics in float64, in every configuration of the kernel that quantizes."""

from dataclasses import dataclass, replace

import torch

from hf_turboquant import TurboQuantConfig
from hf_turboquant.ops import reference
from hf_turboquant.quantizer import Quantizer


@dataclass(frozen=True)
class Case:
    """
    Keys or values of one configuration: `conditioned` gives every head its own mean and scale, `per_head` its own
    transform as well; `pieces` are the lengths of successive appends.
    """

    role: str = "keys"
    nbits: int = 4
    estimator: str = "qjl"
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    conditioned: bool = False
    heads: int = 3
    sketch: str = "orthogonal"
    rotation: str = "haar"
    per_head: bool = False
    pieces: tuple[int, ...] = (1, 126, 1, 1, 3, 200, 1)

    def quantizer(self, device) -> Quantizer:
        role = self.role.removesuffix("s")
        options = {f"{role}_bits": self.nbits, f"{role}_estimator": self.estimator}
        config = TurboQuantConfig(sketch=self.sketch, rotation=self.rotation, **options)
        quantizer = Quantizer.create(config, self.role, 0, self.head_dim, device)
        if self.conditioned or self.per_head:
            generator = torch.Generator().manual_seed(1)
            factors = 0.5 + torch.rand(self.heads, 1, self.head_dim, generator=generator).to(device)
            mean = torch.randn(self.heads, 1, self.head_dim, generator=generator).to(device)
            quantizer = replace(quantizer, mean=mean, scale=factors)
        if self.per_head:
            rotations = quantizer.transform.roll(1, -1).repeat(self.heads, 1, 1).contiguous()
            for head in range(self.heads):
                rotations[head] = rotations[head].roll(head, 0)
            quantizer = replace(quantizer, transform=rotations, dual=rotations)
        return quantizer


@dataclass
class Disagreement:
    """
    How far stored codes deviate from the mathematics.

    Args:
        codes (`float`): fraction of codes that differ from the reference's.
        coordinate (`float`):
            Largest excess of |αy - c[code]| over that of the nearest centroid, times √head_dim, where α is the factor
            before rounding that best fits the codes of a vector. At 8 bits α is one, and c the codes times their scale.
        direction (`float`): largest (best cosine - cosine) / (1 - best cosine), where the best is over all α.
        sign (`float`): largest |⟨sketch row, residual⟩| of a wrong sign, over |row| |residual| / √head_dim.
        scale (`float`): largest relative error of a scale or residual norm, given the codes.
        error (`float`): squared error of the dequantized vectors, over that of the reference's, minus one.
    """

    codes: float
    coordinate: float
    direction: float
    sign: float
    scale: float
    error: float


def disagreement(states: torch.Tensor, quantizer: Quantizer, buffer) -> Disagreement:
    """Compares all tokens of `buffer` with `states`, of shape `[batch, heads, buffer.length, head_dim]`."""
    codes, stored = reference.codes_of(buffer, quantizer, 0, buffer.length)
    expected, expected_scales = reference.encode(states, quantizer)
    x = states.double()
    if quantizer.mean is not None:
        x = x - quantizer.mean.double()
    if quantizer.scale is not None:
        x = x * quantizer.scale.double()
    z = x @ quantizer.transform.double().mT
    norms = torch.linalg.vector_norm(z, dim=-1)
    y = z / norms.unsqueeze(-1)
    chosen = quantizer.centroids.double()[(codes & (2**quantizer.code_bits - 1)).int()]
    coordinate = direction = sign = 0.0
    scales = {"scales": norms}
    if quantizer.estimator == "int8":
        scales["scales"] = z.abs().amax(-1) / 127
        step = (stored["scales"].double() / norms).unsqueeze(-1)
        coordinate = ((y - chosen * step).abs() - step / 2).max().item() * quantizer.head_dim**0.5
    elif quantizer.annealing is not None:
        # No single code or sign is right by itself: compare only the error.
        scales = _joint_scales(y, norms, chosen, (codes >> quantizer.code_bits).double() * 2 - 1, quantizer)
    else:
        coordinate, direction = _distances(y, chosen, quantizer)
        if quantizer.estimator == "rescaled":
            scales["scales"] = norms / (y * chosen).sum(-1)
        if quantizer.sketch is not None:
            lengths = torch.linalg.vector_norm(y - chosen, dim=-1)
            scales["residual_norms"] = norms * lengths
            rows = quantizer.sketch.double()
            product = (y - chosen) @ rows.mT / lengths.unsqueeze(-1) / torch.linalg.vector_norm(rows, dim=-1)
            wrong = (codes >> quantizer.code_bits).bool() != (product >= 0)
            sign = (product.abs() * wrong).max().item() * quantizer.head_dim**0.5
    scale = max(((stored[name] - exact).abs() / exact).max().item() for name, exact in scales.items())
    wrong = (codes != expected).double().mean().item()
    errors = [
        (reference.decode(*read, quantizer) - z).square().sum()
        for read in ((codes, stored), (expected, expected_scales))
    ]
    return Disagreement(wrong, coordinate, direction, sign, scale, (errors[0] / errors[1] - 1).item())


def _distances(y: torch.Tensor, chosen: torch.Tensor, quantizer: Quantizer) -> tuple[float, float]:
    """`coordinate` and `direction` of a [`Disagreement`]."""
    values, excesses, cosines = quantizer.centroids.double(), [], []
    for stretch in quantizer.stretches or (1.0,):
        distances = torch.stack([(y * stretch - value).abs() for value in values])
        excesses.append(((y * stretch - chosen).abs() - distances.amin(0)).amax(-1))
        cosines.append(torch.cosine_similarity(y, values[distances.argmin(0)], dim=-1))
    coordinate = torch.stack(excesses).amin(0).max() * quantizer.head_dim**0.5
    best = torch.stack(cosines).amax(0)
    direction = ((best - torch.cosine_similarity(y, chosen, dim=-1)) / (1 - best)).max()
    return coordinate.item(), direction.item()


def _joint_scales(y, norms, chosen, signs, quantizer: Quantizer) -> dict[str, torch.Tensor]:
    """The least-squares scales of given codes and signs, with ⟨ẑ, z⟩ = |z|²."""
    parts = torch.stack([chosen, signs @ quantizer.sketch.double()], dim=-1)
    fitted = torch.linalg.lstsq(parts, y.unsqueeze(-1)).solution
    length = (y.unsqueeze(-1) * (parts @ fitted)).sum(-2)
    return dict(
        zip(("scales", "residual_norms"), (norms.unsqueeze(-1) * (fitted.squeeze(-1) / length)).unbind(-1), strict=True)
    )


ROLES = (("keys", "qjl"), ("keys", "rescaled"), ("keys", "mse"), ("values", "rescaled"), ("values", "mse"))


def matrix() -> list[Case]:
    """Every role, estimator and width at every head_dim; the other options with three of each: for a GPU."""
    every = [Case(role, nbits, e, d) for d in (64, 128) for role, e in ROLES for nbits in (2, 3, 4)]
    every += [Case(*row, d) for d in (80, 96, 192, 256) for row in (("keys", 4, "qjl"), ("keys", 3, "qjl"))]
    every += [Case("values", nbits, "rescaled", d) for d in (80, 96, 192, 256) for nbits in (2, 3, 4)]
    every += [Case(role, 8, "rescaled", d) for d in (64, 80, 128, 192, 256) for role in ("keys", "values")]
    some = (("keys", 4, "qjl"), ("keys", 3, "rescaled"), ("values", 3, "rescaled"), ("values", 8, "rescaled"))
    for options in ({"dtype": torch.float16}, {"dtype": torch.float32}, {"per_head": True}):
        every += [Case(*row, d, **options) for d in (64, 128, 256) for row in some]
    return every + [Case(sketch="gaussian"), Case(rotation="hadamard"), Case(pieces=(5, 1000, 24), heads=1)]
