"""Reads TTIR text, as Triton's front end prints it, into the records of ``ttir``."""

import re
from collections.abc import Callable

from tilewright.codegen.cpu.ttir import records
from tilewright.codegen.cpu.ttir.records import Block, Elem, Function, Module, Op, Type, Value
from tilewright.codegen.cpu.ttir.text import Locations, closing, end_of_string, split_top, strip_locations
from tilewright.errors import UnsupportedOp, Where

_SSA = re.compile(r"%[\w$.-]+(?:#\d+)?")
_NAME = re.compile(r'"?([A-Za-z_][\w.]*)"?')
_RESULTS = re.compile(r"^((?:%[\w$.-]+(?::\d+)?(?:, )?)+) = ")
_LABEL = re.compile(r"^(\^\w+)(\((.*)\))?:")
_FUNC = re.compile(r"^tt\.func (public |private )?@(\"[^\"]*\"|[\w$.]+)\(")
_Reader = Callable[["Parser", str, str, str], Op]
_SETTING = re.compile(r"\b(\w+) = (\w+)")


def parse_elem(text: str) -> Elem:
    """Element type from its TTIR spelling.

    Raises:
        ValueError: no such type.
    """
    if text.startswith("!tt.ptr<"):
        return records.ptr_elem(parse_elem(split_top(text[8:-1], ",")[0]))
    if text == "index":
        return records.I64
    if re.fullmatch(r"i\d+", text):
        return records.int_elem(int(text[1:]))
    try:
        return records.float_elem(text)
    except KeyError:
        raise ValueError(f"type {text}") from None


def parse_type(text: str) -> Type:
    """Scalar or tensor type from its TTIR spelling.

    Raises:
        ValueError: the type has no meaning for this backend, such as a tensor descriptor.
    """
    text = text.strip()
    if not text.startswith("tensor<"):
        return Type(parse_elem(text))
    inner = split_top(text[7:-1], ",")[0]
    sizes = re.match(r"(?:\d+x)*", inner)
    assert sizes is not None
    return Type(parse_elem(inner[sizes.end() :]), tuple(int(size) for size in sizes[0].split("x")[:-1]))


