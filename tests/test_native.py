"""The compiled code under sanitizers and, for Arm, under an emulator: builds and runs the programs of tests/native.

kernel_test is built from the sources of quant alone, step_kernel_test from those of moert/kernels.

Each test needs a compiler that can build its variant and is skipped, with the reason, where there is none.
"""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUANT, KERNELS = ROOT / "quant" / "csrc", ROOT / "moert" / "kernels" / "csrc"

PLAIN = [QUANT / name for name in ("kernel_generic.cpp", "products.cpp", "thread_pool.cpp")]
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def kernel_flags():
    """Flags of every kernel in CMakeLists.txt, by name."""
    variables, kernels = {}, {}
    for line in (ROOT / "CMakeLists.txt").read_text().splitlines():
        match = re.fullmatch(r"\s*(?:set|list|add_kernel)\((?:APPEND )?(\w+) (-.*|\$.*)\)", line)
        if not match:
            continue
        flags = [f for word in match[2].split() for f in variables.get(word.strip("${}"), [word])]
        if "add_kernel" in line:
            kernels[match[1]] = flags
        else:
            variables[match[1]] = variables.get(match[1], []) + flags
    return kernels


def can_compile(compiler, flags, folder):
    """Whether the compiler is there and builds an empty program with these flags."""
    if compiler is None:
        return False
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    command = [compiler, *flags, source, "-o", folder / "empty"]
    return subprocess.run(command, capture_output=True).returncode == 0


def build(folder, compiler, flags, names, steps=False):
    """Build a test of the products with the kernels `names`, or of the steps between them; returns the program."""
    sources, prefix, includes = [*PLAIN], QUANT / "kernel", [f"-I{QUANT}"]
    if steps:
        sources, prefix, includes = [KERNELS / "step_generic.cpp"], KERNELS / "step", [f"-I{QUANT}", f"-I{KERNELS}"]
    common = [compiler, "-std=gnu++17", "-Wall", "-Wextra", "-Wno-psabi", *includes, *flags]
    jobs = {source: [] for source in sources}
    definitions = []
    for name, own in kernel_flags().items():
        source = Path(f"{prefix}_{name}.cpp")
        if name in names and source.exists() and can_compile(compiler, own, folder):
            jobs[source] = own
            definitions.append(f"-DMOERT_WITH_{name.upper()}")
    test = ROOT / "tests" / "native" / ("step_kernel_test.cpp" if steps else "kernel_test.cpp")
    jobs[test] = definitions

    def compile_one(job):
        source, own = job
        target = folder / (source.stem + ".o")
        subprocess.run([*common, *own, "-c", source, "-o", target], check=True, timeout=300)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs.items()))
    program = folder / test.stem
    subprocess.run([*common, *objects, "-pthread", "-o", program], check=True, timeout=300)
    return program


def run(command, **variables):
    """Output of the test; fails with what it printed unless every check held."""
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, **variables}, errors="replace"
    )
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("ThreadSanitizer does not run with this kernel's randomised addresses")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failures" in result.stdout
    return result.stdout


def kernels_in(output):
    return re.search(r"^tested:(.*)$", output, re.M)[1].split()


@pytest.fixture
def compiler():
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if found is None:
        pytest.skip("there is no C++ compiler")
    return found


def native_kernels():
    """Kernels for the processor of this machine."""
    arm = platform.machine().lower() in ("aarch64", "arm64")
    return [name for name in kernel_flags() if (name == "neon") == arm]


def test_flags_are_found():
    flags = kernel_flags()
    assert flags.keys() == {"avx2", "avx512", "vbmi", "amx", "neon"}
    assert "-mavx512vnni" in flags["amx"]
    assert "-mamx-int8" in flags["amx"]
    assert not any("$" in flag for own in flags.values() for flag in own)


def test_kernels_under_address_and_undefined_behaviour_sanitizers(compiler, tmp_path):
    flags = ["-O1", "-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    if not can_compile(compiler, flags, tmp_path):
        pytest.skip(f"{compiler} cannot build with -fsanitize=address,undefined")
    program = build(tmp_path, compiler, flags, native_kernels())
    usable = kernels_in(run([program], ASAN_OPTIONS="detect_leaks=0"))
    assert "generic" in usable
    steps = build(tmp_path, compiler, flags, usable, steps=True)
    tested = kernels_in(run([steps, *usable], ASAN_OPTIONS="detect_leaks=0"))
    assert set(tested) == set(usable) - {"amx"}


def test_threads_under_thread_sanitizer(compiler, tmp_path):
    flags = ["-O1", "-g", "-fsanitize=thread"]
    if not can_compile(compiler, flags, tmp_path):
        pytest.skip(f"{compiler} cannot build with -fsanitize=thread")
    run([build(tmp_path, compiler, flags, native_kernels()), "threads"])


@pytest.fixture(scope="module")
def arm_program(tmp_path_factory):
    if shutil.which(CROSS_COMPILER) is None:
        pytest.skip(f"there is no {CROSS_COMPILER}")
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"there is no {EMULATOR}")
    folder = tmp_path_factory.mktemp("arm")
    flags = ["-O3", "-static"]
    if not can_compile(CROSS_COMPILER, flags, folder):
        pytest.skip(f"{CROSS_COMPILER} cannot build a static program")
    return [build(folder, CROSS_COMPILER, flags, ["neon"], steps) for steps in (False, True)]


@pytest.mark.parametrize(
    ("cpu", "kernels"),
    [("max", ["neon", "generic"]), ("neoverse-n1", ["neon", "generic"]), ("cortex-a53", ["generic"])],
    ids=["dotprod and i8mm", "dotprod", "neither"],
)
def test_arm_kernels_under_emulation(arm_program, cpu, kernels):
    products, steps = arm_program
    assert kernels_in(run([EMULATOR, "-cpu", cpu, products])) == kernels
    assert set(kernels_in(run([EMULATOR, "-cpu", cpu, steps, *kernels]))) == set(kernels)
