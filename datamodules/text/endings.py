"""Which files are texts. Without torch."""

from lightspan.datamodules.image.picture_files import Kind

LINES = ".jsonl"
"""Of files with a document in each line."""
SUFFIXES = (".txt", ".md", ".py", LINES)
TEXTS = Kind("text", "plain text (.txt, .md, .py) or JSON Lines (.jsonl)", SUFFIXES)
