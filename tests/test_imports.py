"""The order of the house: a room imports from rooms below it, never upwards."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "twinlora"
ORDER = [
    {"errors", "config", "atomic", "output", "reporter"},
    {"numerics"},
    {"machine"},
    {"model"},
    {"adapters"},
    {"data"},
    {"train.step", "train.optim", "train.checkpoint", "train.rng", "train.run", "evaluate.metrics", "evaluate.stats"},
    {"train", "plan"},
    {"evaluate", "serve", "export"},
    {"api"},
    {"demo"},
    {"cli"},
]


def rank(module: str) -> int:
    parts = module.split(".")[1:]
    found = [
        level for level, rooms in enumerate(ORDER) for room in rooms if parts[: len(room.split("."))] == room.split(".")
    ]
    assert found, f"{module} has no place in the order"
    return min(found)


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("twinlora"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                inside = SOURCE.joinpath(*name.split(".")[1:])
                yield name if inside.with_suffix(".py").exists() or inside.is_dir() else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("twinlora"))


def test_never_upwards():
    wrong = []
    for file in SOURCE.rglob("*.py"):
        module = ".".join(["twinlora", *file.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")
        if module == "twinlora":
            continue
        for imported in imports(ast.parse(file.read_text(encoding="utf-8"))):
            if imported != "twinlora" and rank(imported) > rank(module):
                wrong.append(f"{module} imports {imported}")
    assert not wrong
    assert rank("twinlora.evaluate.metrics") < rank("twinlora.train.loop") < rank("twinlora.evaluate.compare")
