"""What the linears of one block see, on the pruned path and on the dense one: streaming statistics.

The dense path is the model as it was: its activations are recomputed beside the pruned ones, batch by batch, so that
no activations are kept but those at the boundary of a block.
"""

import contextlib
import weakref
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import ranks
from ..core import CrossStats, InputStats, Needs
from ..kernels.precision import as_multiplied
from .parts import Block, Calls, Linear, Sensitivity, Tensors, dense_weights


FISHER_POWER = 0.5  # of token weights: 1 follows a few tokens too closely (measured worse)
FISHER_RANGE = (1e-4, 50.0)  # of a token's weight, relative to the mean


class Evidence:
    """Of linears that share their input, over the calibration tokens.

    Attributes:
        stats: of x, their input on the pruned path.
        shift: mean (x_d - x) x^T [in, in]; x_d is the same token's input on the dense path.
        residual: by name, mean (r_d - r) x^T [out, in]; r is what the linear's output is added to.
        routed: of an expert: how many calibration tokens the router gave it; see `collect`.
    """

    def __init__(self, group: list[Linear], needs: Needs, shift: bool, residual: frozenset[str]):
        width, device = group[0].shape[1], group[0].weight.device
        self.routed: int | None = None
        self.stats = InputStats(width, needs, device)
        self.shift = CrossStats(width, width, device) if shift else None
        self.residual = {
            linear.name: CrossStats(linear.shape[0], width, device) for linear in group if linear.name in residual
        }

    def reduce(self) -> None:
        """Add up what all processes have seen."""
        if ranks.world() > 1:
            self.stats.reduce(ranks.total, ranks.before(self.stats.tokens))
            for cross in [*([] if self.shift is None else [self.shift]), *self.residual.values()]:
                cross.reduce(ranks.total)


@dataclass(frozen=True)
class Layout:
    """What one forward pass of a block shows of its linears.

    Attributes:
        groups: linears that share their input, in the order in which the block calls them. One that this pass did not
            reach (an expert, perhaps) is a group of its own at the end.
        residual: names of the linears whose output is added, as it is, to the residual stream.
        in_place: names of the linears whose input is changed in place later in the pass.
        once: every linear was called exactly once, but for experts.
    """

    groups: list[list[Linear]]
    residual: frozenset[str]
    in_place: frozenset[str]
    once: bool

    def stages(self) -> list[list[list[Linear]]]:
        """Groups to be solved together: one at a time, but for numbered siblings ("experts.0.up", "experts.1.up")."""
        stages: dict[frozenset[str], list[list[Linear]]] = {}
        for group in self.groups:
            kinds = frozenset(_kind(linear.name) for linear in group)
            same = next((known for known in stages if known & kinds), None)
            if same is None:
                stages[kinds] = [group]
            else:
                stages[same].append(group)
        return list(stages.values())

    def of(self, others: dict[str, Linear]) -> "Layout":
        """That of a block of the same structure: its linears, by the names of this one's."""
        return Layout(
            [[others[linear.name] for linear in group] for group in self.groups],
            frozenset(others[name].name for name in self.residual),
            frozenset(others[name].name for name in self.in_place),
            self.once,
        )


