"""The small model, its batches and its trainer, and an object store."""

from store_fixtures import gate, s3_server  # noqa: F401
from trainer_fixtures import batches, clock, make_trainer, net, slow  # noqa: F401
