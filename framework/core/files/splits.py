"""The names of folders into which data are divided: one to train on and others beside it."""

TRAINING = "train"
VALIDATION = ("val", "valid", "validation", "test")
"""The first that is there validates."""
