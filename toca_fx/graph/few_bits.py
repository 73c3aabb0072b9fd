"""Rules of operators on quantised activations, for the table in ``graph.ops`` (see ``axes``)."""

from __future__ import annotations

from torch import fx

from toca_fx.graph.axes import Axes, Rule, first_operand, pointwise, shape_of, tensors


def rows_of(*positions: int) -> Rule:
    """The rule of products that scale each row: the arguments at ``positions`` have the rows.

    Of one for all rows there is nothing to carry.
    """

    def rule(node: fx.Node, axis: int) -> Axes | None:
        if axis != 0:
            return None
        rows = shape_of(first_operand(node))[0]
        read = [node.args[at] for at in positions]
        return {
            operand: 0
            for operand in read
            if isinstance(operand, fx.Node) and (*shape_of(operand), 1)[0] == rows
        }

    return rule


def of_blocks(node: fx.Node, axis: int) -> Axes | None:
    """One number for each block, whose sizes are an argument: blocks of one are by themselves."""
    return {first_operand(node): axis} if _are_apart(node, axis) else None


def _are_apart(node: fx.Node, axis: int) -> bool:
    """Whether no block goes over several positions of an axis, by the sizes that are given."""
    given = [one for one in node.args if isinstance(one, (list, tuple))]
    return all(sizes[axis] == 1 for sizes in given)


def quantized(node: fx.Node, axis: int) -> Axes | None:
    """Numbers and their scales, which are broadcast, or belong to blocks: those are as above."""
    if not _are_apart(node, axis):
        return None
    shape = shape_of(node)
    for operand in tensors(node):
        aligned = axis - len(shape) + len(shape_of(operand))
        if aligned >= 0 and shape_of(operand)[aligned] not in (1, shape[axis]):
            return None
    return pointwise(node, axis)


def quantized_rows(node: fx.Node, axis: int) -> Axes | None:
    """Rows and a scale for each; with a threshold, columns are chosen by what is in all rows."""
    source = first_operand(node)
    threshold = node.args[1] if len(node.args) > 1 else 0.0
    return {source: 0} if axis == 0 and len(shape_of(source)) == 2 and threshold == 0 else None
