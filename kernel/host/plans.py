"""Launch plans: what `fp8_mega_moe` keeps of a call, so that the next one with the same weights only launches.

A plan holds the kernel's parameters for one recipe and one set of weights on one buffer. A call finds its plan by the
recipe and the weights' addresses, checks only what was not in order before, writes y and statistics into it if they
are others, and launches.
"""

from __future__ import annotations

import weakref
from itertools import chain
from operator import call, is_
from typing import Any

import torch
from torch import Tensor

from megaproof.kernel.host import checks, params
from megaproof.kernel.host.params import Params
from megaproof.kernel.host.sizes import THREADS, ConfigError, shared_bytes
from megaproof.kernel.host.symm_buffer import SymmBuffer
from megaproof.kernel.host.transformed import ORDERS
from megaproof.quant.recipe import Recipe
from megaproof.toolchain.launch import require_device, tensor_map

MAX_PLANS = 256
"""Launch plans that a buffer keeps: more than a model has layers, of 3 KB each."""
MAX_OUTPUTS = 16
"""Places of y and statistics that a plan remembers as in order: an allocator gives the same few again and again."""


def plan_of(
    buffer: SymmBuffer, recipe: Recipe, l1s: Any, l2s: Any, ys: Any, stats: Any | None, check: bool
) -> LaunchPlan:
    """The plan of a call, its outputs written into it, ready to be launched.

    l1s, l2s, ys: as the caller passed them, one entry a rank. stats: None, or an entry or None a rank. check: whether
    the inputs' indices are read back and checked. Raises ConfigError by argument, value and rule.
    """
    counts = (None,) * buffer.size.ranks if stats is None else stats
    try:
        weights = [*chain(*l1s, *l2s)]
        outputs = [*ys] if stats is None else [*ys, *stats]
        if not _trusted(buffer, l1s, l2s, ys):
            raise TypeError
        key = (recipe.silu, recipe.clamp, recipe.activation_granularity, *map(Tensor.data_ptr, weights))
        places = (
            *map(Tensor.data_ptr, ys),
            None if stats is None else (*[None if out is None else out.data_ptr() for out in stats],),
            *[out.shape for out in ys],
        )
    except Exception:  # no tensors, no pairs, no memory: whatever it is, the checks find its name
        checks.check_weights(buffer, l1s, l2s)
        checks.check_outputs(buffer, l1s, l2s, ys, counts)
        raise
    plan = buffer.plans.get(key)
    known = plan is not None and plan.weights.covers(weights)
    seen = None if plan is None else plan.outputs.get(places)
    in_order = seen is not None and seen.covers(outputs)
    if not known:
        checks.check_weights(buffer, l1s, l2s)
    if not in_order:
        checks.check_outputs(buffer, l1s, l2s, ys, counts)
    if check:
        checks.check_indices(buffer, [y.shape[0] for y in ys])
    if plan is None:
        plan = LaunchPlan(buffer, recipe, l1s, l2s)
        _keep(buffer.plans, key, plan, MAX_PLANS)
    if not known:
        plan.weights = InOrder(weights)
    if not in_order:
        _keep(plan.outputs, places, InOrder(outputs), MAX_OUTPUTS)
    if plan.places != places:
        plan.patch(places)
    return plan


def _trusted(buffer: SymmBuffer, l1s: Any, l2s: Any, ys: Any) -> bool:
    """Whether what no address and no form of a tensor says is as the checks want it."""
    for l1, l2, y in zip(l1s, l2s, ys, strict=False):  # of other lengths nothing is in order
        if type(l1) not in OF_L1 or type(l2) not in OF_L2 or y.requires_grad:
            return False
    return buffer.group is None or (type(l1s) in _LISTS and type(l2s) in _LISTS and type(ys) in _LISTS)


_LISTS, OF_L1, OF_L2 = {tuple, list}, ORDERS["l1"], ORDERS["l2"]


