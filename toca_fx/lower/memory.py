"""How many bytes a generation takes at its peak, predicted: nothing is compiled or run.

    peak = caches, scores, counters + hoisted values
           + what the worst kind of step allocates while it runs

A step runs piece by piece (``blocks``). What one piece hands to another stays for as long as a
piece that takes it runs: its caller holds it. Within a piece the kernels of ``fusion`` run in the
order of the graph, or in that of inductor's scheduler, whichever takes less, and write in place of
what they were the last to read.

Sizes are those on a GPU, whatever device the model is on. Not counted: the workspaces of libraries
(cuBLAS holds 32 MiB per stream on Hopper), which are there with an uncached model as well, and what
CUDA graphs keep for themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx

from toca_fx.lower.analysis import Analysis
from toca_fx.lower.blocks import assign
from toca_fx.lower.cost import StepCost
from toca_fx.lower.fusion import Allocation, Kernel, kernels_of
from toca_fx.lower.hoisted_values import HoistedValues
from toca_fx.plan.buffers import Buffer
from toca_fx.plan.plan import Plan, StepPlan
from toca_fx.rewrite.tensors import Tensors
from toca_fx.torch_private import FakeTensorMode, storage_id

_MIB = 2**20
# kMinBlockSize, kSmallSize, kMinLargeAlloc, kRoundLarge.
_SMALLEST, _SMALL, _LARGE, _ROUND_LARGE = 512, _MIB, 10 * _MIB, 2 * _MIB

Size = Callable[[Allocation], int]


class Peak(NamedTuple):
    """Bytes of a generation at its peak.

    ``kept`` are those kept over all of its steps, ``hoisted`` the values of one timestep, ``step``
    what the worst step takes itself. ``listed`` is what comes on top in a session that knows its
    timesteps: the table of their hoisted values, and what is needed to fill it.
    """

    kept: int
    hoisted: int
    step: int
    listed: int


def allocated(nbytes: int) -> int:
    """Bytes that CUDA's caching allocator counts for an allocation of ``nbytes``.

    It rounds up to 512 bytes; from 10 MiB on it asks the driver for multiples of 2 MiB, and does
    not split off a rest of 1 MiB or less.
    """
    block = -(nbytes // -_SMALLEST) * _SMALLEST
    whole = -(block // -_ROUND_LARGE) * _ROUND_LARGE
    return whole if block >= _LARGE and whole - block <= _SMALL else block


def predict(found: Analysis, plan: Plan) -> Peak:
    """The peak of a generation of ``plan``, for one guidance branch."""
    steps = len(plan.steps) if found.hoisted.timed and found.table_fits(len(plan.steps)) else 0
    made = Tensors(found.aten, plan)
    counters = (Buffer("score", i) for i in plan.scored)  # of the same size
    with FakeTensorMode():
        kept = [made.new(buffer) for buffer in (*plan.kept, *counters)]
        held = HoistedValues(found.hoisted, found.hoisted_examples, steps)
    # Hoisted values are computed ahead of the step, and then copied to their own memory.
    conditions = _bytes(held.conditions)
    kinds = found.costs(plan).items()
    peaks = (_of_kind(cost, plan, made, _worst(plan, modes)) for modes, cost in kinds)
    step = max([conditions, *peaks])
    _, timed = found.hoisted_bytes
    listed = _bytes(held.tables.values()) + max(0, timed * steps - step) if steps else 0
    return Peak(_bytes(kept), _bytes(held.tensors.values()), step, listed)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes allocated for tensors; those that share memory count once."""
    storages = {storage_id(tensor): tensor for tensor in tensors}
    return sum(allocated(tensor.untyped_storage().nbytes()) for tensor in storages.values())


def _worst(plan: Plan, modes: tuple[str, ...]) -> StepPlan:
    """The step in these modes that computes most; more tokens never take less memory."""
    steps = (step for step in plan.steps if step.modes == modes)
    return max(steps, key=lambda step: sum(step.fresh))


def _of_kind(cost: StepCost, plan: Plan, made: Tensors, step: StepPlan) -> int:
    """Bytes that a step takes at its peak with its own inputs, besides what is kept."""
    orders = [buffer for buffer in cost.graph.buffers if buffer.role in ("order", "known")]
    with FakeTensorMode():
        given = [made.example(buffer, 1) for buffer in orders]
    fresh = {i: (step.fresh[i], site.tokens) for i, site in enumerate(plan.sites)}
    return _bytes(given) + step_peak(cost.graph.module.graph, cost.values(), fresh)


