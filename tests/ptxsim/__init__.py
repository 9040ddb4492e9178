"""ptxsim: run, check and measure PTX kernels on a machine without a GPU."""

from .memory import (
    BarrierError,
    Device,
    DeviceArray,
    KernelTrap,
    MemoryFault,
    RaceError,
    SimulatorError,
    Timeout,
    UninitialisedRead,
    UnsupportedInstruction,
    from_bfloat16,
    to_bfloat16,
)
from .module import Module
from .report import GPUS, Report

__all__ = [
    "GPUS",
    "BarrierError",
    "Device",
    "DeviceArray",
    "KernelTrap",
    "MemoryFault",
    "Module",
    "RaceError",
    "Report",
    "SimulatorError",
    "Timeout",
    "UninitialisedRead",
    "UnsupportedInstruction",
    "from_bfloat16",
    "to_bfloat16",
]