def _keep(kept: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Sets it; what was kept first goes first."""
    if key not in kept and len(kept) >= most:
        del kept[next(iter(kept))]
    kept[key] = value


class InOrder:
    """Tensors (or None) that passed the checks. They are held weakly: a plan keeps no memory alive."""

    def __init__(self, tensors: list[Tensor | None]) -> None:
        self.forms = [*map(_form, tensors)]
        self.references = _references(tensors)

    def covers(self, tensors: list[Tensor | None]) -> bool:
        """Returns true if these, as many of them at the same addresses, are the very objects or of the same form.

        A tensor in memory that was freed is another object, so its form is compared. What changes in place is seen
        where its address does, and y by its shape too. A resize that keeps the address is not seen in weights and
        stats, nor are strides: the launch stays in the memory that was checked. Data swapped in place for fewer rows
        at the very same address is a caller's error that goes unseen.
        """
        if all(map(is_, map(call, self.references), tensors)):
            return True
        if self.forms != [*map(_form, tensors)]:
            return False
        self.references = _references(tensors)
        return True


def _references(tensors: list[Tensor | None]) -> list[Any]:
    """Called, each gives its tensor, or None."""
    return [type(None) if tensor is None else weakref.ref(tensor) for tensor in tensors]


def _form(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """All that is checked of a tensor beside its address, which is of one device."""
    return None if tensor is None else (type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_neg())


class LaunchPlan:
    """Params of one recipe and one set of weights on one buffer; y, stats and timeout are patched between launches.

    A launch copies them, so a patch never reaches an earlier one.
    """

    def __init__(self, buffer: SymmBuffer, recipe: Recipe, l1s: Any, l2s: Any) -> None:
        if buffer.template is None:
            buffer.template = template(buffer)
        self.device = buffer.device.index or 0
        self.entry = f"moe_{recipe.silu}"
        self.granularity = recipe.activation_granularity
        self.shared = shared_bytes()
        self.params = Params.from_buffer_copy(buffer.template)
        self.grid = self.params.grid.num_ctas_per_rank * buffer.size.ranks
        self.params.swiglu = params.swiglu_of(recipe)
        self.ranks = [self.params.ranks[rank] for rank in range(buffer.size.ranks)]
        for own, l1, l2 in zip(self.ranks, l1s, l2s, strict=True):
            params.set_weights(own, l1, l2)
        self.weights = InOrder([])
        """At this plan's addresses."""
        self.places: tuple[Any, ...] = ()
        """What the params hold: the address of each y, those of stats or None, the shape of each y."""
        self.outputs: dict[tuple[Any, ...], InOrder] = {}
        """y and stats by their places."""

    def patch(self, places: tuple[Any, ...]) -> None:
        """Writes what is new: mostly another y alone, and each field takes the time of a few lines of Python."""
        ranks = len(self.ranks)
        for own, pointer in zip(self.ranks, places, strict=False):
            own.outputs.y_ptr = pointer
        if self.places[ranks:] != places[ranks:]:
            stats, *shapes = places[ranks:]
            for own, counts, shape in zip(self.ranks, stats or (None,) * ranks, shapes, strict=True):
                own.outputs.stats_ptr, own.num_tokens = counts, shape[0]
        self.places = places

    def launch(self, buffer: SymmBuffer, timeout_ns: int) -> None:
        """Launches on the current stream, behind the last launch on this buffer. timeout_ns: of each wait.

        Raises ConfigError where the buffer is not on the current device.
        """
        if (device := torch.cuda.current_device()) != self.device:
            current = f"cuda:{device}"
            raise ConfigError(f"sym_buffer is on cuda:{self.device}; it must be on the current device, {current}")
        self.params.barrier.timeout_ns = timeout_ns
        kernel = buffer.program(self.granularity).library().kernel(self.entry)
        stream = buffer.order.enter(device)
        kernel(self.params, self.grid, THREADS, self.shared, cooperative=True, device=device, stream=stream)


def template(buffer: SymmBuffer) -> Params:
    """What all launches on a buffer share. Raises ConfigError where the device has fewer SMs than there are ranks."""
    size, sms = buffer.size, require_device(buffer.device.index).sms
    if sms < size.ranks:
        raise ConfigError(f"group has {size.ranks} ranks; there must be an SM for each, and the device has {sms}")
    views = [buffer.rank(rank) for rank in range(size.ranks)]
    return params.of_buffer(size, views, sms // size.ranks, buffer.status, _map)


def _map(matrix: Tensor, box_rows: int) -> Any:
    return tensor_map(matrix.view(torch.uint8), box_rows)
