"""How good the tests are: ``python tests/mutate.py`` plants the bugs of mutations.py, one at a time, and tells which tests catch each.

Works on copies of the tree in a temporary folder. A bug in the CPU kernels is built with CMake (the ``dev`` extra); one in the CUDA
kernels is compiled by the tests themselves, with nvcc, and runs in the simulator, as the Triton kernels do. Before, the same tests
must pass without a bug. Ends with status 1 where one survives. The whole takes about half an hour on two cores; --only WORD picks.
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
from collections.abc import Iterator
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "runs", "demo", "__pycache__", "*.egg-info")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", metavar="WORD", default="", help="bugs whose kind, description or file holds it")
    chosen = [m for m in MUTATIONS if parser.parse_args().only in f"{m.kind} {m.what} {m.file}"]
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        trees = {built: Tree(Path(folder) / ("cpu" if built else "device"), built) for built in {is_built(m) for m in chosen}}
        for built, tree in trees.items():
            tests = sorted({m.tests for m in chosen if is_built(m) is built})
            for arguments in tests:
                if failures := tree.failures(arguments):
                    sys.exit(f"without a bug, {arguments} fails: {', '.join(failures)}")
            print(f"{tree.folder.name}: {len(tests)} sets of tests pass without a bug", flush=True)
        print("kind        | file                       | bug                                                | caught by")
        for mutation in chosen:
            tree = trees[is_built(mutation)]
            with tree.planted(mutation):
                failures = tree.failures(mutation.tests, most=3)
            if not failures:
                survived.append(mutation)
            print(f"{mutation.kind:11} | {Path(mutation.file).name:26} | {mutation.what:50} | {', '.join(failures) or 'NONE: it survives'}", flush=True)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} caught")
    return 1 if survived else 0


def is_built(mutation: Mutation) -> bool:
    """Whether ddpm_fast._C is to be built to run it."""
    return not mutation.file.startswith(("csrc/cuda", "ddpm_fast/triton_kernels"))


class Tree:
    """A copy of the repository to plant bugs in. Where it is built it has no CUDA part."""

    def __init__(self, folder: Path, built: bool) -> None:
        self.folder, self.built = folder, built
        shutil.copytree(ROOT, folder, ignore=NOT_COPIED)
        if built:
            import pybind11

            for module in (folder / "ddpm_fast").glob("_C.*"):
                module.unlink()
            self._run(
                "cmake", "-G", "Ninja", "-B", "build", f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'ddpm_fast'}", "-DDDPM_FAST_CUDA=0",
            )  # fmt: skip
            self._run("cmake", "--build", "build")

    @contextlib.contextmanager
    def planted(self, mutation: Mutation) -> Iterator[None]:
        path = self.folder / mutation.file
        text = path.read_text()
        path.write_text(mutated(text, mutation))
        try:
            if self.built:
                self._run("cmake", "--build", "build")
            yield
        finally:
            path.write_text(text)
            if self.built:
                os.utime(path)  # Ninja goes by the time

    def failures(self, tests: str, most: int = 1) -> list[str]:
        """Names of the tests that fail, the first ``most`` of them."""
        files, _, word = tests.partition(" -k ")
        # A test that plants a bug of its own does not find its place in a file that has another.
        chosen = ["-k", f"{word} and not wrong" if word else "not wrong"]
        options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", f"--maxfail={most}"]
        done = self._pytest(*options, *chosen, *(f"tests/{file}" for file in files.split()))
        if done.returncode not in (0, 1):
            raise SystemExit(f"pytest {tests}: status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        found = re.findall(r"^(?:FAILED|ERROR) tests/(\S+?::[^\[\s]+(?:\[.*?\])?)(?: - |$)", done.stdout, re.M)
        if bool(found) != bool(done.returncode):
            raise SystemExit(f"pytest {tests}: status {done.returncode}, but no test is named\n{done.stdout[-3000:]}")
        return found

    def _pytest(self, *arguments: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=self.folder, env=environment, capture_output=True, text=True)

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command[:2])} failed\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def mutated(text: str, mutation: Mutation) -> str:
    """A file's text with the bug in it."""
    if text.count(mutation.good) != 1:
        raise ValueError(f"{mutation.file} must have one place for '{mutation.what}', it has {text.count(mutation.good)}")
    return text.replace(mutation.good, mutation.bad)


if __name__ == "__main__":
    sys.exit(main())
