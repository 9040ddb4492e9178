"""The native module, csrc/bindings.cpp, for type checkers: its kernels take the fields of csrc/common/arguments.h by name, and ddpm_fast alone calls them."""

from typing import Any

def __getattr__(name: str) -> Any: ...
