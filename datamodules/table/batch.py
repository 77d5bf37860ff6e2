"""Batches of rows of tables.

Shapes: B rows, F columns, V views.
"""

from typing import Annotated, TypedDict

from torch import Tensor

from lightspan.core.batches import Field, Index, Label

Table = Annotated[Tensor, Field("float32", "B F", read=True)]
"""Columns standardised as those of the training rows, 0 where a value is missing."""
Rows = Annotated[list[Tensor], Field("float32", "V B F", read=True, of="table")]
"""Views of each row; row i of every view comes from the same one."""
Target = Annotated[Tensor, Field("float32", "B")]


class TableBatch(TypedDict):
    """Rows of a table, with a number to predict from each.

    target: in the unit that the data module names.
    """

    table: Table
    target: Target
    index: Index


class LabelledTableBatch(TypedDict):
    """Rows of a table, with the class of each.

    label: all 0 where the data have none.
    """

    table: Table
    label: Label
    index: Index


class TableViewsBatch(TypedDict):
    """Several views of each row of a table, with a number to predict from each."""

    views: Rows
    target: Target
    index: Index


class LabelledTableViewsBatch(TypedDict):
    """Several views of each row of a table, with the class of each.

    label: all 0 where the data have none.
    """

    views: Rows
    label: Label
    index: Index