def step_peak(
    graph: fx.Graph, values: Mapping[str, Any], fresh: Mapping[int, tuple[int, int]]
) -> int:
    """Bytes that a step graph allocates at its peak.

    ``values`` are the (fake) values of its nodes by name if all tokens are fresh; ``fresh`` says
    for each site how many are, and of how many.
    """

    def size(buffer: Allocation) -> int:
        some, all_ = (1, 1) if buffer.site is None else fresh[buffer.site]
        return allocated(buffer.nbytes * some // all_)

    return _peak_of_pieces(kernels_of(graph, values, _pieces(graph, values)), size)


def _pieces(graph: fx.Graph, values: Mapping[str, Any]) -> Mapping[fx.Node, int]:
    """The piece of each node; all are in one if no two pieces are equal, as in ``blocks``."""
    piece = assign(graph)
    nodes: dict[int, list[fx.Node]] = {}
    for node, number in piece.items():
        nodes.setdefault(number, []).append(node)
    bodies = {_body(each, values) for each in nodes.values()}
    return dict.fromkeys(piece, 0) if len(bodies) == len(nodes) else piece


def _body(nodes: Sequence[fx.Node], values: Mapping[str, Any]) -> tuple[object, ...]:
    """What a piece computes, and on what inputs; it is equal for equal pieces."""
    numbers: dict[fx.Node, int] = {}
    lines: list[object] = []

    def number(operand: fx.Node) -> str:
        if operand not in numbers:  # it comes from another piece
            value = values[operand.name]
            lines.append((value.shape, value.dtype) if isinstance(value, Tensor) else type(value))
            numbers[operand] = len(lines)
        return f"%{numbers[operand]}"

    for node in nodes:
        arguments = str(fx.node.map_arg((node.args, node.kwargs), number))
        lines.append((node.target, arguments))
        numbers[node] = len(lines)
    return tuple(lines)


def _peak_of_pieces(kernels: Sequence[Kernel], size: Size) -> int:
    last: dict[Allocation, int] = {}
    pieces: dict[int, list[Kernel]] = {}
    for kernel in kernels:
        pieces.setdefault(kernel.piece, []).append(kernel)
        for buffer in (*kernel.writes, *kernel.reads):
            last[buffer] = max(last.get(buffer, 0), kernel.piece)
    after_all = max(pieces, default=0) + 1
    last |= {buffer: after_all for buffer in last if buffer.end}
    peak, held = 0, set[Allocation]()
    for at in sorted(pieces):
        written = [buffer for kernel in pieces[at] for buffer in kernel.writes]
        handed_on = {buffer for buffer in written if last[buffer] > at}
        orders = (pieces[at], _scheduled(pieces[at], handed_on, size))
        own = min(_peak(order, handed_on, size) for order in orders)
        peak = max(peak, sum(map(size, held)) + own)
        held = {buffer for buffer in held | handed_on if last[buffer] > at}
    return peak


def _peak(kernels: Sequence[Kernel], handed_on: set[Allocation], size: Size) -> int:
    """Bytes that a piece allocates at its peak, if its kernels run in this order."""
    last = {
        buffer: at
        for at, kernel in enumerate(kernels)
        for buffer in (*kernel.writes, *kernel.reads)
    }
    live: dict[Allocation, int] = {}
    now = peak = 0
    for at, kernel in enumerate(kernels):
        done = [
            buffer
            for buffer in kernel.reads
            if buffer in live and last[buffer] == at and buffer not in handed_on
        ]
        for buffer in kernel.writes:
            in_order = (one for one in done if kernel.fused and kernel.reads[one])
            reused = next((one for one in in_order if _interchangeable(one, buffer)), None)
            if reused is None:
                now += size(buffer)
            else:
                done.remove(reused)
                del live[reused]
            live[buffer] = size(buffer)
        peak = max(peak, now)
        done += [one for one in kernel.writes if last[one] == at and one not in handed_on]
        for buffer in done:
            now -= live.pop(buffer)
    return peak


def _interchangeable(one: Allocation, other: Allocation) -> bool:
    return (one.nbytes, one.dtype, one.site) == (other.nbytes, other.dtype, other.site)


def _scheduled(kernels: Sequence[Kernel], handed_on: set[Allocation], size: Size) -> list[Kernel]:
    """The kernels in the order of ``topological_sort_lpmf`` in torch/_inductor/memory.py.

    The kernel that frees most comes first if it keeps the peak.
    """
    own = {buffer: kernel for kernel in kernels for buffer in kernel.writes}
    readers: dict[Allocation, list[Kernel]] = {buffer: [] for buffer in own}
    waits: dict[Kernel, set[Kernel]] = {}
    for kernel in kernels:
        waits[kernel] = {own[buffer] for buffer in kernel.reads if buffer in own}
        for buffer in kernel.reads:
            if buffer in own:
                readers[buffer].append(kernel)
    left = {buffer: len(found) + (buffer in handed_on) for buffer, found in readers.items()}
    takes = {kernel: sum(map(size, kernel.writes)) for kernel in kernels}
    position = {kernel: at for at, kernel in enumerate(kernels)}
    now, peak = 0, sum(map(size, handed_on))

    def frees(kernel: Kernel) -> int:
        read = sum(size(buffer) for buffer in kernel.reads if left.get(buffer) == 1)
        return read + sum(size(buffer) for buffer in kernel.writes if not left[buffer])

    def rank(kernel: Kernel) -> tuple[int, int, int]:
        return (
            takes[kernel] if takes[kernel] > peak - now else 0,
            takes[kernel] - frees(kernel),
            position[kernel],
        )

    ready, order = [kernel for kernel in kernels if not waits[kernel]], list[Kernel]()
    while ready:
        kernel = min(ready, key=rank)
        ready.remove(kernel)
        order.append(kernel)
        peak = max(peak, now + takes[kernel])
        now += takes[kernel] - frees(kernel)
        for buffer in kernel.reads:
            if buffer in left:
                left[buffer] -= 1
        for buffer in kernel.writes:
            for reader in readers[buffer]:
                waits[reader].discard(kernel)
                if not waits[reader] and reader not in ready:
                    ready.append(reader)
    return order