class Layouts:
    """The layouts of the blocks of one model: a single pass for all blocks of the same structure.

    Blocks are looked at one by one where linears were not all called once, or may be experts (a pass does not reach
    all of these): what is seen is not what every pass would show.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[list[Linear], Layout]] = {}

    def find(self, block: Block, index: int, calls: Calls) -> Layout:
        """As `find_layout`. All processes know the same layouts, and so meet in it or not."""
        numbered = len({_kind(linear.name) for linear in block.linears}) < len(block.linears)
        if numbered or any(linear.expert is not None for linear in block.linears):
            return find_layout(block, index, calls)
        structure = _structure(block, index, calls)
        if structure in self._known:
            linears, layout = self._known[structure]
            return layout.of({known.name: linear for known, linear in zip(linears, block.linears, strict=True)})
        layout = find_layout(block, index, calls)
        if layout.once:
            self._known[structure] = block.linears, layout
        return layout


def _structure(block: Block, index: int, calls: Calls) -> Hashable:
    """The same for blocks that call their linears in the same way: what modules and parameters they have, which of the
    linears are pruned, and what the block is called with.

    Attributes and arguments count that may choose a way through the forward pass (`is_kv_shared_layer`,
    "sliding_attention", a state that only some blocks are given); a number of the block's own does not.
    """
    hidden = calls.hidden[0]
    args, kwargs = calls.arguments[index][0]
    called = [(name, value is hidden, _switch(value)) for name, value in (*enumerate(args), *kwargs.items())]
    modules = [
        (
            name,
            type(module),
            *((key, int if key.endswith(("_idx", "_id")) else _switch(value)) for key, value in vars(module).items()),
            *(key for key, value in (*module._parameters.items(), *module._buffers.items()) if value is not None),
        )
        for name, module in block.module.named_modules()
    ]
    return tuple(modules), tuple(called), tuple(linear.name.removeprefix(block.name) for linear in block.linears)


def _switch(value: Any) -> Any:
    """What chooses a way, itself; of all else the type."""
    if isinstance(value, tuple | list):
        return tuple(map(_switch, value))
    if isinstance(value, MethodType):
        return value.__func__
    chooses = value is None or isinstance(value, bool | int | float | str | Enum | FunctionType)
    return value if chooses else type(value)


def _kind(name: str) -> str:
    """The same for numbered siblings that hold the linear, not for linears that are numbered themselves."""
    *owners, own = name.split(".")
    return ".".join(["*" if part.isdigit() else part for part in owners] + [own])


def find_layout(block: Block, index: int, calls: Calls) -> Layout:
    """Run the first batch through the block and look; of several processes, the first one's counts."""
    with Watch(block.linears, block.linears) as watch:
        calls.run(block.module, index, 0)
    by_name = {linear.name: linear for linear in block.linears}
    groups: dict[tuple, list[Linear]] = {}
    for name, seen in watch.inputs.items():
        groups.setdefault(tuple((id(x), version) for x, version, _ in seen), []).append(by_name[name])
    missed = [[linear] for linear in block.linears if linear.name not in watch.inputs]
    names, residual, in_place, once = ranks.gathered(
        (
            [[linear.name for linear in group] for group in (*groups.values(), *missed)],
            frozenset(watch.residuals),
            frozenset(
                name for name, seen in watch.inputs.items() if any(x._version != version for x, version, _ in seen)
            ),
            all(len(watch.inputs.get(linear.name, ())) == 1 for linear in block.linears if linear.expert is None),
        )
    )[0]
    return Layout([[by_name[name] for name in group] for group in names], residual, in_place, once)


def collect(
    groups: list[list[Linear]],
    layout: Layout,
    block: Block,
    index: int,
    calls: Calls,
    needs: Needs,
    *,
    dense: tuple[list[Tensor], Tensors] | None = None,
    sensitivity: Sensitivity | None = None,
) -> list[Evidence]:
    """Evidence of each of `groups`; where no token came by, `stats.tokens` is 0.

    An expert sees the tokens that the pruned model's router gives it. If these are fewer than its matrix has inputs,
    too few for a Gram matrix of full rank, it sees all tokens of its layer instead, in a second pass.

    Args:
        dense: the block's dense weights and its inputs on the dense path, for `shift` and `residual`.
        sensitivity: weighs the tokens.
    """
    weights: list[list[Tensor] | None] = [None] * len(groups)
    if sensitivity is not None:
        # What the likelihood feels of a token is known at the block's output also where it came to another expert.
        of_block = token_weights([block], sensitivity, calls) if any(group[0].expert for group in groups) else None
        weights = [of_block if group[0].expert else token_weights(group, sensitivity, calls) for group in groups]
    leaders = [group[0] for group in groups]
    residual = frozenset(linear.name for group in groups for linear in group) & layout.residual
    writers = [linear for linear in block.linears if linear.name in layout.residual]
    if dense is None or not residual:
        residual, writers = frozenset(), []
    until = residual if layout.once else None
    two_paths = dense is not None and layout.once
    evidence = [Evidence(group, needs, two_paths, residual if two_paths else frozenset()) for group in groups]

    def watch(batch: int, hidden: Tensor | None = None) -> Watch:
        with Watch(leaders, writers, in_place=layout.in_place, until=until) as seen:
            calls.run(block.module, index, batch, hidden)
        return seen

    for batch in range(len(calls.hidden)):
        pruned = watch(batch)
        other = None
        if dense is not None and two_paths:
            with dense_weights(block.linears, dense[0]):
                other = watch(batch, dense[1][batch])
        for group, found, weight in zip(groups, evidence, weights, strict=True):
            name = group[0].name
            for x_p, _, which in pruned.inputs.get(name, ()):
                x = as_multiplied(calls.real_tokens(x_p, batch, name, which))
                of_token = None if weight is None else _fitting(weight[batch], x, calls, batch, name, which)
                found.stats.update(x, of_token)
            if other is None or name not in pruned.inputs:
                continue
            change = _change(pruned.inputs[name][0], other.inputs.get(name))
            assert found.shift is not None
            found.shift.update(calls.real_tokens(change, batch, name, which), x, of_token)
            for linear in group:
                if linear.name in residual:
                    change = other.residuals[linear.name].float() - pruned.residuals[linear.name].float()
                    found.residual[linear.name].update(calls.real_tokens(change, batch, linear.name), x, of_token)
    few = []
    for number, (group, found) in enumerate(zip(groups, evidence, strict=True)):
        found.reduce()
        if group[0].expert is not None and not group[0].expert.sees_all:
            found.routed = found.stats.tokens
            if found.routed < group[0].shape[1]:
                few.append(number)
    if few:
        chosen = [groups[number] for number in few]
        with _seeing_all(chosen):
            again = collect(chosen, layout, block, index, calls, needs, dense=dense, sensitivity=sensitivity)
        for number, found in zip(few, again, strict=True):
            found.routed = evidence[number].routed
            evidence[number] = found
    return evidence


