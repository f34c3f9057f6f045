"""Rules of the project's layout: import directions, light imports, file lengths."""

import ast
import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from .child import ENVIRONMENT, PYTHON

ROOT = Path(__file__).parents[1]

# Each package, from the lowest to the highest, and what it may import of ours besides itself: only what stands above it
# here, so that there is no cycle. `quant` and `scheduler` are usable without the rest.
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "quant": set(),
    "scheduler": set(),
    "hardware": {"errors", "config", "scheduler"},
    "kernels": {"quant"},
    "store": {"errors", "quant", "scheduler", "hardware"},
    "checkpoints": {"errors", "store"},
    "text": {"errors"},
    "models": {"errors", "quant", "kernels", "store"},
    "runtime": {"errors", "config", "quant", "scheduler", "hardware", "kernels", "store"},
    "device": {"errors", "config", "quant", "scheduler", "hardware", "kernels", "store", "models", "runtime"},
    "engine": {
        "errors", "config", "quant", "scheduler", "hardware", "store", "text", "models", "runtime", "device",
    },
    "convert": {"errors", "config", "quant", "kernels", "store", "checkpoints", "text", "models", "engine"},
    "hub": {"errors", "config", "store", "checkpoints", "models", "convert"},
    "train": {"errors", "config", "quant", "scheduler", "hardware", "store", "models"},
    "planning": {
        "errors", "config", "quant", "scheduler", "hardware", "store", "checkpoints", "models", "runtime", "engine",
        "convert", "hub",
    },
    "api": {"errors", "config", "hub", "models", "text", "engine", "train", "planning"},
    "measure": {
        "errors", "config", "quant", "kernels", "scheduler", "hardware", "store", "text", "models", "runtime", "device",
        "engine", "hub", "api",
    },
    "cli": {
        "errors", "config", "quant", "scheduler", "hardware", "store", "text", "models", "runtime", "device", "engine",
        "convert", "hub", "train", "planning", "api", "measure",
    },
    "__init__": {"errors", "engine", "api"},
    "__main__": {"cli"},
}  # fmt: skip
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
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            packages = [name.name for name in node.names if name.name in ALLOWED] if module == "moert" else []
            yield from (f"moert.{name}" for name in packages) if packages else (module,)


@cache
def imports_between_packages():
    """(importing package, imported package) -> the places."""
    found = {}
    for path in sources():
        relative = path.relative_to(ROOT)
        if path.suffix != ".py" or relative.parts[0] in ("tests", "examples"):
            continue
        part = part_of(path)
        for name in imports_of(path):
            head = name.split(".")
            assert head[0] not in ("quant", "scheduler", "device_profiles"), f"{relative}: bare import of {name}"
            assert part != "scheduler" or head[0] != "torch", f"{relative}: the scheduler knows no torch"
            if head[0] == "moert" and len(head) > 1 and head[1] not in (part, "device_profiles"):
                found.setdefault((part, head[1]), []).append(f"{relative}: {name}")
    return found


def test_imports_go_in_the_directions_of_the_design():
    places = {list(ALLOWED).index(name): name for name in ALLOWED}
    for name, allowed in ALLOWED.items():
        assert allowed <= {places[i] for i in range(list(ALLOWED).index(name))}, f"{name}: an arrow that goes up"
    wrong = [where for (part, other), where in imports_between_packages().items() if other not in ALLOWED[part]]
    assert not wrong, wrong


def test_the_table_allows_nothing_that_is_not_used():
    used = imports_between_packages().keys()
    idle = {(part, other) for part, allowed in ALLOWED.items() for other in allowed} - used
    assert not idle, f"take these out of the table: {sorted(idle)}"


def drawing():
    """The packages as text, the highest first; what a line names stands in a line below it."""
    arrows = {part: sorted(other for p, other in imports_between_packages() if p == part) for part in ALLOWED}
    lines = [f"{part:<12}-> {', '.join(arrows[part])}" if arrows[part] else part for part in reversed(ALLOWED)]
    return [line for line in lines if not line.startswith("__")]


def package_folders():
    """The folder of each package, the highest first."""
    loose = ("__main__", "__init__", "api", "config", "errors")
    names = [name for name in reversed(ALLOWED) if name not in loose]
    return {name: ROOT / name if name in ("quant", "scheduler") else ROOT / "moert" / name for name in names}


def idea(folder):
    """What a package says of itself."""
    return " ".join((ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "").split())


@pytest.mark.parametrize("part", ["imports", "packages"])
def test_the_page_on_internals_is_that_of_the_code(part):
    page = ROOT / "moert" / "docs" / "internals.md"
    lines = drawing() if part == "imports" else [f"{n:<12}{idea(folder)}" for n, folder in package_folders().items()]
    begin, end = f"<!-- {part}: begin -->\n```text\n", f"```\n<!-- {part}: end -->"
    before, found, rest = page.read_text().partition(begin)
    drawn, ended, after = rest.partition(end)
    assert found
    assert ended
    wanted = "".join(f"{line}\n" for line in lines)
    if os.environ.get("MOERT_REDRAW"):
        page.write_text(before + begin + wanted + end + after)
    else:
        assert drawn == wanted, "MOERT_REDRAW=1 pytest tests/test_project.py draws it anew"


def test_a_token_passes_through_few_files():
    page = (ROOT / "moert" / "docs" / "internals.md").read_text().split("## One token", 1)[1].split("\n## ", 1)[0]
    hops = re.findall(r"^\d+\. `([^`]+)`", page, re.MULTILINE)
    assert 10 < len(hops) <= 20
    assert not [hop for hop in hops if not (ROOT / hop).is_file()]


def test_every_package_says_what_it_is():
    parts = {part_of(p) for p in sources() if p.relative_to(ROOT).parts[0] in ("moert", "quant", "scheduler")}
    assert parts == ALLOWED.keys()
    assert not [name for name, folder in package_folders().items() if not idea(folder).endswith(".")]


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
    modules = (p.stem for p in (ROOT / "quant").glob("*.py") if p.stem != "__init__" and "triton" not in p.stem)
    assert loaded_after("import " + ", ".join(f"moert.quant.{name}" for name in modules), "triton") == []


def test_the_command_line_imports_commands_lazily():
    assert loaded_after("import moert.cli.main", "torch", "transformers", "rich", "prompt_toolkit") == []


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    import moert

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moert.nothing
