"""Small run folders."""

from run_folder_fixtures import make_run  # noqa: F401
