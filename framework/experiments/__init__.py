"""Finished and tested work that no preset or recipe uses. Nothing in the package may import it.

- `kronecker_bases`, with its kernels and `transforms`: Hadamard and Kronecker-DCT frames. On a GPU their projection and
  update cost 2 (a + b) operations per number instead of 2 R and form no frame. Back in `lightspan.optim.bases` when
  `benchmarks/kernels.py` shows on a GPU that they beat `project` and `backproject_update` at ranks in use, and
  `benchmarks/quality.py` that losses equal those of `DCTBasis`.
- `bases`: random frames, columns of a random matrix, the weight's own columns. Back in `lightspan.optim.bases` when a
  recipe needs one as a baseline, or `benchmarks/quality.py` shows a loss below that of `PowerBasis` or `DCTBasis`.
- `ranks`: a rank for each matrix from the energy of its first gradient. Back in `lightspan.optim` when
  `benchmarks/quality.py` shows a lower loss than with one rank for all matrices in the same bytes.
- `row_resident_step`: a whole step without residual or clipping in one kernel. Back in `lightspan.optim.core` when
  `benchmarks/kernels.py` shows a recipe's steps to be faster by more than noise on a GPU.
- `class_text`: CoDyRA's loss of images against the names of a growing set of classes. Back in `lightspan.objectives`
  with the first method that learns tasks of image and text one after the other.
- `transforms.idct`: the inverse of the fast DCT. Back in `lightspan.subspaces` with its first caller.
"""
