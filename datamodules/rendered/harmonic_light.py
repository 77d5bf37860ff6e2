"""Light from all around, in nine numbers a colour, and how it shades a matt surface: spherical harmonics.

Source: Ramamoorthi, Hanrahan, "An Efficient Representation for Irradiance Environment Maps", SIGGRAPH 2001, equations
3 and 8. With Y_k the real spherical harmonics of degrees 0 to 2, light that comes from direction w is
sum_k l_k Y_k(w), and what a white matt surface with the normal n sends back is
shading(n) = 1/pi int L(w) max(0, n w) dw = sum_k a_k l_k Y_k(n), where
a is 1, 2/3 and 1/4 for the degrees 0, 1 and 2. Higher degrees hardly shade.
Shapes: 9 coefficients, in the order 1; x, y, z; xy, xz, yz, x^2 - y^2, 3z^2 - 1, as in FLAME's renderers; 3 colours.
"""

import math

import torch
from torch import Tensor

COEFFICIENTS = 9
CONSTANT = math.sqrt(1 / (4 * math.pi))
"""Y_0: light that is 1 everywhere has the coefficient 1 / CONSTANT, and shades by 1."""
SCALES = (
    CONSTANT,
    *[math.sqrt(3 / (4 * math.pi))] * 3,
    *[math.sqrt(15 / (4 * math.pi))] * 3,
    math.sqrt(15 / (16 * math.pi)),
    math.sqrt(5 / (16 * math.pi)),
)
LAMBERT = (1.0, *[2 / 3] * 3, *[1 / 4] * 5)
"""a_k: how much of a coefficient of light is left in what a matt surface sends back."""


def harmonics(directions: Tensor) -> Tensor:
    """Y_k at directions [... 3] of length 1: [... 9]. Over the sphere they are orthonormal."""
    x, y, z = directions.unbind(-1)
    forms = (torch.ones_like(x), x, y, z, x * y, x * z, y * z, x * x - y * y, 3 * z * z - 1)
    return torch.stack([scale * form for scale, form in zip(SCALES, forms, strict=True)], dim=-1)


def shading(light: Tensor, normals: Tensor) -> Tensor:
    """What white matt surfaces send back, [... 3 colours]; below 0 where light is.

    Args:
        light: [... 9 3], whose leading axes broadcast to those of the normals.
        normals: [... 3], of length 1.
    """
    # A sum written out: a matrix product's rounding depends on the batch.
    own = harmonics(normals)
    return sum(a * light[..., k, :] * own[..., k, None] for k, a in enumerate(LAMBERT))  # type: ignore[return-value]


def fitted_light(shaded_N3: Tensor, normals_N3: Tensor) -> Tensor:
    """The light under which surfaces with these normals look most like this, [9 3], by least squares, in float64; the
    shortest one where normals do not tell it, and 0 without any.
    """
    design_N9 = harmonics(normals_N3.double()) * torch.tensor(LAMBERT, dtype=torch.float64, device=normals_N3.device)
    return torch.linalg.pinv(design_N9) @ shaded_N3.double()
