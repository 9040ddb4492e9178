"""PTX text -> `Program`: module variables, functions and their instructions.

The parser knows the shape of PTX (scopes, declarations, operands, `.loc`) but not the meaning of any opcode;
that lives in `instructions.py`.
"""

from __future__ import annotations

import re

from .program import SIZES, Function, Imm, Instruction, Mem, Name, Pair, Program, Scope, Variable, Vec

_COMMENT = re.compile(r'"(?:[^"\\\n]|\\.)*"|/\*.*?\*/|//[^\n]*', re.S)
_TOKEN = re.compile(
    r"""
    "(?:[^"\\]|\\.)*"                                       # string
  | %[A-Za-z_$][\w$]*(?:\.[xyzw](?![\w$]))?                 # register
  | 0[fF][0-9a-fA-F]{8} | 0[dD][0-9a-fA-F]{16} | 0[xX][0-9a-fA-F]+U?
  | \d+\.\d*(?:[eE][-+]?\d+)? | \d+[eE][-+]?\d+ | \d+U?
  | \.?[A-Za-z_$][\w$]*(?:(?:\.|::)[\w$]+)*                 # opcode, directive, symbol
  | [{}\[\]();:,|+\-!@=<>]
""",
    re.X,
)
_LINE_DIRECTIVES = {".version", ".target", ".address_size", ".file", ".loc"}
_LINKAGE = {".visible", ".extern", ".weak", ".common"}
_SPACES = {".global", ".const", ".shared", ".local", ".param", ".reg"}


class PtxSyntaxError(ValueError):
    pass


