"""The small model, its batches and its trainer."""

from trainer_fixtures import batches, clock, make_trainer, net, slow  # noqa: F401
