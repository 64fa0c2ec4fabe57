"""Small changes to a function's source, one at a time: each makes another program, most of them wrong."""

import ast
import copy
from collections.abc import Iterator

SWAPPED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
WORDS = {"sum": "mean", "mean": "sum"}


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in the place of a node."""

    def other(**fields):
        new = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPPED:
        yield other(op=SWAPPED[type(node.op)]())
    if isinstance(node, ast.AugAssign):
        yield ast.Assign(targets=[node.target], value=node.value)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        yield other(ops=[SWAPPED[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value)
        elif isinstance(node.value, int):
            yield ast.Constant(node.value + 1)
        elif isinstance(node.value, str) and node.value in WORDS:
            yield ast.Constant(WORDS[node.value])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    if isinstance(node, ast.If | ast.IfExp):
        yield other(test=ast.Constant(True))
        yield other(test=ast.Constant(False))
    if isinstance(node, ast.Call):
        for index in range(len(node.keywords)):
            yield other(keywords=node.keywords[:index] + node.keywords[index + 1 :])
        if isinstance(node.func, ast.Attribute) and not node.args and not node.keywords:
            yield node.func.value  # x.detach() -> x
    if isinstance(node, ast.For):
        everything = ast.Call(ast.Name("list", ast.Load()), [node.iter], [])
        for part in (ast.Slice(ast.Constant(1)), ast.Slice(None, ast.Constant(-1))):
            yield other(iter=ast.Subscript(everything, part, ast.Load()))
    if isinstance(node, ast.Return) and node.value is not None:
        yield ast.Return(None)
    elif isinstance(node, ast.Expr | ast.Assign | ast.AugAssign | ast.Delete | ast.For | ast.If | ast.With):
        yield ast.Pass()


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Yield (the line and what was changed, the changed source) for each change of the functions in a source.

    Example:
        >>> [change for change, _ in mutants("def f(x):\\n    return x + 1")]
        ['2: return x + 1 -> return', '2: x + 1 -> x - 1', '2: 1 -> 2']
    """
    count = len(list(ast.walk(ast.parse(source))))
    for index in range(count):
        for which in range(100):
            tree = ast.parse(source)
            parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
            node = list(ast.walk(tree))[index]
            if not inside_a_body(node, parents) or is_docstring(node, parents):
                break
            found = list(changes(node))
            if which >= len(found):
                break
            before, new = ast.unparse(node), found[which]
            replace(parents[node], node, new)
            after = ast.unparse(ast.fix_missing_locations(new))
            change = f"{node.lineno}: {before.splitlines()[0]} -> {after.splitlines()[0]}"
            yield change, ast.unparse(ast.fix_missing_locations(tree))


def inside_a_body(node, parents):
    while node in parents and not isinstance(parents[node], ast.FunctionDef):
        node = parents[node]
    return node in parents and node in parents[node].body


def is_docstring(node, parents):
    outer = node if isinstance(node, ast.Expr) else parents[node]
    return isinstance(outer, ast.Expr) and isinstance(outer.value, ast.Constant)


def replace(parent, old, new):
    for name, value in ast.iter_fields(parent):
        if value is old:
            setattr(parent, name, new)
        elif isinstance(value, list):
            setattr(parent, name, [new if item is old else item for item in value])
