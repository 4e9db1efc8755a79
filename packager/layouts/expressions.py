"""The arithmetic of declarations over config fields: `num_attention_heads * head_dim, hidden_size`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, items: item in items,
    ast.NotIn: lambda item, items: item not in items,
}


@cache
def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def evaluate(text: str, name: Callable[[str], Any]) -> Any:
    """The value of an expression; `name` gives that of each name in it.

    Numbers, names, `+ - * // %`, one comparison, `in`, `not`, `and`, `or`, `A if C else B` and tuples.
    Raises ValueError: anything else.
    """
    return _value(_parsed(text), name)


def _value(node: ast.expr, name: Callable[[str], Any]) -> Any:
    match node:
        case ast.Constant(value=int() as number):
            return number
        case ast.Name(id=known):
            return name(known)
        case ast.Tuple(elts=parts):
            return tuple(_value(part, name) for part in parts)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left, name), _value(right, name))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            return _COMPARE[type(op)](_value(left, name), _value(right, name))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, name)
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_value(part, name) for part in parts)
        case ast.BoolOp(values=parts):
            return any(_value(part, name) for part in parts)
        case ast.IfExp(test=test, body=body, orelse=other):
            return _value(body if _value(test, name) else other, name)
    raise ValueError(f"{ast.unparse(node)} has no place in a declaration")
