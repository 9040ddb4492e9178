"""Every kernel's loops are vectorised: the machine code of the installed module has as many vector loops as the source has formulas.

No time is taken, and no processor has to have the instruction set: what is read is what objdump (of binutils, which come with gcc)
prints. A loop counts where its arithmetic is on whole registers, of the width that its instruction set has. Kernels that are written
with vector types (randn, group_norm, conv3x3) cannot be left scalar and are not read.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections import Counter

import pytest
from machine import ISAS

from ddpm_fast.backends import native, native_missing

REGISTER = {"portable": "%xmm", "avx2": "%ymm", "avx512": "%zmm"}
# Loops over a block in csrc/cpu/<op>.cpp, each in as many versions as its template has: with products and sums (formula), products
# alone (scaling), and sums alone (sum, of block.h too). A compiler may make more of one loop, as where it takes a condition out.
LOOPS = {
    "q_sample": ("QSampleArguments", {"formula": 1, "scaling": 1}),
    # residual: three pairs of coefficients; the gradient and the squares; their sum
    "simple_loss": ("SimpleLossArguments", {"formula": 3, "scaling": 2, "sum": 1}),
    # forward: guided; x̂0 and x', with noise and without; noise of three variances. backward: guided; x̂0; x_t; two deviations.
    # Products: the history, and the gradients of previous, without, out (twice) and noise (twice). Sums: the history.
    "p_step": ("PStepArguments", {"formula": 11, "scaling": 7, "sum": 1}),
    # divergences; with gradients, of one upstream and of many. Sums: of the divergences and of the gradients
    "gaussian_kl": ("GaussianKLArguments", {"formula": 3, "sum": 2}),
    # three formulas, three variances, with gradients and without. Sums: with gradients and without
    "vlb_terms": ("VlbTermsArguments", {"formula": 18, "sum": 2}),
}
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(\w+)\s*(.*)$")
ARITHMETIC = re.compile(r"v?(add|sub|mul|sqrt|fn?m(?:add|sub)(?:132|213|231)?)(ps|ss)")
CONVERTS = re.compile(r"v?p(?:s[lr][la]|unpck|mov[sz]x)|v?cvt(?:ph2ps|ps2ph)")  # 16-bit numbers are read or written


def kind_of(instructions, register) -> str:
    """What a loop computes for each element: formula, scaling or sum; "scalar" where it computes with single numbers alone; else ""."""
    arithmetic = [(m[1], m[2], operands) for _, name, operands in instructions if (m := ARITHMETIC.fullmatch(name))]
    whole = {operation for operation, width, operands in arithmetic if width == "ps" and register in operands}
    if not whole:
        return "scalar" if any(width == "ss" for _, width, _ in arithmetic) else ""
    if "sqrt" in whole:
        return ""  # Box-Muller, which is written with vector types
    products = {x for x in whole if "m" in x}  # contracted ones too
    if products and whole != {"mul"}:
        return "formula"
    converts = any(CONVERTS.match(name) for _, name, _ in instructions)
    return "" if converts else "scaling" if products else "sum"


def innermost_loops(body):
    """Instructions from the target of each jump back to the jump, where no other such stretch lies within."""
    at = {address: i for i, (address, _, _) in enumerate(body)}
    spans = set()
    for i, (_, name, operands) in enumerate(body):
        if name.startswith("j") and (target := re.match(r"([0-9a-f]+) <", operands)) and at.get(int(target[1], 16), i + 1) <= i:
            spans.add((at[int(target[1], 16)], i))
    return [body[a : b + 1] for a, b in spans if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)]


def count_loops(lines) -> dict[tuple[str, str], Counter]:
    """(op, instruction set) -> the kinds of its loops, from what objdump prints."""
    owner = {(op, isa): (arguments, f"ddpm_fast::cpu::{isa}::") for op, (arguments, _) in LOOPS.items() for isa in ISAS}
    counts, key, body = {key: Counter() for key in owner}, None, []

    def close():
        if key:
            counts[key].update(kind_of(loop, REGISTER[key[1]]) for loop in innermost_loops(body))

    for line in lines:
        if head := FUNCTION.match(line):
            close()
            key = next((k for k, names in owner.items() if all(name in head[1] for name in names)), None)
            body = []
        elif key and (found := INSTRUCTION.match(line)):
            body.append((int(found[1], 16), found[2], found[3]))
    close()
    return counts


@functools.cache
def disassembled(path: str) -> dict[tuple[str, str], Counter]:
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", "--section=.text", path]
    return count_loops(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())


def lacking() -> str:
    """Why there is nothing to read; empty where there is."""
    if native is None:
        return native_missing
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"reads the instructions of x86-64, not of {platform.machine()}"
    return "" if shutil.which("objdump") else "objdump is not on PATH; it comes with binutils"


reads_code = pytest.mark.skipif(bool(lacking()), reason=lacking() or "-")


def missing(counts: Counter, op: str) -> list[str]:
    return [f"{counts[kind]} vector loops of kind {kind}, expected {n}" for kind, n in LOOPS[op][1].items() if counts[kind] < n]


@reads_code
@pytest.mark.parametrize("op", LOOPS)
@pytest.mark.parametrize("name", ISAS)
def test_every_loop_is_vectorised(op, name):
    counts = disassembled(native.__file__)[op, name]
    if not counts:
        pytest.skip(f"{native.__file__} has no function of {op} for {name}: its symbols were stripped, or it was built without")
    wrong = missing(counts, op)
    assert not wrong, f"{op} for {name}: {'; '.join(wrong)}; {counts['scalar']} scalar loops"


# Kernels made scalar on purpose.


def compiled(source: str, folder, csrc, *flags: str) -> Counter:
    """The loops of a q_sample.cpp for the portable instruction set."""
    (folder / "q_sample.cpp").write_text(source)
    options = ["-O3", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", *flags]
    target = folder / "q_sample.o"
    command = [
        *shlex.split(COMPILER), *options, "-DDDPM_ISA=portable", "-I", str(csrc / "cpu"),
        "-c", str(folder / "q_sample.cpp"), "-o", str(target),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return disassembled(str(target))["q_sample", "portable"]


COMPILER = os.environ.get("CXX", "").strip() or "g++"
compiles = pytest.mark.skipif(not shutil.which(shlex.split(COMPILER)[0]), reason=f"{COMPILER} is not on PATH")


@reads_code
@compiles
def test_a_scalar_build_is_noticed(tmp_path, csrc):
    source = (csrc / "cpu" / "q_sample.cpp").read_text()
    counts = compiled(source, tmp_path, csrc, "-fno-tree-vectorize", "-fno-tree-loop-vectorize")
    assert len(missing(counts, "q_sample")) == 2 and counts["scalar"] >= 2


@reads_code
@compiles
def test_one_scalar_loop_is_noticed(tmp_path, csrc):
    source, line = (csrc / "cpu" / "q_sample.cpp").read_text(), "out[i] = q_sample_element(signal, sigma, x[i], epsilon[i]);"
    assert source.count(line) == 1
    counts = compiled(source.replace(line, f'{{ {line} asm volatile(""); }}'), tmp_path, csrc)  # which no compiler vectorises
    assert missing(counts, "q_sample") == ["0 vector loops of kind formula, expected 1"]
