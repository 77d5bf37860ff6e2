"""Loads what ranks and commands of the tests need, once, in the server that they are forked from (rank_processes)."""

import contextlib
import importlib
import pkgutil

import lightning.pytorch.cli
import pytest
import torch.testing
import transformers.models.llama.modeling_llama

import lightspan

__all__ = ["lightning", "pytest", "torch", "transformers"]

for found in pkgutil.walk_packages(lightspan.__path__, "lightspan."):
    if not found.name.endswith("__main__"):
        with contextlib.suppress(ImportError):  # of an extra that is not installed
            importlib.import_module(found.name)
