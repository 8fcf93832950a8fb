"""An operator under autograd and torch.func: its derivatives, in reverse and forward mode, and how it is vectorised.

A compiled operator has one derivative, in reverse mode. Where another is asked for, its definition in plain PyTorch
runs in its place, which can be differentiated in every mode and any number of times.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree


class _Call:
    """What a call of an operator consists of besides its arguments."""

    def __init__(self, keyset: torch._C.DispatchKeySet, arguments: pytree.TreeSpec) -> None:
        self.keyset = keyset
        self.arguments = arguments  # their structure
        self.result = arguments  # that of the result, once it is there


def register_derivative(
    library: torch.library.Library, name: str, save: Callable, differentiate: Callable, define: Callable | None
) -> None:
    """Registers the derivative of the operator `name`.

    `torch.library.register_autograd` would not do: what it registers drops tangents without a word and refuses
    torch.func.

    Args:
        library: for the operator's namespace, dyhead.
        name: without the namespace.
        save: is called with a context, the operator's arguments and its result, and saves what `differentiate` needs.
        differentiate: is called with the context, which arguments need a gradient, and the gradient of every result;
            returns the gradients, None for none. Both are structured as the arguments are; the gradients may leave out
            what follows the last tensor.
        define: the operator in plain PyTorch, for other derivatives. None: asking for them is an error.
    """
    operator = getattr(torch.ops.dyhead, name).default

    def run(keyset, arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def forward(ctx, call, *flat):
        arguments = pytree.tree_unflatten(flat, call.arguments)
        # For the next of torch.func's levels, or the autograd around them: this level is below autograd already.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            result = run(call.keyset, arguments)
        save(ctx, arguments, result)
        ctx.arguments = call.arguments
        results, call.result = pytree.tree_flatten(result)
        return tuple(results)

    def backward(ctx, *grads):
        needs = pytree.tree_unflatten(ctx.needs_input_grad[1:], ctx.arguments)
        returned = pytree.tree_leaves(differentiate(ctx, needs, *grads))
        return None, *returned, *[None] * (len(ctx.needs_input_grad) - 1 - len(returned))

    def derivative(base):
        functions = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(f"dyhead_{name.strip('_')}", (base,), functions)  # autograd's messages name it

    plain = derivative(torch.autograd.Function)
    # Without Function's own search for torch.func's levels: the dispatcher has found the one that this is for.
    of_level = derivative(torch.autograd.function._SingleLevelFunction)

    def kernel(keyset, *arguments):
        forward_mode = in_forward_mode()
        if define is None and forward_mode and any(map(_has_tangent, pytree.tree_leaves(arguments))):
            refuse_second_derivative()
        if define is not None and (forward_mode or _levels().count(TransformType.Grad) > 1):
            return define(*arguments)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return run(keyset, arguments)
        flat, structure = pytree.tree_flatten(arguments)
        call = _Call(keyset, structure)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                results = of_level.apply(call, *flat)
        else:
            results = plain.apply(call, *flat)
        return pytree.tree_unflatten(results, call.result)

    library.impl(name, kernel, "Autograd", with_keyset=True)
    # That of the vmap before torch.func, which lets nobody register a rule.
    library.impl(name, _refuse_batched_gradients, "Batched")


def in_forward_mode() -> bool:
    """Whether tangents are computed as well (torch.autograd.forward_ad, torch.func.jvp and what is made of it)."""
    # torch.compile enters levels without telling forward_ad.
    return forward_ad._current_level >= 0 or TransformType.Jvp in _levels()


def _levels() -> list[TransformType]:
    """torch.func's transforms around this, from outer to inner."""
    if not torch._C._are_functorch_transforms_active():  # what nearly all calls find, in less time than the stack takes
        return []
    return [level.key() for level in get_interpreter_stack()]


def refuse_second_derivative(*unused) -> None:
    """Raises RuntimeError: a derivative of a derivative was asked for."""
    raise RuntimeError(
        "dyhead's compiled operators have no second derivatives: expected the functions of dyhead.ops.reference, or "
        'the forward pass under dyhead.ops.backend("reference"), where gradients are differentiated again'
    )


def _refuse_batched_gradients(*unused) -> None:
    raise RuntimeError(
        "dyhead's compiled operators take no batched gradients of torch.autograd (is_grads_batched=True, "
        "vectorize=True): expected torch.func.vmap or torch.func.jacrev"
    )


def register_folded(name: str, unfolded: tuple[int, ...] = ()) -> None:
    """Lets torch.func.vmap make its dimension a part of the batch of the operator `name`.

    Args:
        name: without the namespace; the first dimension of all its results and of its tensors is the batch.
        unfolded: positions of tensors without one. Where one of these is mapped, the operator runs in a loop.
    """
    operator = getattr(torch.ops.dyhead, name).default

    def vectorise(info, dims, *arguments):
        size = info.batch_size
        if size == 0 or any(dims[i] is not None for i in unfolded):
            return _loop(operator, size, dims, arguments)

        def fold(tensor, dim):
            if not isinstance(tensor, Tensor):
                return tensor
            tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            return tensor.flatten(0, 1)

        folded = [a if i in unfolded else _map(fold, a, dims[i]) for i, a in enumerate(arguments)]
        return _mapped(pytree.tree_map(lambda t: t.unflatten(0, (size, t.shape[0] // size)), operator(*folded)))

    torch.library.register_vmap(f"dyhead::{name}", vectorise)


def register_loop(name: str) -> None:
    """Lets torch.func.vmap run the operator `name` in a loop."""
    operator = getattr(torch.ops.dyhead, name).default
    torch.library.register_vmap(
        f"dyhead::{name}", lambda info, dims, *arguments: _loop(operator, info.batch_size, dims, arguments)
    )


def _loop(operator, size, dims, arguments):
    def run(index):
        return operator(*_map(lambda t, dim: t if dim is None else t.select(dim, index), arguments, dims))

    if size == 0:  # a run of zeros, which the sum over nothing is, tells the shapes
        results = operator(*_map(lambda t, dim: t if dim is None else t.sum(dim), arguments, dims))
        return _mapped(pytree.tree_map(lambda t: t.expand(0, *t.shape), results))
    return _mapped(pytree.tree_map(lambda *tensors: torch.stack(tensors), *map(run, range(size))))


def _map(function: Callable, tree: object, dims: object) -> object:
    """`function` of every leaf and its dimension; `dims` has None for those that are not mapped."""
    leaves, structure = pytree.tree_flatten(tree)
    return pytree.tree_unflatten(list(map(function, leaves, pytree.tree_leaves(dims))), structure)


def _mapped(results: object) -> tuple[object, object]:
    """Results whose first dimension is the mapped one, as torch.library.register_vmap wants them."""
    return results, pytree.tree_map(lambda _: 0, results)


def _has_tangent(argument: object) -> bool:
    # PyTorch has one level of forward mode, 0.
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument, level=0).tangent is not None
