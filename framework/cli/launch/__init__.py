"""Renders one recipe for the launchers: SLURM, Kubernetes, torchrun. Text and plain data only; never imports torch."""
