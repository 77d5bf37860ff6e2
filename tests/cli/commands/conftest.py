"""Small run folders."""

from run_folder_fixtures import make_run  # noqa: F401
from store_fixtures import gate, s3_server  # noqa: F401
from zoo_folders import zoo  # noqa: F401
