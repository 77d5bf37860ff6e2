"""Finished and tested work that no preset or recipe uses. Nothing in the package may import it.

- `kronecker_bases`, with its kernels and `transforms`: Hadamard and Kronecker-DCT frames. On a GPU their projection and
  update cost 2 (a + b) operations per number instead of 2 R and form no frame. Back in `lightspan.optim.bases` when
  `benchmarks/kernels.py` shows on a GPU that they beat `project` and `backproject_update` at ranks in use, and
  `benchmarks/lm_quality.py` that losses equal those of `DCTBasis`.
- `class_text`: CoDyRA's loss of images against the names of a growing set of classes. Back in `lightspan.objectives`
  with the first method that learns tasks of image and text one after the other.
- `transforms.idct`: the inverse of the fast DCT. Back in `lightspan.subspaces` with its first caller.
"""
