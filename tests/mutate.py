"""How good the tests are: ``python tests/mutate.py`` plants the bugs of mutations.py, one at a time, and tells which tests catch each.

Works on copies of the tree in a temporary folder. A bug in the CPU kernels is built with CMake (the ``dev`` extra); one in the CUDA
kernels is compiled by the tests themselves, with nvcc, and runs in the simulator, as the Triton kernels do. At the end the tests that
caught a bug must pass without it. Ends with status 1 where a bug survives. The whole takes about half an hour on two cores; --only WORD
picks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("CMakeLists.txt", "pyproject.toml", "csrc", "ddpm_fast", "tests")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", metavar="WORD", default="", help="bugs whose kind, description or file holds it")
    word = parser.parse_args().only
    chosen = [m for m in MUTATIONS if word in f"{m.kind} {m.what} {m.file}"]
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        print("kind        | file                       | bug                                                | time  | caught by")
        for built in sorted({is_built(m) for m in chosen}):
            tree, catching = Tree(Path(folder) / ("cpu" if built else "device"), built), set()
            for mutation in (m for m in chosen if is_built(m) is built):
                start = time.monotonic()
                with tree.planted(mutation):
                    found = tree.failures(*mutation.tests.split(" "), most=3)
                caught += bool(found)
                catching.update(found)
                name, seconds, by = Path(mutation.file).name, time.monotonic() - start, ", ".join(found) or "NONE: it survives"
                print(f"{mutation.kind:11} | {name:26} | {mutation.what:50} | {seconds:3.0f} s | {by}", flush=True)
            if catching and (wrong := tree.failures(*sorted(catching))):
                sys.exit(f"fails without a bug too: {', '.join(wrong)}")
    print(f"{caught} of {len(chosen)} caught, by tests that pass without the bug")
    return 0 if caught == len(chosen) else 1


def is_built(mutation: Mutation) -> bool:
    """Whether ddpm_fast._C is to be built to run it."""
    return not mutation.file.startswith(("csrc/cuda", "ddpm_fast/ops/triton")) and "_cuda.py" not in mutation.tests


class Tree:
    """A copy of the repository to plant bugs in.

    Where it is built it is without the CUDA part, and portable: all CPU builds have one source.
    """

    def __init__(self, folder: Path, built: bool) -> None:
        self.folder, self.built = folder, built
        not_copied = shutil.ignore_patterns("__pycache__", *(["_C.*"] if built else []))
        shutil.copytree(ROOT, folder, ignore=lambda at, names: set(names) - set(COPIED) if Path(at) == ROOT else not_copied(at, names))
        if built:
            import pybind11

            lists, x86 = folder / "CMakeLists.txt", 'if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")'
            assert x86 in lists.read_text()
            lists.write_text(lists.read_text().replace(x86, "if(FALSE)"))
            self._run(
                "cmake", "-G", "Ninja", "-B", "build", "-DDDPM_FAST_CUDA=0", f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'ddpm_fast'}",
            )  # fmt: skip

    @contextlib.contextmanager
    def planted(self, mutation: Mutation) -> Iterator[None]:
        path = self.folder / mutation.file
        text = path.read_text()
        path.write_text(mutated(text, mutation))
        try:
            yield
        finally:
            path.write_text(text)

    def failures(self, *tests: str, most: int = 1) -> list[str]:
        """Names of the tests that fail, the first ``most`` of them. ``tests`` are files in tests/*/, names of tests, or -k and its word."""
        if self.built:
            self._run("cmake", "--build", "build")
        names, (word, *_) = (tests[:-2], tests[-1:]) if "-k" in tests else (tests, [""])
        # A test that plants a bug of its own does not find its place in a file that has another.
        choice = f"{word} and not test_wrong" if word else "not test_wrong"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment |= {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", f"--maxfail={most}", "-k", choice,
             "-o", "addopts=-rfE", *(place(name) for name in names)],
            cwd=self.folder, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        found = re.findall(r"^(?:FAILED|ERROR) tests/\w+/(\S+?::[^\[\s]+(?:\[.*?\])?)(?: - |$)", done.stdout, re.M)
        compiles = not re.search(r"nvcc .* failed$|CompilationError", done.stdout, re.M)
        ran = re.search(r"\d+ (passed|failed|error)", done.stdout)  # skipped tests catch nothing
        if done.returncode not in (0, 1) or bool(found) != bool(done.returncode) or not compiles or not ran:
            raise SystemExit(f"pytest {' '.join(tests)}: status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return found

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command[:2])} failed\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def place(test: str) -> str:
    """Path of a test that is named by its file's name, which is the only one so called, and what follows."""
    file, colons, name = test.partition("::")
    (found,) = (ROOT / "tests").glob(f"*/{file}")
    return f"{found.relative_to(ROOT)}{colons}{name}"


def mutated(text: str, mutation: Mutation) -> str:
    """A file's text with the bug in it."""
    if text.count(mutation.good) != 1:
        raise ValueError(f"{mutation.file} must have one place for '{mutation.what}', it has {text.count(mutation.good)}")
    return text.replace(mutation.good, mutation.bad)


if __name__ == "__main__":
    sys.exit(main())
