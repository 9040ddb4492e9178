"""The native module, csrc/bindings.cpp, for type checkers: its functions take addresses and tags, and are called by ddpm_fast/ops alone."""
from typing import Any

def __getattr__(name: str) -> Any: ...