class _Parser:
    def __init__(self, text):
        self.program = Program(lines=text.splitlines())
        blank = lambda m: m.group() if m.group()[0] == '"' else re.sub(r"[^\n]", " ", m.group())
        text = _COMMENT.sub(blank, text)
        self.tokens, self.line_of = [], []
        line, last = 1, 0
        for m in _TOKEN.finditer(text):
            line += text.count("\n", last, m.start())
            last = m.start()
            token = m.group()
            pieces = re.findall(r"\.[^.]+", token) if token[0] == "." else [token]  # `.reg.b16` is two directives
            self.tokens += pieces
            self.line_of += [line] * len(pieces)
        self.pos, self.files, self.loc, self.callers = 0, {}, "", {}

    # -- token helpers
    def peek(self, k=0):
        return self.tokens[self.pos + k] if self.pos + k < len(self.tokens) else ""

    def next(self):
        self.pos += 1
        return self.tokens[self.pos - 1]

    def line(self):
        return self.line_of[min(self.pos, len(self.line_of) - 1)]

    def expect(self, token):
        if self.peek() != token:
            raise PtxSyntaxError(f"PTX line {self.line()}: expected {token!r}, found {self.peek()!r}")
        self.pos += 1

    def rest_of_line(self):
        here, out = self.line(), []
        while self.pos < len(self.tokens) and self.line() == here:
            out.append(self.next())
        return out

    def line_directive(self):
        words = self.rest_of_line()
        if words[0] == ".file":
            self.files[words[1]] = words[2].strip('"').rsplit("/", 1)[-1]
        elif words[0] == ".loc":
            self.loc = self.source_line(words)
        elif words[0] == ".target":
            self.program.target = words[1]

    def source_line(self, words):
        """`file:line` of a .loc; for inlined code the outermost caller first, found through earlier inlined_at."""
        here = top = tuple(words[1:4])
        self.callers.pop(here, None)
        if "inlined_at" in words:
            k = words.index("inlined_at")
            self.callers[here] = tuple(words[k + 1 : k + 4])
        for _ in range(32):
            if top not in self.callers:
                break
            top = self.callers[top]
        text = lambda place: f"{self.files.get(place[0], '?')}:{place[1]}"
        return text(here) if top == here else f"{text(top)}, inlined {text(here)}"

    def skip_block(self):
        self.expect("{")
        depth = 1
        while depth:
            depth += {"{": 1, "}": -1}.get(self.next(), 0)

    # -- module level
    def parse(self):
        # two passes: .file lines of nvcc stand at the end of the text, but .loc needs them
        for k, token in enumerate(self.tokens):
            if token == ".file":
                self.pos = k
                self.line_directive()
        self.pos = 0
        while self.pos < len(self.tokens):
            extern = False
            while self.peek() in _LINKAGE:
                extern |= self.next() == ".extern"
            token = self.peek()
            if token in _LINE_DIRECTIVES:
                self.line_directive()
            elif token == ".section":
                while self.peek() != "{":
                    self.pos += 1
                self.skip_block()
            elif token in (".entry", ".func"):
                self.function()
            elif token in _SPACES:
                var = self.declaration()
                var.extern = extern
                self.program.variables.append(var)
                self.expect(";")
            else:
                while self.next() != ";":  # .pragma, .alias
                    pass
        return self.program

    def declaration(self):
        """One variable: `.space [.align n] [.vN] .type [.ptr ...] name [dims] [= init]`."""
        space, align, lanes, kind = self.next()[1:], 0, 1, None
        while self.peek().startswith("."):
            word = self.next()[1:]
            if word == "align":
                value = int(self.next())
                if kind is None:  # after the type it describes the pointee
                    align = value
            elif word in ("v2", "v4"):
                lanes = int(word[1])
            elif word in SIZES:
                kind = word
        name = self.next()
        width, count, dims = SIZES[kind] * lanes, 1, []
        while self.peek() == "[":
            self.pos += 1
            dims.append(0 if self.peek() == "]" else int(self.next().rstrip("U"), 0))
            self.expect("]")
        for d in dims:
            count *= d
        init = None
        if self.peek() == "=":
            self.pos += 1
            init = self.operand()
            init = list(init.items) if isinstance(init, Vec) else [init]
            if dims and count == 0:
                count = len(init)
        return Variable(space, kind, name, width * count, max(align, SIZES[kind] * lanes), init)

    def param_list(self):
        self.expect("(")
        out = []
        while self.peek() != ")":
            out.append(self.declaration())
            if self.peek() == ",":
                self.pos += 1
        self.pos += 1
        return out

    def function(self):
        entry = self.next() == ".entry"
        returns = self.param_list() if self.peek() == "(" else []
        func = Function(self.next(), entry, [], returns, line=self.line())
        if self.peek() == "(":
            func.params = self.param_list()
        limit = None
        while self.peek() not in ("{", ";"):
            if self.peek() in _LINE_DIRECTIVES:
                self.line_directive()
            elif self.peek()[0] == ".":
                limit = func.limits.setdefault(self.next(), [])
            elif self.next().isdigit() and limit is not None:
                limit.append(int(self.tokens[self.pos - 1]))
        known = self.program.functions.get(func.name)
        if self.peek() == ";":
            self.pos += 1
            self.program.functions.setdefault(func.name, func)
            return
        self.program.functions[func.name] = func
        if known is not None and known.body:
            raise PtxSyntaxError(f"function {func.name} is defined twice")
        self.pos += 1
        func.scope = Scope()
        self.block(func, func.scope)

    def block(self, func, scope):
        while True:
            token = self.peek()
            if token == "}":
                self.pos += 1
                return
            if token == "{":
                self.pos += 1
                self.block(func, Scope(scope))
            elif token in _LINE_DIRECTIVES:
                self.line_directive()
            elif token == ".reg":
                self.registers(scope)
            elif token in _SPACES or token in _LINKAGE:
                if token in _LINKAGE:
                    self.pos += 1
                while True:
                    var = self.declaration()
                    scope.vars[var.name] = var
                    if self.next() == ";":
                        break
            elif token == ";":
                self.pos += 1
            elif token.startswith("."):
                while self.next() != ";":  # .pragma
                    pass
            elif self.peek(1) == ":":
                self.pos += 2
                if self.peek() in (".branchtargets", ".callprototype"):
                    words = []
                    while self.peek() != ";":
                        words.append(self.next())
                    func.targets[token] = [w for w in words[1:] if w != ","]
                else:
                    scope.labels[token] = len(func.body)
            else:
                self.instruction(func, scope)

    def registers(self, scope):
        self.pos += 1
        kind = self.next()[1:]
        while kind in ("v2", "v4"):
            kind = self.next()[1:]
        while True:
            name = self.next()
            if self.peek() == "<":
                self.pos += 1
                for k in range(int(self.next())):
                    scope.regs[f"{name}{k}"] = kind
                self.expect(">")
            else:
                scope.regs[name] = kind
            if self.next() == ";":
                return

    def instruction(self, func, scope):
        line, guard = self.line(), None
        if self.peek() == "@":
            self.pos += 1
            negated = self.peek() == "!"
            self.pos += negated
            guard = Name(self.next(), negated=negated)
        op, args = tuple(self.next().split(".")), []
        while self.peek() != ";":
            args.append(self.operand())
            if self.peek() == ",":
                self.pos += 1
            elif self.peek() != ";":
                raise PtxSyntaxError(f"PTX line {line}: cannot parse {self.program.lines[line - 1].strip()!r}")
        self.pos += 1
        func.body.append(Instruction(op, args, guard, line, self.loc, scope))

    # -- operands
    def offset(self):
        """Zero or more `+n`, `-n`, `+-n` after a base."""
        total = 0
        while self.peek() in ("+", "-"):
            sign = 1
            while self.peek() in ("+", "-"):
                sign = -sign if self.next() == "-" else sign
            total += sign * int(self.next().rstrip("U"), 0)
        return total

    def operand(self):
        token = self.next()
        if token in "{(":
            close, items = {"{": "}", "(": ")"}[token], []
            while self.peek() != close:
                items.append(self.operand())
                if self.peek() == ",":
                    self.pos += 1
            self.pos += 1
            return Vec(tuple(items))
        if token == "[":
            base = self.next()
            base = Imm("int", int(base.rstrip("U"), 0)) if base[0].isdigit() else Name(base)
            mem = Mem(base, self.offset())
            self.expect("]")
            return mem
        if token == "!":
            return Name(self.next(), negated=True)
        sign = 1
        if token in "+-":
            sign, token = (-1 if token == "-" else 1), self.next()
        if token[0].isdigit():
            if token[:2] in ("0f", "0F"):
                return Imm("f32", int(token[2:], 16))
            if token[:2] in ("0d", "0D"):
                return Imm("f64", int(token[2:], 16))
            if token[:2] not in ("0x", "0X") and re.search(r"[.eE]", token):
                return Imm("float", sign * float(token))
            return Imm("int", sign * int(token.rstrip("U"), 0))
        if self.peek() == "(":  # generic(symbol)
            self.pos += 1
            inner = self.operand()
            self.expect(")")
            return inner
        name = Name(token, self.offset())
        if self.peek() == "|":
            self.pos += 1
            return Pair(name, self.operand())
        return name


def parse(text):
    """Parse one PTX module."""
    return _Parser(text).parse()
