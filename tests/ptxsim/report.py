"""Counters of one launch and a simple roofline model."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

# Public peak figures: DRAM GB/s, float32 TFLOP/s, dense bf16 tensor TFLOP/s (float32 accumulate), SMs, boost GHz.
GPUS = {"A100-80G": (2039, 19.5, 312.0, 108, 1.41), "H100-SXM": (3350, 66.9, 989.4, 132, 1.98), "RTX 4090": (1008, 82.6, 165.2, 128, 2.52)}

CLASSES = {
    "memory": "ld ldu st cp prefetch",
    "atomic": "atom red",
    "tensor": "mma wmma ldmatrix stmatrix",
    "control": "bra brx ret exit call trap brkpt",
    "sync": "bar barrier membar fence",
    "warp": "shfl vote match redux activemask elect",
    "compare": "setp set selp slct testp",
    "convert": "cvt cvta",
    "move": "mov prmt",
    "special": "ex2 lg2 sin cos tanh rsqrt rcp sqrt",
}
CLASS_OF = {name: group for group, names in CLASSES.items() for name in names.split()}


def classify(op):
    """Instruction class: one of the keys of CLASSES, or float, or integer."""
    if op[0] in CLASS_OF:
        return CLASS_OF[op[0]]
    return "float" if op[-1].startswith(("f", "bf")) else "integer"


def float32_operations(op):
    """Floating-point operations per thread of an fp32 (or packed half) arithmetic instruction."""
    if op[-1] not in ("f32", "f16", "bf16", "f16x2", "bf16x2") or op[0] not in ("add", "sub", "mul", "fma", "mad"):
        return 0
    return (2 if op[0] in ("fma", "mad") else 1) * (2 if op[-1].endswith("x2") else 1)


@dataclass
class GlobalTraffic:
    """Loads or stores of global memory. A request is one warp instruction; a sector is 32 bytes."""

    requests: int = 0
    sectors: int = 0
    ideal_sectors: int = 0  # as few as each request's distinct bytes would fill
    bytes_requested: int = 0
    bytes_by_width: dict = field(default_factory=dict)  # bytes that a thread accesses at once -> bytes in all
    unique_bytes: int = 0  # distinct sectors of the whole launch * 32: traffic under an ideal cache

    @property
    def bytes_moved(self):
        return 32 * self.sectors

    @property
    def sectors_per_request(self):
        return self.sectors / self.requests if self.requests else 0.0

    @property
    def efficiency(self):
        """Bytes requested per byte moved; above 1 where lanes of a warp read the same bytes."""
        return self.bytes_requested / self.bytes_moved if self.sectors else 1.0


@dataclass
class SharedTraffic:
    """Shared-memory requests (warp instructions) and wavefronts; ideal_wavefronts is the conflict-free number."""

    requests: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0

    @property
    def conflict_degree(self):
        return self.wavefronts / self.ideal_wavefronts if self.ideal_wavefronts else 1.0


@dataclass
class Report:
    kernel: str
    grid: tuple
    block: tuple
    thread_instructions: dict = field(default_factory=dict)  # class -> executions summed over threads
    warp_instructions: dict = field(default_factory=dict)  # class -> issues summed over warps
    opcodes: dict = field(default_factory=dict)  # opcode -> warp issues
    global_load: GlobalTraffic = field(default_factory=GlobalTraffic)
    global_store: GlobalTraffic = field(default_factory=GlobalTraffic)
    shared_load: SharedTraffic = field(default_factory=SharedTraffic)
    shared_store: SharedTraffic = field(default_factory=SharedTraffic)
    local_requests: int = 0
    global_atomics: int = 0  # thread level
    shared_atomics: int = 0
    fp32_flops: int = 0
    mma_flops: int = 0
    mma_instructions: int = 0
    barriers: int = 0  # warp level
    shared_bytes: int = 0  # per CTA, static (with alignment, without simulator gaps) + dynamic
    max_groups: int = 0  # most groups of threads at different PCs at one time in a batch

    def finish(self, kernel, run):
        """Fold the per-PC execution counts of a launch into classes."""
        for (ins, _), threads, warps in zip(kernel.flat, run.threads_at, run.warps_at):
            if not threads or ins.scope is None:
                continue
            group = classify(ins.op)
            self.thread_instructions[group] = self.thread_instructions.get(group, 0) + threads
            self.warp_instructions[group] = self.warp_instructions.get(group, 0) + warps
            self.opcodes[ins.name] = self.opcodes.get(ins.name, 0) + warps
            self.fp32_flops += threads * float32_operations(ins.op)
            if ins.op[0] in ("bar", "barrier") and ins.op[1] != "warp":
                self.barriers += warps
        self.global_load.unique_bytes = 32 * int(np.count_nonzero(run.touched["load"]))
        self.global_store.unique_bytes = 32 * int(np.count_nonzero(run.touched["store"]))
        self.shared_bytes = sum(size for _, size, _ in kernel.shared_blocks) + run.shared_bytes
        self.max_groups = run.divergence

    @property
    def total_warp_instructions(self):
        return sum(self.warp_instructions.values())

    @property
    def total_thread_instructions(self):
        return sum(self.thread_instructions.values())

    @property
    def lane_efficiency(self):
        """Active lanes per issued warp instruction, as a fraction of 32."""
        return self.total_thread_instructions / (32 * self.total_warp_instructions or 1)

    def roofline(self, gpu):
        """Lower-bound times in microseconds on a GPU of `GPUS`: a model from public peak figures, not a measurement.

        dram: unique bytes at peak bandwidth (ideal cache). sectors: all sectors at DRAM bandwidth, as if nothing were
        cached. issue: PTX warp instructions over 4 schedulers per SM at boost clock (SASS counts differ).
        """
        bandwidth, fp32, tensor, sms, clock = GPUS[gpu]
        times = {
            "dram": (self.global_load.unique_bytes + self.global_store.unique_bytes) / (bandwidth * 1e3),
            "fp32": self.fp32_flops / (fp32 * 1e6),
            "tensor": self.mma_flops / (tensor * 1e6),
            "issue": self.total_warp_instructions / (sms * 4 * clock * 1e3),
        }
        bound = max(times, key=times.get)
        return {
            "model": f"{gpu} peak figures, not a measurement",
            **times,
            "bound": bound,
            "lower_bound_us": times[bound],
            "sectors": 32 * (self.global_load.sectors + self.global_store.sectors) / (bandwidth * 1e3),
        }

    def __str__(self):
        rows = [
            f"{self.kernel} grid={self.grid} block={self.block}",
            f"  instructions   {self.total_warp_instructions} warp, {self.total_thread_instructions} thread, "
            f"lane efficiency {self.lane_efficiency:.2f}, max groups {self.max_groups}",
        ]
        for name in sorted(self.warp_instructions):
            rows.append(f"    {name:<12} {self.warp_instructions[name]:>12} warp {self.thread_instructions[name]:>14} thread")
        for name, t in (("global load", self.global_load), ("global store", self.global_store)):
            rows.append(
                f"  {name:<14} {t.requests} requests, {t.sectors_per_request:.2f} sectors each, "
                f"efficiency {t.efficiency:.2f}, unique {t.unique_bytes} B"
            )
        for name, t in (("shared load", self.shared_load), ("shared store", self.shared_store)):
            rows.append(f"  {name:<14} {t.requests} requests, bank-conflict degree {t.conflict_degree:.2f}")
        rows.append(f"  atomics        {self.global_atomics} global, {self.shared_atomics} shared")
        rows.append(f"  arithmetic     {self.fp32_flops} fp32 flop, {self.mma_flops} mma flop")
        rows.append(f"  shared memory  {self.shared_bytes} B per CTA")
        return "\n".join(rows)