class Parser:
    """Recursive-descent parser over the lines of one module.

    Args:
        text: the module, with or without debug locations.

    Raises:
        UnsupportedOp: a line that this backend has no meaning for.
    """

    def __init__(self, text: str) -> None:
        self._locations = Locations(text)
        self._lines = [line.strip() for line in text.splitlines()]
        self._pos = 0
        self._values: dict[str, list[Value]] = {}
        self._kernel = ""

    def module(self) -> Module:
        """Parses the whole text."""
        functions = {}
        while self._pos < len(self._lines):
            if _FUNC.match(self._lines[self._pos]):
                function = self._function()
                functions[function.name] = function
            else:
                self._pos += 1
        return Module(functions)

    def _error(self, what: str, loc: str) -> UnsupportedOp:
        return UnsupportedOp(
            f"the CPU backend cannot read {what}",
            where=Where(node=self._kernel, source=self._locations.source(loc) or None),
            why=self._lines[self._pos - 1][:200],
            hint="write the kernel without this operation",
        )

    def _type(self, text: str, loc: str) -> Type:
        try:
            return parse_type(text)
        except ValueError as error:
            raise self._error(str(error), loc) from None

    def _next(self) -> tuple[str, str]:
        line, loc = strip_locations(self._lines[self._pos])
        self._pos += 1
        return line, loc

    def _define(self, name: str, type_: Type) -> Value:
        value = Value(name, type_)
        self._values[name] = [value]
        return value

    def _value(self, name: str) -> Value:
        base, _, index = name.partition("#")
        return self._values[base][int(index or 0)]

    def _values_in(self, text: str) -> list[Value]:
        return [self._value(name) for name in _SSA.findall(text)]

    def _function(self) -> Function:
        line, _ = self._next()
        match = _FUNC.match(line)
        assert match is not None
        name = match[2].strip('"')
        self._kernel = name
        self._values = {}
        end = closing(line, match.end() - 1)
        params = []
        for param in split_top(line[match.end() : end], ","):
            ssa, _, rest = param.partition(":")
            params.append(self._define(ssa.strip(), self._type(split_top(rest.strip(), " ")[0], "")))
        blocks, _, loc = self._region()
        return Function(name, params, blocks, match[1] != "private ", self._locations.source(loc))

    def _region(self) -> tuple[list[Block], str, str]:
        """Blocks up to the line that closes the region; that line's text after the brace, and its location."""
        blocks = [Block()]
        while True:
            line, loc = self._next()
            if line.startswith("}"):
                if len(blocks) > 1 and not blocks[0].ops:
                    blocks.pop(0)
                return blocks, line[1:].strip(), loc
            if label := _LABEL.match(line):
                blocks.append(Block(label=label[1]))
                for arg in split_top(label[3] or "", ","):
                    ssa, _, text = arg.partition(":")
                    blocks[-1].args.append(self._define(ssa.strip(), self._type(text, loc)))
            elif line:
                blocks[-1].ops.append(self._read(line, loc))

    def _read(self, line: str, loc: str) -> Op:
        try:
            return self._op(line, loc)
        except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
            raise self._error(f"this line ({type(error).__name__}: {error})", loc) from error

    def _op(self, line: str, loc: str) -> Op:
        names: list[str] = []
        if results := _RESULTS.match(line):
            names = results[1].split(", ")
            line = line[results.end() :]
        name_match = _NAME.match(line)
        if name_match is None:
            raise self._error("this line", loc)
        name, rest = name_match[1], line[name_match.end() :].strip()
        read: _Reader = _SPECIAL.get(name, Parser._plain)
        op = read(self, name, rest, loc)
        op.loc = op.loc or self._locations.source(loc)
        self._bind_results(op, names)
        return op

    def _bind_results(self, op: Op, names: list[str]) -> None:
        counts = [(name.partition(":")[0], int(name.partition(":")[2] or 1)) for name in names]
        remaining = list(op.results)
        for name, count in counts:
            group, remaining = remaining[:count], remaining[count:]
            for value in group:
                value.name = name
            self._values[name] = group
        for index, value in enumerate(op.results):
            value.op, value.index = op, index

    def _plain(self, name: str, rest: str, loc: str) -> Op:
        """An operation in the form ``operands {attributes} : types``, with an optional region."""
        regions = []
        if rest.endswith("({"):
            blocks, tail, loc = self._region()
            regions.append(blocks)
            rest = rest[:-2].rstrip() + tail.removeprefix(")")
        parts = split_top(rest, " : ")
        if parts and parts[0].startswith(": "):
            parts = ["", parts[0][2:], *parts[1:]]
        head, types = (parts[0], parts[1:]) if parts else ("", [])
        head, attrs = _take_attrs(head)
        if (quote := head.find('"')) >= 0:
            end = end_of_string(head, quote)
            attrs["text"], head = head[quote:end], head[:quote] + head[end:]
        for extra in types[:-1]:
            head += " " + extra
        settings = dict(_SETTING.findall(head))
        operands = self._values_in(head)
        words = tuple(re.findall(r"[\w.<>:+-]+", _SETTING.sub(" ", _SSA.sub(" ", head))))
        op = Op(name, operands, attrs={**attrs, **settings}, words=words, regions=regions, loc="")
        if name == "arith.constant":
            op.attrs["value"] = head
        op.loc = self._locations.source(loc)
        # A boolean constant is printed without its type.
        default = "i1" if name == "arith.constant" else ""
        op.results = [Value("", type_) for type_ in self._result_types(op, types[-1] if types else default, loc)]
        return op

    def _result_types(self, op: Op, text: str, loc: str) -> list[Type]:
        if op.name in _NO_RESULT or not text:
            return []
        for arrow in (" -> ", " to "):
            parts = split_top(text, arrow)
            if len(parts) > 1:
                right = parts[-1]
                listed = split_top(right[1:-1], ",") if right.startswith("(") else [right]
                if op.name == "tt.split":
                    listed = listed * 2
                return [self._type(part, loc) for part in listed if part]
        types = split_top(text, ",")
        chosen = self._type(types[-1] if op.name == "arith.select" else types[0], loc)
        if op.name in ("arith.cmpi", "arith.cmpf"):
            return [chosen.with_elem(records.I1)]
        if op.name == "tt.load":
            assert chosen.elem.pointee is not None
            return [chosen.with_elem(chosen.elem.pointee)]
        return [chosen]

    def _for(self, name: str, rest: str, loc: str) -> Op:
        match = re.match(r"(unsigned )?(%[\w$.-]+) = (\S+) to (\S+) step (\S+)(.*)\{$", rest)
        if match is None:
            raise self._error("this loop", loc)
        bounds = [self._value(match[i]) for i in (3, 4, 5)]
        pairs, types = self._carried(match[6])
        block_args = [self._define(match[2], bounds[0].type)]
        block_args += [self._define(arg, init.type) for arg, init in pairs]
        return self._with_regions(Op(name, [*bounds, *(init for _, init in pairs)]), block_args, types, loc, 1)

    def _carried(self, text: str) -> tuple[list[tuple[str, Value]], list[Type]]:
        """The ``iter_args(%a = %b, ...) -> (types)`` part of a loop."""
        start = text.find("(")
        if start < 0 or "=" not in text:
            return [], []
        end = closing(text, start)
        pairs = []
        for pair in split_top(text[start + 1 : end], ","):
            arg, _, init = pair.partition(" = ")
            pairs.append((arg, self._value(init)))
        return pairs, [init.type for _, init in pairs]

    def _with_regions(self, op: Op, args: list[Value], types: list[Type], loc: str, count: int) -> Op:
        op.loc = self._locations.source(loc)
        for index in range(count):
            blocks, tail, end_loc = self._region()
            if index == 0 and args:
                blocks[0].args = args
            op.regions.append(blocks)
            op.loc = self._locations.source(end_loc) or op.loc
            if not tail.endswith("{"):
                break
        op.results = [Value("", type_) for type_ in types]
        return op

    def _if(self, name: str, rest: str, loc: str) -> Op:
        condition, _, after = rest.partition(" ")
        types: list[Type] = []
        if after.startswith("-> "):
            types = [self._type(t, loc) for t in split_top(after[after.index("(") + 1 : after.rindex(")")], ",")]
        return self._with_regions(Op(name, [self._value(condition)]), [], types, loc, 2)

    def _while(self, name: str, rest: str, loc: str) -> Op:
        pairs, _ = self._carried(rest)
        signature = split_top(rest, " : ")[-1].removesuffix("{").strip() if " : " in rest else "() -> ()"
        listed = split_top(signature, " -> ")[-1]
        types = [self._type(t, loc) for t in split_top(listed[1:-1] if listed.startswith("(") else listed, ",")]
        args = [self._define(arg, init.type) for arg, init in pairs]
        return self._with_regions(Op(name, [init for _, init in pairs]), args, types, loc, 2)

    def _branch(self, name: str, rest: str, loc: str) -> Op:
        head, *successors = split_top(rest, ",")
        operands = []
        if name == "cf.cond_br":
            operands = [self._value(head)]
        else:
            successors = [head, *successors]
        targets = []
        for successor in successors:
            label, _, args = successor.partition("(")
            targets.append((label.strip(), self._values_in(args)))
        return Op(name, operands, targets=targets)

    def _call(self, name: str, rest: str, loc: str) -> Op:
        callee, _, args = rest.partition("(")
        op = self._plain(name, f"({args}", loc)
        op.attrs["callee"] = callee.lstrip("@").strip('"')
        return op

    def _dot_scaled(self, name: str, rest: str, loc: str) -> Op:
        """``%a scale %s, %b scale %t, %c ...``, either scale left out; the attribute ``scaled`` names those given."""
        op = self._plain(name, rest, loc)
        given = zip(("lhs", "rhs"), split_top(rest, ","), strict=False)
        op.attrs["scaled"] = " ".join(side for side, text in given if " scale " in text)
        return op


def _take_attrs(head: str) -> tuple[str, dict[str, str]]:
    """Splits ``{a = 1 : i32, ...}`` and ``<{...}>`` groups off an operation's text."""
    attrs: dict[str, str] = {}
    while (start := head.find("{")) >= 0:
        end = closing(head, start)
        for entry in split_top(head[start + 1 : end], ","):
            key, _, text = entry.partition(" = ")
            attrs[key] = text
        angled = start > 0 and head[start - 1] == "<"
        head = (head[: start - angled] + head[end + 1 + angled :]).strip()
    return head, attrs


_NO_RESULT = {"tt.store", "tt.return", "scf.yield", "scf.condition", "tt.reduce.return", "tt.scan.return"}
_NO_RESULT |= {"tt.print", "tt.assert", "tt.map_elementwise.return"}
_SPECIAL: dict[str, _Reader] = {
    "scf.for": Parser._for,
    "scf.if": Parser._if,
    "scf.while": Parser._while,
    "cf.cond_br": Parser._branch,
    "cf.br": Parser._branch,
    "tt.call": Parser._call,
    "tt.dot_scaled": Parser._dot_scaled,
}


def parse_module(text: str) -> Module:
    """Parses one TTIR module; see ``Parser``."""
    return Parser(text).module()
