"""`lightspan check RECIPE`: every mistake before a run, without torch."""

import argparse

from lightspan.commands.arguments import add_images_arguments, add_recipe_arguments, resolved_from
from lightspan.config.estimator_inputs import of_files
from lightspan.config.resolve import ANY_KIND, refuse
from lightspan.config.tree import COMMAND_LINE
from lightspan.errors import print_notes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_images_arguments(parser)


def run(args: argparse.Namespace) -> int:
    resolved = resolved_from(args, ANY_KIND)
    problems, notes = of_files(resolved.tree)
    refuse(problems, resolved.name)
    print_notes([*resolved.notes, *notes])
    flags = sum(place == COMMAND_LINE for place in resolved.sources.values())
    print(f"{resolved.name}: no problems in {len(resolved.sources)} settings, {flags} of them from the command line")
    return 0
