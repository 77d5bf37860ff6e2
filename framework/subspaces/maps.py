"""The one algebra: a subspace is a linear map from a few coordinates to many numbers.

`push(z)` lifts coordinates, `pull(g)` is its adjoint and brings a gradient down: <push(z), g> = <z, pull(g)>. Training
in the subspace is an optimiser on z.

| map                      | coordinates           | numbers          | who uses it                      |
|--------------------------|-----------------------|------------------|----------------------------------|
| `frames.Frames`          | [B M R]               | B matrices [M N] | `LowRank`, when frames change    |
| `projections.Projection` | [d]                   | all D weights    | `RandomSubspace`                 |
| `singular.SingularFrame` | [R] singular values   | a matrix [O I]   | SVFit                            |
| `tucker.TuckerFrame`     | a core [r_1 ... r_N]  | [d_1 ... d_N]    | FLoRA                            |
| `masks.maps.Selected`    | [k] open entries      | a tensor [S]     | index sets                       |
| `masks.maps.SoftMask`    | [S]                   | a tensor [S]     | soft masks and gates             |
| `merging.span.TaskSpan`  | [K] coefficients      | a tensor [S]     | merging                          |

A map is a value and does not change. What changes is which one is in use: code that chooses new maps (a `Basis` by
`refresh`, a random subspace by its seed) keeps the state that defines them. tests/subspaces/test_maps.py checks
this equation for every class of lightspan with these two methods. To add a map, write `push` and `pull` and add one
line to its CASES.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class SubspaceMap(Protocol):
    """Linear; the result has the dtype of the argument. It need not be injective, nor have orthonormal columns."""

    def push(self, z: Tensor, /) -> Tensor:
        """The numbers that the coordinates represent."""
        ...

    def pull(self, g: Tensor, /) -> Tensor:
        """The coordinates [shape of z] of a gradient in the numbers; the adjoint of `push`."""
        ...
