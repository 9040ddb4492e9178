"""What PTX text is parsed into: functions, their variables and scopes, instructions and operands; the bytes of each type."""

from __future__ import annotations

from dataclasses import dataclass, field

SIZES = {
    "pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4,
    "f16x2": 4, "bf16x2": 4, "tf32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "b128": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Name:
    """A register, variable, function or label, with an optional byte offset (`sym+8`) or negation (`!%p`)."""

    name: str
    offset: int = 0
    negated: bool = False


@dataclass(frozen=True)
class Imm:
    """An immediate: kind is 'int', 'f32' (value = bit pattern), 'f64' (bit pattern) or 'float' (decimal)."""

    kind: str
    value: object


@dataclass(frozen=True)
class Mem:
    """`[base+offset]`, offset in bytes."""

    base: object
    offset: int = 0


@dataclass(frozen=True)
class Vec:
    """`{a, b}` or a parenthesised call list."""

    items: tuple


@dataclass(frozen=True)
class Pair:
    """`d|p`: the two destinations of setp and shfl.sync."""

    first: object
    second: object


@dataclass
class Variable:
    space: str
    type: str
    name: str
    size: int  # bytes; 0 for an unsized extern array
    align: int  # bytes
    init: list | None = None
    extern: bool = False


@dataclass
class Instruction:
    op: tuple  # ("ld", "global", "v4", "b32")
    args: list
    guard: Name | None
    line: int  # line of the PTX text, 1-based
    loc: str  # "file:line" of the source, or ""
    scope: Scope

    @property
    def name(self):
        return ".".join(self.op)


class Scope:
    """A `{}` block: registers (name -> type), variables and labels declared in it."""

    def __init__(self, parent=None):
        self.parent, self.regs, self.vars, self.labels = parent, {}, {}, {}

    def find(self, table, name):
        scope = self
        while scope is not None:
            entries = getattr(scope, table)
            if name in entries:
                return scope, entries[name]
            scope = scope.parent
        return None, None


@dataclass
class Function:
    name: str
    entry: bool
    params: list
    returns: list
    scope: Scope | None = None
    body: list = field(default_factory=list)  # Instruction
    targets: dict = field(default_factory=dict)  # .branchtargets lists
    limits: dict = field(default_factory=dict)  # .maxntid, .reqntid, .minnctapersm -> ints
    line: int = 0


@dataclass
class Program:
    functions: dict = field(default_factory=dict)
    variables: list = field(default_factory=list)
    target: str = ""
    lines: list = field(default_factory=list)  # the PTX text, for messages
