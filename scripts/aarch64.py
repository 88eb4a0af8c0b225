"""Build the engine for AArch64 and run its parity tests under emulation: NEON and plain C++ equal the reference.

    python scripts/aarch64.py FOLDER                # some of the tests, a few minutes
    python scripts/aarch64.py FOLDER --full         # all of them, about twenty minutes
    python scripts/aarch64.py FOLDER -- -x -k fuzz  # pytest's arguments, in place of a selection

FOLDER gets AArch64's Python and libraries from the system's package lists, the packages that tests need from pip, and
the build; what is there already is used again, and the system is not changed. It needs Debian on another processor, its
own version of Python, and the packages qemu-user-static, g++-aarch64-linux-gnu, cmake and make. Emulation says nothing
about time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ISA = "neondotprod"
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64-static"
# What each program is installed with.
TOOLS = {
    EMULATOR: "qemu-user-static",
    COMPILER: "g++-aarch64-linux-gnu",
    "cmake": "cmake",
    "make": "make",
    "apt-get": "",
    "dpkg-deb": "",
}
SYSTEM_PACKAGES = ("python3", "libpython3-dev", "libstdc++6")
PYTHON_PACKAGES = ("numpy", "pillow", "rich", "safetensors", "pytest", "hypothesis")
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_28_aarch64")
TESTS = ("tests/parity/test_engine.py", "tests/parity/test_exits.py")
SELECTION = "equal_to_reference or test_exits"
WITHOUT_EXTENSION = "cortex-a72"  # a processor that lacks the dot product


class Missing(Exception):
    """Something that this machine lacks; the message says how to get it."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where everything goes; made if it is not there")
    parser.add_argument("--full", action="store_true", help="all parity tests that need no torch")
    parser.add_argument(
        "--if-possible", action="store_true", help="where a tool is missing, say so and succeed"
    )
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if folder.is_relative_to(ROOT) or folder.is_file():
        parser.error(f"{options.folder}: a folder outside the repository, please")
    try:
        check_tools()
        python = install_system(folder)
        install_packages(folder, python)
    except Missing as missing:
        print(f"AArch64 is not tested: {missing}")
        return 0 if options.if_possible else 1
    build(folder, python)
    check_choice(folder, python)
    selection = [] if options.full else ["-k", SELECTION]
    # The other tests' fixtures need torch.
    return emulate(
        folder,
        python,
        "-m",
        "pytest",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        *TESTS,
        *(options.pytest or selection),
    )


def check_tools() -> None:
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    packages = [TOOLS[tool] for tool in absent if TOOLS[tool]]
    if len(packages) < len(absent):
        raise Missing("this needs a Debian system")
    if absent:
        raise Missing(f"{', '.join(absent)} missing; apt-get install {' '.join(packages)}")


def install_system(folder: Path) -> Path:
    """Unpack AArch64's Python and libraries, unless they are there; return the interpreter."""
    root, state = folder / "system", folder / "apt"
    if not (root / "complete").exists():
        (state / "lists/partial").mkdir(parents=True, exist_ok=True)
        (state / "archives/partial").mkdir(parents=True, exist_ok=True)
        (state / "status").touch()  # nothing is installed, so that all that is needed is fetched
        settings = {
            "APT::Architecture": "arm64",
            "APT::Architectures": "arm64",
            "Dir::State": state,
            "Dir::State::status": state / "status",
            "Dir::Cache": state,
        }
        apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
        fetch(*apt, "update")
        fetch(*apt, "install", "--yes", "--download-only", "--no-install-recommends", *SYSTEM_PACKAGES)
        for package in sorted((state / "archives").glob("*.deb")):
            run("dpkg-deb", "-x", package, root)
        (root / "complete").touch()
    python = (root / "usr/bin/python3").resolve()
    own = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if python.name != own:
        raise Missing(
            f"the system's Python for AArch64 is {python.name}, this one {own}; run it with {python.name}"
        )
    return python


def install_packages(folder: Path, python: Path) -> None:
    """Install what tests import for AArch64, and what the build includes, unless they are there."""
    packages = folder / "packages"
    if packages.exists():
        return
    room = folder / "packages.part"
    shutil.rmtree(room, ignore_errors=True)
    pip: list[str | Path] = [sys.executable, "-m", "pip", "install", "--quiet", "--target", room]
    version = python.name.removeprefix("python")
    platforms = [f"--platform={name}" for name in PLATFORMS]
    fetch(*pip, "--only-binary=:all:", "--python-version", version, *platforms, *PYTHON_PACKAGES)
    fetch(*pip, "nanobind")
    room.rename(packages)


def build(folder: Path, python: Path) -> None:
    """Compile all native code, and put the engine beside a copy of the Python code."""
    include = python.parents[1] / "include"
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        # Python's headers include one that lies beside those of the C library; the compiler has that one itself.
        "CMAKE_CXX_FLAGS": f"-idirafter {include}",
        "Python_EXECUTABLE": sys.executable,
        "Python_INCLUDE_DIR": include / python.name,
        "nanobind_DIR": folder / "packages/nanobind/cmake",
    }
    run(
        "cmake", "-S", ROOT, "-B", folder / "build", *(f"-D{name}={value}" for name, value in options.items())
    )
    run("cmake", "--build", folder / "build")
    package = folder / "source/cadyq"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(
        ROOT / "src/cadyq", package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "models")
    )
    (built,) = (folder / "build/src/cadyq/native/engine").glob("_engine*.so")
    shutil.copy(
        built, package / "native/_engine.so"
    )  # CMake's name for it has the architecture of this machine


def check_choice(folder: Path, python: Path) -> None:
    """A processor with the extension uses it; one without runs plain C++."""
    for cpu, expected in (("max", [ISA, "portable"]), (WITHOUT_EXTENSION, ["portable"])):
        code = f"from cadyq.engine.run import available_isas; assert available_isas() == {expected}, available_isas()"
        if emulate(folder, python, "-c", code, cpu=cpu):
            raise SystemExit(f"an emulated {cpu} does not choose {expected[0]}")


def emulate(folder: Path, python: Path, *arguments: str, cpu: str = "max") -> int:
    """Run Python for AArch64 on the repository's tests; return its exit code."""
    own = {
        "PYTHONPATH": os.pathsep.join(str(folder / name) for name in ("source", "packages")),
        "PYTHONPYCACHEPREFIX": str(folder / "cache"),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
        "CADYQ_ISA": ISA,
        "OMP_NUM_THREADS": "1",
    }
    command: list[str | Path] = [EMULATOR, "-cpu", cpu, "-L", python.parents[2], python, *arguments]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CADYQ_", "PYTHON"))}
    return subprocess.run(command, cwd=ROOT, env=kept | own).returncode


def run(*command: str | Path) -> None:
    if trouble := _output_of_failed(*command):
        raise SystemExit(trouble)


def fetch(*command: str | Path) -> None:
    """Run a command that needs a network."""
    if trouble := _output_of_failed(*command):
        raise Missing(f"a download failed. {trouble}")


def _output_of_failed(*command: str | Path) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode == 0:
        return ""
    return f"{' '.join(map(str, command))} ended with code {result.returncode}:\n{result.stdout}"


if __name__ == "__main__":
    sys.exit(main())
