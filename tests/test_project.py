"""Rules of the project's layout: import directions, light imports, file lengths."""

import ast
import subprocess
from pathlib import Path

import pytest

from .child import ENVIRONMENT, PYTHON

ROOT = Path(__file__).parents[1]

# What each package may import of ours, besides itself. "models" sees experts only through a protocol.
ALLOWED = {
    "quant": set(),
    "kernels": {"quant"},
    "scheduler": set(),
    "errors": set(),
    "config": {"errors"},
    "sampling": {"errors"},
    "tokenizer": {"errors"},
    "chat": {"errors"},
    "calibration": {"errors", "store", "tokenizer"},
    "memory": set(),
    "models": {"errors", "kernels", "quant"},
    "store": {"errors", "kernels", "memory", "quant", "models"},
    "runtime": {"errors", "budget", "config", "kernels", "memory", "quant", "scheduler", "store"},
    "budget": {"errors", "config", "quant"},
    "router": {"scheduler", "store"},
    "shape": {
        "errors",
        "budget",
        "foreign",
        "headers",
        "models",
        "quant",
        "router",
        "scheduler",
        "store",
        "source",
    },
    "foreign": {"errors", "models", "quant", "store"},
    "headers": {"errors", "store", "source"},
    "placement": {"config", "models", "quant", "scheduler", "store"},
    "dense_quant": {"models", "placement", "quant", "store"},
    "devices": {"errors", "budget", "scheduler", "source", "device_profiles"},
    "jetson": {"devices"},
    "planning": {
        "errors",
        "config",
        "budget",
        "devices",
        "meter",
        "profiling",
        "quant",
        "scheduler",
        "shape",
        "store",
    },
    "profiling": {
        "api",
        "errors",
        "config",
        "budget",
        "bench_kernels",
        "engine",
        "kernels",
        "memory",
        "quant",
        "runtime",
        "scheduler",
        "source",
        "store",
    },
    "engine": {
        "errors",
        "config",
        "budget",
        "memory",
        "quant",
        "router",
        "scheduler",
        "store",
        "runtime",
        "models",
        "slots",
        "offload",
        "dense_quant",
    },
    "offload": {
        "errors",
        "config",
        "budget",
        "dense_quant",
        "devices",
        "models",
        "placement",
        "runtime",
        "scheduler",
        "store",
    },
    "slots": {"models", "quant"},
    "meter": {"engine", "runtime"},
    "answer": {"errors", "meter", "sampling", "tokenizer"},
    "batch": {"errors", "config", "scheduler", "sampling", "tokenizer", "engine", "slots", "meter", "answer"},
    "bench_kernels": {"errors", "budget", "quant"},
    "plot": {"errors"},
    "recording": {"models", "quant", "scheduler", "store"},
    "evaluate": {
        "errors",
        "config",
        "budget",
        "bench",
        "bench_kernels",
        "quant",
        "scheduler",
        "store",
        "runtime",
        "engine",
        "models",
        "tokenizer",
    },
    "distil": {"errors", "config", "budget", "quant", "scheduler", "store", "models"},
    "train_router": {"router", "errors", "distil", "scheduler", "store", "engine"},
    "train_scales": {"router", "errors", "distil", "quant", "scheduler", "store", "engine"},
    "train_predictor": {"errors", "quant", "scheduler", "store"},
    "bench": {"errors", "config", "bench_kernels", "quant", "store", "runtime", "models", "engine"},
}
LINE_LIMIT, FAMILY_LIMIT = 400, 220


def sources():
    for folder in ("moert", "quant", "scheduler", "tests", "examples"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                yield path


def part_of(path):
    """Name of the part of the project that a file of the package belongs to, e.g. `store` or `api`."""
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] != "moert" else parts[1].removesuffix(".py")


def imports_of(path):
    package = ["moert", *path.relative_to(ROOT).parts[:-1]]
    if package[1] == "moert":
        package = package[1:]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *(node.module.split(".") if node.module else [])])


def test_imports_go_in_the_directions_of_the_design():
    wrong = []
    for path in sources():
        relative = path.relative_to(ROOT)
        if path.suffix != ".py" or relative.parts[0] in ("tests", "examples"):
            continue
        part = part_of(path)
        for name in imports_of(path):
            head = name.split(".")
            if head[0] in ("quant", "scheduler", "device_profiles"):
                wrong.append(f"{relative}: bare import of {name}")
            if part == "scheduler" and head[0] == "torch":
                wrong.append(f"{relative}: the scheduler knows no torch")
            if head[0] == "moert" and len(head) > 1 and part in ALLOWED and head[1] not in ALLOWED[part] | {part}:
                wrong.append(f"{relative}: {part} imports {name}")
    assert not wrong, wrong


def test_every_part_is_known():
    top = {"__init__", "__main__", "api", "source", "cli"}
    parts = {part_of(p) for p in sources() if p.relative_to(ROOT).parts[0] in ("moert", "quant", "scheduler")}
    assert parts - {"py.typed"} <= ALLOWED.keys() | top


def test_files_are_short():
    long = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources()}
    assert not {name: n for name, n in long.items() if n > LINE_LIMIT}
    families = {name: n for name, n in long.items() if name.startswith("moert/models/")}
    assert not {name: n for name, n in families.items() if n > FAMILY_LIMIT}


def loaded_after(statement, *modules):
    code = f"{statement}; import sys; print([m for m in {modules!r} if m in sys.modules])"
    result = subprocess.run([*PYTHON, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    return ast.literal_eval(result.stdout)


def test_importing_the_package_is_light():
    assert loaded_after("import moert", "torch", "transformers", "tokenizers", "rich", "huggingface_hub") == []


def test_using_the_package_never_loads_transformers():
    assert loaded_after("from moert import LLM, SamplingParams", "transformers", "accelerate") == []


def test_only_its_kernels_load_triton():
    modules = (p.stem for p in (ROOT / "quant").glob("*.py") if p.stem not in ("__init__", "triton_kernels"))
    assert loaded_after("import " + ", ".join(f"moert.quant.{name}" for name in modules), "triton") == []


def test_the_command_line_imports_commands_lazily():
    assert loaded_after("import moert.cli.main", "torch", "transformers", "rich", "prompt_toolkit") == []


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    import moert

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moert.nothing
