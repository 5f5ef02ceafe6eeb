"""Multiply-accumulates of a traced program, by the operation that does them."""

import collections
import math

from jax.extend import core


def walk(jaxpr, inputs: list[frozenset]) -> tuple[collections.Counter, dict]:
    """Multiply-accumulates by operation name, and the sources of each variable, given those of the program's inputs.

    Counted are products that depend on the source "images" and have no constant for an operand: a product with a
    constant moves data, one without images prepares weights. The body of a scan counts for each of its turns. A sum
    that is written for several platforms counts in its form for those that are not named.

    Args:
      inputs: of each input what it depends on: sets of names. A constant depends on nothing.

    Raises:
      NotImplementedError: products in a loop of unknown length.
    """
    sources = dict(zip(jaxpr.invars, inputs, strict=True))
    total = collections.Counter()
    for equation in without_platforms(jaxpr).eqns:
        variables = [var if isinstance(var, core.Var) else None for var in equation.invars]
        operands = [sources.get(var, frozenset()) for var in variables]
        stack = f"{equation.source_info.name_stack}/"
        total.update({stack + name: macs for name, macs in _equation(equation, operands).items()})
        sources.update(dict.fromkeys(equation.outvars, frozenset().union(*operands)))
    return total, sources


def without_platforms(jaxpr):
    """The program with what is written for several platforms in its form for those that are not named."""
    equations, same = [], {}

    def renamed(variables, names) -> list:
        return [names.get(var, var) if isinstance(var, core.Var) else var for var in variables]

    for equation in jaxpr.eqns:
        equation = equation.replace(invars=renamed(equation.invars, same))
        platforms = equation.params.get("branches_platforms")
        if platforms is None:
            equations.append(equation)
            continue
        form = without_platforms(equation.params["branches"][platforms.index(None)].jaxpr)
        inner, names = dict(zip(form.invars, equation.invars[1:], strict=True)), equation.source_info.name_stack
        for step in form.eqns:
            inputs = renamed(step.invars, inner)
            inner |= {var: core.Var(var.aval) for var in step.outvars}  # a form may be used several times
            info = step.source_info.replace(name_stack=names + step.source_info.name_stack)
            equations.append(step.replace(invars=inputs, outvars=renamed(step.outvars, inner), source_info=info))
        same |= zip(equation.outvars, renamed(form.outvars, inner), strict=True)
    return jaxpr.replace(eqns=equations, outvars=renamed(jaxpr.outvars, same))


def _equation(equation, operands: list[frozenset]) -> collections.Counter:
    name, params = equation.primitive.name, equation.params
    either = frozenset().union(*operands)
    if name in ("dot_general", "conv_general_dilated"):
        if not all(operands) or "images" not in either:
            return collections.Counter()
        left, right = (var.aval.shape for var in equation.invars)
        if name == "dot_general":
            depth = math.prod(left[axis] for axis in params["dimension_numbers"][0][0])
        else:
            depth = math.prod(right) // right[params["dimension_numbers"].rhs_spec[0]]
        # A dilated map, as in the gradient of a strided convolution, is zero in between.
        zeros = math.prod(params["lhs_dilation"]) if name == "conv_general_dilated" else 1
        return collections.Counter({name: equation.outvars[0].aval.size * depth // zeros})

    programs = [value for param in params.values() for value in (param if isinstance(param, tuple) else (param,))]
    programs = [getattr(program, "jaxpr", program) for program in programs if hasattr(program, "eqns")]
    if name == "scan":
        first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
        operands[first:last] = [either] * params["num_carry"]  # after the first round a carry may depend on anything
        turn = walk(programs[0], operands)[0]
        return collections.Counter({key: macs * params["length"] for key, macs in turn.items()})
    if name == "cond":
        return max((walk(program, operands[1:])[0] for program in programs), key=collections.Counter.total)
    macs = collections.Counter()
    for program in programs:
        fits = len(program.invars) == len(operands)
        macs += walk(program, operands if fits else [either] * len(program.invars))[0]
    if macs and name == "while":
        raise NotImplementedError("products in a loop of unknown length cannot be counted")
    return macs