@contextlib.contextmanager
def _seeing_all(groups: list[list[Linear]]) -> Iterator[None]:
    """These experts are given all tokens inside."""
    experts = [group[0].expert for group in groups]
    try:
        for expert in experts:
            expert.sees_all = True
        yield
    finally:
        for expert in experts:
            expert.sees_all = False


def _change(pruned: tuple, dense: list[tuple] | None) -> Tensor:
    """x_d - x of the tokens of one call, fp32; 0 for tokens that the dense path's router gives to other experts."""
    x, _, which = pruned
    if dense is None:  # to others all of them
        return torch.zeros_like(x, dtype=torch.float32)
    x_d, _, which_d = dense[0]
    if which is None:
        return x_d.float() - x.float()
    place = torch.searchsorted(which_d, which).clamp(max=len(which_d) - 1)
    return (x_d[place].float() - x.float()).where((which_d[place] == which)[:, None], 0)


def token_weights(group: Sequence[Linear | Block], sensitivity: Sensitivity | None, calls: Calls) -> list[Tensor]:
    """For each batch the weight of each of its tokens, fp32 [batch * tokens]: 0 for padding, else 1 on average (over
    all processes).

    A token counts as much as the likelihood feels an error in what these linears (or this block) give for it; all
    count the same if that is not known.
    """
    if sensitivity is None:
        felt = [torch.ones(hidden.shape[:2].numel(), device=hidden.device) for hidden in calls.hidden]
    else:
        felt = []
        for batch, parts in enumerate(zip(*(sensitivity.tokens[part.name] for part in group), strict=True)):
            reached = [part for part in parts if part.numel()]  # no gradient reaches some linears
            if not reached:
                tokens = max(len(felt_of[batch]) for felt_of in sensitivity.tokens.values())
                reached = [torch.ones(tokens, device=parts[0].device)]
            felt.append(torch.stack(reached).sum(0))
        if len(felt) != len(calls.hidden):  # batches were halved
            felt = list(torch.cat(felt).split([hidden.shape[:2].numel() for hidden in calls.hidden]))
    real = [
        torch.ones_like(part) if mask is None or mask.numel() != len(part) else mask.flatten().to(part)
        for part, mask in zip(felt, calls.keep or [None] * len(felt), strict=True)
    ]
    count = ranks.total(torch.cat(real).sum())[0].clamp(min=1)

    def relative(parts: list[Tensor]) -> list[Tensor]:
        mass = torch.stack([(part * mask).sum() for part, mask in zip(parts, real, strict=True)]).sum()
        mean = ranks.total(mass)[0] / count
        return [part / mean.clamp(min=torch.finfo(torch.float32).tiny) for part in parts]

    weights = relative([part.clamp(*FISHER_RANGE) ** FISHER_POWER for part in relative(felt)])
    return [part * mask for part, mask in zip(weights, real, strict=True)]


def _fitting(
    weight: Tensor, x: Tensor, calls: Calls, batch: int, name: str, which: Tensor | None = None
) -> Tensor | None:
    """The weights of the real tokens x, which are `which` of the batch. If that is not known: None for other tokens (a
    router's choice) or those of several calls."""
    if which is not None:
        return calls.real_tokens(weight[which.to(weight.device)][:, None], batch, name, which)[:, 0].to(x.device)
    mask = calls.keep[batch] if calls.keep else None
    if mask is not None and mask.numel() == len(weight):
        weight = calls.real_tokens(weight[:, None], batch, name)[:, 0]
    return weight.to(x.device) if len(weight) == len(x) else None


