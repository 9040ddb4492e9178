"""The public API: modules, kernel lookup, argument packing and launches."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess

import numpy as np

from . import parser
from .core import immediate
from .linker import Kernel
from .machine import Machine
from .memory import ALLOCATED, INITIALISED, Device, DeviceArray, Space, UnsupportedInstruction
from .program import SIZES, Imm, Name
from .races import GlobalMarks, RaceDetector
from .report import Report
from .schedule import fill, parse


class _Launch:
    """Everything the batches of one launch share."""


def _triple(dim):
    dim = (dim,) if np.isscalar(dim) else tuple(dim)
    return tuple(int(d) for d in dim) + (1,) * (3 - len(dim))


def _pack(param, value):
    """Bytes of one argument for a declared parameter."""
    if isinstance(value, DeviceArray):
        value = value.address
    if isinstance(value, (bytes, bytearray)):
        raw = bytes(value)
    elif param.size > SIZES[param.type] or param.type == "b8":
        raw = np.asarray(value).tobytes()
    elif param.type[0] == "f" or isinstance(value, (float, np.floating)):
        raw = np.asarray(value).astype(f"f{SIZES[param.type]}").tobytes()
    else:
        raw = (int(value) & ((1 << 8 * SIZES[param.type]) - 1)).to_bytes(SIZES[param.type], "little")
    if len(raw) != param.size:
        raise TypeError(f"parameter {param.name} takes {param.size} bytes, got {len(raw)}")
    return raw


def _entry_bodies(text):
    """{kernel: (start, end)}: where the text between the outermost braces of each entry stands, and by number that of sections."""
    out = {}
    for entry in re.finditer(r"^\s*(?:\.\w+\s+)*?\.(?:entry\s+([\w$]+)|section\b)", text, re.M):
        depth = 0
        for mark in re.compile(r'//[^\n]*|/\*.*?\*/|"[^"\n]*"|[{}]', re.S).finditer(text, entry.end()):
            depth += {"{": 1, "}": -1}.get(mark.group(), 0)
            if mark.group() == "{" and depth == 1:
                start = mark.end()
            elif mark.group() == "}" and depth == 0:
                out[entry[1] or entry.start()] = start, mark.start()
                break
    return out


class Module:
    """A parsed PTX module."""

    def __init__(self, text):
        self.text, self.lines, self.bodies = text, text.splitlines(), _entry_bodies(text)
        self.program = self._parse(None)
        self._programs, self._kernels = {}, {}

    def _parse(self, name):
        """The program with the code of one kernel: a file may hold dozens, and reading one takes long."""
        text, at = [], 0
        for other, (start, end) in self.bodies.items():
            if other != name:
                text += [self.text[at:start], "ret;", "\n" * self.text.count("\n", start, end)]
                at = end
        program = parser.parse("".join(text) + self.text[at:])
        program.lines = self.lines
        return program

    @classmethod
    @functools.lru_cache(maxsize=16)  # several tests run the kernels of one file
    def from_ptx(cls, text):
        return cls(text)

    @classmethod
    def from_cuda(cls, source, arch="sm_80", include=(), flags=()):
        """Compile a .cu file (or CUDA C++ text) with nvcc."""
        from .nvcc import compile_ptx

        return cls.from_ptx(compile_ptx(source, arch, include, flags))

    @property
    def entries(self):
        return [f.name for f in self.program.functions.values() if f.entry]

    @functools.cached_property
    def _readable(self):
        """{mangled name: demangled name} of the entries."""
        if not shutil.which("c++filt") or not self.entries:
            return dict(zip(self.entries, self.entries))
        out = subprocess.run(["c++filt"], input="\n".join(self.entries), capture_output=True, text=True, check=True).stdout
        return dict(zip(self.entries, out.splitlines()))

    def find(self, name):
        """Mangled name of a kernel, from its exact name or a unique substring of its demangled name."""
        entries = self.entries
        if name in entries:
            return name
        readable = self._readable
        hits = [e for e, text in readable.items() if name in text]
        exact = [e for e in hits if readable[e].split("(")[0].split("<")[0].split(" ")[-1].split("::")[-1] == name]
        hits = exact if len(exact) == 1 else hits
        if len(hits) != 1:
            raise KeyError(f"{'no' if not hits else 'more than one'} kernel matches {name!r}; candidates: {sorted(readable.values())}")
        return hits[0]

    def load(self, device):
        """Allocate the module's global and constant variables on a device; returns {symbol: address}."""
        if id(self.program) in device.modules:
            return device.modules[id(self.program)][1]
        symbols = {}
        variables = [v for v in self.program.variables if v.space in ("global", "const")]
        for v in variables:
            symbols[v.name] = device.allocate(v.size, f"variable {v.name}")
        for v in variables:
            raw = bytearray(v.size)
            for k, item in enumerate(v.init or []):
                width = SIZES[v.type]
                if isinstance(item, Name):
                    data = int(symbols[item.name] + item.offset).to_bytes(width, "little")
                elif isinstance(item, Imm):
                    dtype = f"f{width}" if v.type[0] == "f" else f"u{width}"
                    data = immediate(item, np.dtype(dtype)).tobytes()
                else:
                    raise UnsupportedInstruction(f"initialiser of {v.name}")
                raw[k * width : (k + 1) * width] = data
            if not v.extern:
                DeviceArray(device, symbols[v.name], (v.size,), np.uint8).copy_from(np.frombuffer(bytes(raw), np.uint8))
        device.modules[id(self.program)] = (self.program, symbols)  # holding the program keeps its id unique
        return symbols

    def variable(self, device, name, shape, dtype):
        """A `__device__` or `__constant__` variable as a DeviceArray."""
        return DeviceArray(device, self.load(device)[name], shape, dtype)

    def launch(
        self,
        name,
        grid,
        block,
        args,
        shared_bytes=0,
        *,
        device=None,
        uninitialised="error",
        races="error",
        same_value_writes=(),
        exited_threads="error",
        shuffle_check=True,
        schedule=None,
        batch_threads=32768,
        max_branches=50_000_000,
    ):
        """Run a kernel to completion and return its Report.

        grid, block: int or up to three ints. args: DeviceArray, numbers, bytes or NumPy scalars, one per parameter.
        uninitialised, races: 'error', 'warn' or 'ignore'/'off'. same_value_writes: spaces ('shared', 'global') in which
        several threads may write one value to the same bytes. exited_threads: 'error' counts threads that have
        exited as missing from a barrier, 'ignore' lets the remaining ones pass. schedule: see schedule.py, such as
        'random:1'; None: what the environment's PTXSIM_SCHEDULE says, else in order. batch_threads: simulated together.
        """
        name = self.find(name)
        run = _Launch()
        run.device = device or next((a.device for a in args if isinstance(a, DeviceArray)), None) or Device()
        symbols = self.load(run.device)
        key = (name, tuple(symbols.values()))
        if key not in self._kernels:
            if name not in self._programs:
                self._programs[name] = self._parse(name)
            self._kernels[key] = Kernel(self._programs[name], name, symbols)
        kernel = self._kernels[key]
        if len(args) != len(kernel.entry.params):
            raise TypeError(f"{name} takes {len(kernel.entry.params)} arguments, got {len(args)}")
        run.grid, run.block, run.shared_bytes = _triple(grid), _triple(block), int(shared_bytes)
        threads, blocks = int(np.prod(run.block)), int(np.prod(run.grid, dtype=np.int64))
        most = int(np.prod(kernel.entry.limits.get(".maxntid", (1024,))))
        if not 0 < threads <= most or run.block != _triple(kernel.entry.limits.get(".reqntid", run.block)):
            raise ValueError(f"{name}: block {run.block} breaks the declared limits {kernel.entry.limits or {'.maxntid': most}}")
        run.params = Space("param", max(kernel.param_bytes, 16))
        run.params.state[:] = ALLOCATED | INITIALISED
        for p, offset, value in zip(kernel.entry.params, kernel.param_offsets, args):
            run.params.data[offset : offset + p.size] = np.frombuffer(_pack(p, value), np.uint8)
        run.dynamic_base = -(-kernel.shared_bytes // 128) * 128
        run.shared_size = run.dynamic_base + run.shared_bytes if run.shared_bytes else kernel.shared_bytes
        run.uninitialised, run.races, run.same_value_writes = uninitialised, races, same_value_writes
        run.exited_threads, run.shuffle_check = exited_threads, shuffle_check
        run.fuel = run.max_branches = max_branches
        run.schedule, run.seed = parse(schedule, kernel)
        if run.seed is not None:
            fill(run.device.heap, run.seed)
        run.report = Report(name, run.grid, run.block)
        run.threads_at, run.warps_at = [0] * len(kernel.steps), [0] * len(kernel.steps)
        run.divergence, run.warned = 0, set()
        run.now, run.messages, run.global_races = 1, {}, {}  # see Order
        if races != "off":
            run.global_races["global"] = RaceDetector(GlobalMarks, run.device.heap.size, kernel.granules["global"])
        run.touched = {kind: np.zeros(run.device.heap.size >> 5, bool) for kind in ("load", "store")}
        padded = -(-threads // 32) * 32
        marks = (16 * padded // 32 + 40) * run.shared_size // kernel.granules["shared"]
        per_cta = 2 * run.shared_size + marks + 2 * padded * kernel.local_bytes
        batch = max(1, min(batch_threads // padded, (1 << 28) // max(per_cta, 1)))
        with np.errstate(all="ignore"):
            for first in range(0, blocks, batch):
                Machine(kernel, run, first, min(batch, blocks - first)).run()
        run.report.finish(kernel, run)
        return run.report
