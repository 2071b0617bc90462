"""The layout is the architecture: imports go down the list of docs/architecture.md, never up."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "block"

# Lowest first; a name stands for a module or a whole package, the longest match counts.
LAYERS = (
    ("errors", "clock", "core", "options"),
    ("engine.limits",),
    ("steptime",),
    ("engine",),
    ("length",),
    ("predict",),
    ("policy", "workload", "metrics", "autoscale.terms", "autoscale.controllers"),
    ("predictor", "replay", "simulate", "dashboard"),
    ("emulate", "integrations", "gateway", "autoscale"),
    ("demo", "conformance"),
    ("cli",),
    ("__main__",),
)
PURE = (
    "core",
    "errors",
    "options",
    "engine",
    "steptime",
    "length",
    "predict",
    "policy",
    "workload",
    "metrics",
    "simulate",
)
PURE_PARTS = ("autoscale.terms", "autoscale.controllers")
IO_MODULES = {"asyncio", "socket", "aiohttp", "httptools", "uvloop", "http", "urllib", "selectors"}
# Reads and writes files for the command line; everything else in these packages touches nothing outside.
MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def is_pure(module: str) -> bool:
    return module.split(".", maxsplit=1)[0] in PURE or module.startswith(PURE_PARTS)


def layer(module: str) -> int:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for rank, names in enumerate(LAYERS):
            if name in names:
                return rank
    raise AssertionError(f"block.{module} is in no layer: add it to LAYERS and to docs/architecture.md")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            if node.module == "block":
                found |= {f"block.{alias.name}" for alias in node.names}
    return {name.replace("cython.cimports.", "") for name in found}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_never_go_up(path: Path) -> None:
    module = module_name(path)
    if module in {"", "__init__"}:
        return
    for name in imports(path):
        if name.startswith("block.") and not name.startswith("block.__"):
            target = name.removeprefix("block.")
            assert layer(target) <= layer(module), f"block.{module} imports block.{target}"


@pytest.mark.parametrize("path", [p for p in MODULES if is_pure(module_name(p))], ids=module_name)
def test_pure_modules_know_neither_sockets_nor_event_loops(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & IO_MODULES


@pytest.mark.parametrize("package", ["policy", "predict", "predictor", "gateway", "autoscale"])
def test_true_output_lengths_are_out_of_reach_of_those_who_decide(package: str) -> None:
    """Law L7: the truth lives in workload.Offered, and whoever decides cannot even name it."""
    for path in (PACKAGE / package).rglob("*.py"):
        assert not any(name.startswith("block.workload") for name in imports(path)), path
