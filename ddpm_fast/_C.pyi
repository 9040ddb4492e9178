"""The native module (csrc/bindings.cpp), as type checkers see it.

Its kernels take the fields of csrc/common/arguments.h by name. Only ddpm_fast calls them.
"""

from typing import Any

def __getattr__(name: str) -> Any: ...
