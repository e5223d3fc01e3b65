"""Questions about expressions and statements of a syntax tree."""

import ast


def is_inert(node: ast.expr) -> bool:
    """Whether evaluating `node` earlier cannot be noticed: names, attributes, constants."""
    if isinstance(node, ast.Attribute | ast.Subscript):
        return is_inert(node.value) and is_inert(getattr(node, "slice", ast.Constant(0)))
    if isinstance(node, ast.Tuple | ast.List):
        return all(map(is_inert, node.elts))
    if isinstance(node, ast.UnaryOp):
        return is_inert(node.operand)
    return isinstance(node, ast.Name | ast.Constant)


def evaluated_first(node: ast.expr) -> ast.expr | None:
    """The part of an expression that is evaluated before everything in it that has effects."""
    if isinstance(node, ast.Call):
        if not is_inert(node.func):
            return evaluated_first(node.func)
        return node.args[0] if node.args else None
    if isinstance(node, ast.BinOp):
        return node.left
    if isinstance(node, ast.Attribute | ast.Subscript):
        return node.value
    return None


def assigned(statement: ast.AST | None) -> tuple[str, ast.expr] | None:
    """The variable and the value of an assignment to just one variable; None for all else."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target, value = statement.targets[0], statement.value
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        target, value = statement.target, statement.value
    else:
        return None
    return (target.id, value) if isinstance(target, ast.Name) else None


def binds(statement: ast.AST, name: str) -> bool:
    assignment = assigned(statement)
    return assignment is not None and assignment[0] == name


def read_name(node: ast.AST) -> str | None:
    """The variable that this very node reads."""
    if isinstance(node, ast.AugAssign):
        node = node.target
    elif not isinstance(getattr(node, "ctx", None), ast.Load):
        return None
    return node.id if isinstance(node, ast.Name) else None


def reads(node: ast.AST, name: str) -> bool:
    return read_name(node) == name


def count_loads(node: ast.AST, name: str) -> int:
    return sum(reads(child, name) for child in ast.walk(node))
