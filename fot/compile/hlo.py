"""A compiled program's text (HLO after optimization) as data: instructions, sizes, loops and what runs how often.

A line is an instruction: `%name = shape opcode(%operand, …), attribute=…`; instructions come in computations, and some
name others that they run: a loop its body, a conditional its branches, a fusion what it fuses. Text is all that the
compilers of every backend hand out, so text is read here.
"""

import collections
import math
import re
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_PASSES_ON = ("copy", "bitcast", "convert", "reshape", "opt-barrier")
# Attributes that name computations an instruction runs once; a loop's body is another matter.
_RUNS = {
    "call": ("to_apply",),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "async-start": ("calls",),
}


class Instruction(NamedTuple):
    """One line.

    Attributes:
      name: without %.
      shape: as written, with layouts; a tuple's in parentheses.
      opcode: such as "fusion".
      arguments: the text in its parentheses: operands, or a constant's value.
      attributes: the text after them.
    """

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.-]+)", self.arguments)


Computation = dict[str, Instruction]  # by name, in the order of the text; the root is marked in `Program.roots`


class Program(NamedTuple):
    """A compiled module.

    Attributes:
      computations: by name.
      roots: name of the root instruction of each computation.
      entry: name of the computation that runs.
      devices: partitions of the program.
    """

    computations: dict[str, Computation]
    roots: dict[str, str]
    entry: str
    devices: int


def parse(text: str) -> Program:
    """Reads the text that `compiled.as_text()` gives.

    Raises:
      ValueError: there is no entry computation in it.
    """
    computations: dict[str, Computation] = {}
    roots, entry, current = {}, "", ""
    # A kernel's metadata goes on in further lines.
    for line in re.sub(r'\n(?="|\}[^\n])', "", text).splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$", line)
        if header:
            current = header[2]
            computations[current] = {}
            entry = current if header[1] else entry
        elif line.startswith("}"):
            current = ""
        elif current and (instruction := _instruction(line)):
            computations[current][instruction.name] = instruction
            if line.lstrip().startswith("ROOT "):
                roots[current] = instruction.name
    if not entry:
        raise ValueError("no ENTRY computation: not the text of a compiled program")
    devices = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return Program(computations, roots, entry, int(devices[1]) if devices else 1)


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    closing = _closing(rest, opening)
    return Instruction(head[1], shape, rest[:opening], rest[opening + 1 : closing], rest[closing + 1 :].lstrip(", "))


def _closing(text: str, opening: int) -> int:
    """Returns where the parenthesis at `opening` is closed."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def shape_bytes(shape: str) -> int:
    """Returns the bytes of an array, or of all arrays of a tuple, without padding."""
    return sum(_bits(kind) * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in arrays(shape)) // 8


def arrays(shape: str) -> list[tuple[str, str]]:
    """Returns type and dimensions, as written, of an array or of each array of a tuple."""
    return re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape)


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    digits = re.match(r"[a-z]+(\d+)", kind)  # s32, u8, f8e4m3fn; tokens and the like have no size
    return int(digits[1]) if digits else 0


def named(attributes: str, attribute: str) -> list[str]:
    """Returns the names that an attribute holds, one or a list in braces; none without the attribute."""
    found = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|%?([\w.-]+))", attributes)
    return re.findall(r"[\w.-]+", found[1] or found[2]) if found else []


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """Returns how often a `while` runs its body, None if the text doesn't tell.

    The compiler says it, or the condition is `i < limit` of integers, the limit constant: JAX's loops count up by one.
    """
    said = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if said:
        return int(said[1])
    name = named(loop.attributes, "condition")[0]
    condition = program.computations[name]
    root = condition[program.roots[name]]
    whole = root.opcode == "compare" and all(condition[name].shape[0] in "su" for name in root.operands)
    if not whole or "direction=LT" not in root.attributes:
        return None
    start, limit = (_carried(computation, loop, condition, operand) for operand in root.operands)
    return None if limit is None else max(limit - (start or 0), 0)


def _carried(computation: Computation, loop: Instruction, condition: Computation, name: str) -> int | None:
    """Returns the integer that a name in a loop's condition stands for when the loop begins."""
    instruction = condition[name]
    if instruction.opcode != "get-tuple-element":
        return _constant(condition, name)
    carry = computation.get(loop.operands[0])
    if carry is None or carry.opcode != "tuple":
        return None
    index = int(re.search(r"index=(\d+)", instruction.attributes)[1])
    return _constant(computation, carry.operands[index])


def _constant(computation: Computation, name: str) -> int | None:
    instruction = computation.get(name)
    while instruction is not None and instruction.opcode in _PASSES_ON:
        instruction = computation.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.arguments):
        return None
    return int(instruction.arguments)


class Run(NamedTuple):
    """A computation that runs `times` in an execution; `unknown` of the loops in it have no trip count."""

    computation: Computation
    times: int
    unknown: int


def runs(program: Program) -> list[Run]:
    """Returns every computation that runs instruction by instruction, with how often."""
    times: collections.Counter[str] = collections.Counter()
    unknown: collections.Counter[str] = collections.Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        computation, unknown[name] = program.computations[name], 0
        for instruction in computation.values():
            if instruction.opcode == "while":
                trips = trip_count(program, computation, instruction)
                unknown[name] += trips is None
                visit(named(instruction.attributes, "body")[0], count * (1 if trips is None else trips))
            for attribute in _RUNS.get(instruction.opcode, ()):
                for callee in named(instruction.attributes, attribute):
                    visit(callee, count)

    visit(program.entry, 1)
    return [Run(program.computations[name], count, unknown[name]) for name, count in times.items()]