class _AllSeen(Exception):
    """The rest of the forward pass is not needed."""


class Watch(TorchFunctionMode):
    """Sees, in the forward passes of a block inside it, what linears get and what their outputs are added to.

    Attributes:
        inputs: by the linear's name, for each call its input [..., in], the input's version then, and of an expert
            which tokens these are.
        residuals: by the linear's name, what its output was added to last, [..., out]. Parallel branches may be
            added to one another first. Only outputs that are added as they are count: no scale or norm in between.
    """

    def __init__(
        self,
        linears: Sequence[Linear],
        writers: Sequence[Linear] = (),
        *,
        in_place: frozenset[str] = frozenset(),
        until: frozenset[str] | None = None,
    ):
        """
        Args:
            linears: whose `inputs` are wanted.
            writers: whose outputs are followed, for `residuals`. Of parallel branches all or none.
            in_place: whose inputs must be copied, since they will be changed.
            until: end the pass when every input, and the residuals of these, were seen; None: never.
        """
        super().__init__()
        self.inputs: dict[str, list[tuple[Tensor, int, Tensor | None]]] = {}
        self.residuals: dict[str, Tensor] = {}
        self._linears = linears
        self._writers = writers
        self._in_place = in_place
        self._until = until
        # Outputs, and their sums, that are not yet added to anything, and when they were made.
        self._outputs: list[tuple[Tensor, frozenset[str], int]] = []
        self._made: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # tensors made since the first, and when
        self._clock = 0
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> "Watch":
        for linear in self._linears:
            before = partial(self._before, linear)
            self._hooks.callback(linear.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        for linear in self._writers:
            self._hooks.callback(linear.module.register_forward_hook(partial(self._after, linear.name)).remove)
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> bool:
        super().__exit__(kind, error, traceback)
        self._hooks.close()
        self._outputs.clear()
        self._made.clear()
        return kind is _AllSeen

    def _before(self, linear: Linear, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        which = linear.expert.tokens if linear.expert else None
        seen = (x.clone() if linear.name in self._in_place else x, x._version, which)
        self.inputs.setdefault(linear.name, []).append(seen)
        self._stop_if_done()

    def _after(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._outputs.append((output, frozenset([name]), self._clock))

    def _stop_if_done(self) -> None:
        if self._until is None or len(self.inputs) < len(self._linears):
            return
        if self._until <= self.residuals.keys():
            raise _AllSeen

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not self._outputs:
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") not in _ADDITIONS or len(args) < 2:
            result = func(*args, **kwargs)
            unchanged = any(result is x for x in args) and not _changes(func)  # x.to(where it is)
            return result if unchanged else self._note(result)
        left, right = args[:2]
        (names_left, left_since), (names_right, right_since) = self._take(left), self._take(right)
        both, since = names_left | names_right, max(left_since, right_since)
        if names_left and names_right:
            result = self._note(func(*args, **kwargs))
            self._outputs.append((result, both, since))
            return result
        stream = right if names_left else left
        if (
            not both
            or kwargs  # alpha=
            or not isinstance(stream, Tensor)
            or not stream.shape == left.shape == right.shape
            or self._age(stream) > since
        ):
            return self._note(func(*args, **kwargs))
        stream = stream.clone() if func.__name__ in _IN_PLACE else stream
        # Parallel branches share what there is to repair.
        self.residuals |= dict.fromkeys(both, stream / len(both) if len(both) > 1 else stream)
        self._stop_if_done()
        return func(*args, **kwargs)  # not noted: it is the stream

    def _note(self, result: Any) -> Any:
        if isinstance(result, Tensor):
            self._clock += 1
            self._made[id(result)] = weakref.ref(result), self._clock
        return result

    def _age(self, x: Tensor) -> int:
        """When x was made; the stream was there before an output that is added to it, a function of that was not."""
        known, when = self._made.get(id(x), (None, 0))
        return when if known is not None and known() is x else 0

    def _take(self, x: Any) -> tuple[frozenset[str], int]:
        """Whose output, or sum of outputs, x is, and since when."""
        for place, (output, names, since) in enumerate(self._outputs):
            if output is x:
                del self._outputs[place]
                return names, since
        return frozenset(), 0


def _changes(func: Any) -> bool:
    """Whether a function works in place, by its name."""
    name = getattr(func, "__name__", "")
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


_IN_PLACE = {"__iadd__", "add_"}
_ADDITIONS = _IN_PLACE | {"add", "__add__", "__radd__"}
