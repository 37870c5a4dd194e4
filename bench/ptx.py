"""What Triton compiles for NVIDIA's GPUs, in their language PTX, as Python over numpy: see `emulator`.

A kernel is blocks of instructions without a branch inside. Each becomes a function block(T, R, K, m) of the threads
(their memory, shuffles and numbers), of registers, of constants, and of a mask of those threads that take part, None
for all; it returns the block that they go to. A register is an array of bits, a number for each thread or for all.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
U1, U2, U4, U8, I2, I4, I8, F2, F4, F8 = map(np.dtype, ("u1", "u2", "u4", "u8", "i2", "i4", "i8", "f2", "f4", "f8"))
BOOL = np.dtype(bool)
TYPES = {
    "b8": U1, "u8": U1, "b16": U2, "u16": U2, "s16": I2, "b32": U4, "u32": U4, "s32": I4, "b64": U8, "u64": U8,
    "s64": I8, "f16": F2, "f32": F4, "f64": F8, "bf16": U2, "f16x2": U4, "bf16x2": U4, "pred": BOOL,
}  # fmt: skip
UNSIGNED = {1: U1, 2: U2, 4: U4, 8: U8}
WARP = 32
ATOMIC: dict[str, np.ufunc] = {"add": np.add, "min": np.minimum, "max": np.maximum}

_EXPRESSIONS = {
    "cvta": "{}", "abs": "np.abs({})", "neg": "(-{})", "copysign": "np.copysign({1}, {0})",
    "not": "(~{})", "and": "({} & {})", "or": "({} | {})", "xor": "({} ^ {})",
    "mul": "({} * {})", "mul.hi": "high({}, {})", "mul.wide": "(wide({}) * wide({}))", "fma": "fused({}, {}, {})",
    "min": "np.fmin({}, {})", "min.NaN": "np.minimum({}, {})", "max": "np.fmax({}, {})",
    "max.NaN": "np.maximum({}, {})", "max.relu": "np.maximum(np.maximum({}, {}), 0)", "rem": "remainder({}, {})",
    "div": "quotient({}, {})",
    # These are not exactly rounded.
    "div.full": "({} * (F4.type(1) / {}))", "div.approx": "({} * (F4.type(1) / {}))", "rcp": "(1 / {})",
    "sqrt": "np.sqrt({})", "rsqrt": "(1 / np.sqrt({}))", "ex2": "np.exp2({})", "lg2": "np.log2({})",
}  # fmt: skip
"""Instructions whose operands are all of one type: with the modifier that makes a difference, or without."""
_COMPARISONS = {
    "eq": "({a} == {b})", "ne": "(({a} < {b}) | ({a} > {b}))", "lt": "({a} < {b})", "le": "({a} <= {b})",
    "gt": "({a} > {b})", "ge": "({a} >= {b})", "num": "(({a} == {a}) & ({b} == {b}))",
    # Those that hold where one is no number.
    "equ": "~(({a} < {b}) | ({a} > {b}))", "neu": "({a} != {b})", "ltu": "~({a} >= {b})", "leu": "~({a} > {b})",
    "gtu": "~({a} <= {b})", "geu": "~({a} < {b})", "nan": "(({a} != {a}) | ({b} != {b}))",
}  # fmt: skip


class Program:
    """A kernel's PTX, translated.

    What is not translated fails where it is reached: slow paths, such as that of a sine of thousands of turns, are
    rarely taken.
    """

    def __init__(self, text: str) -> None:
        head, body = text.split(".visible .entry", 1)[1].split("\n{", 1)
        body = body.split("\n}", 1)[0]
        self.parameters = {name: kind for kind, name in re.findall(r"\.param \.(\w+)[^,)]*?(\w+_param_\d+)", head)}
        self.threads = int(re.findall(r"\.reqntid (\d+)", head)[0])
        tables = re.findall(r"\.global \.align \d+ \.b8 (\w+)\[\d+\] = \{([^}]*)\}", text)
        self.tables = {name: np.array([int(byte, 0) for byte in table.split(",")], U1) for name, table in tables}
        self.constants: list[Array] = []
        self.registers: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.together: dict[int, int] = {}
        """Blocks that begin with an instruction at which so many threads wait for each other."""
        self._products = _products(body)
        self._stored = {name: TYPES[kind] for kind, name in re.findall(r"\.reg \.(\w+)\s+%(\w+?)(?:<\d+>)?;", body)}
        blocks = self._split(body)
        self.lengths = [len(block) for block in blocks]
        self.blocks = [[self._compile(i, block, mask) for mask in ("None", "m")] for i, block in enumerate(blocks)]
        """Each for all threads, and for some."""

    def _split(self, body: str) -> list[list[str]]:
        targets = set(re.findall(r"\bbra(?:\.uni)?\s+(\$\w+)", body))
        blocks: list[list[str]] = [[]]

        def begin() -> None:
            if blocks[-1]:
                blocks.append([])

        rest = ""
        for line in body.splitlines():
            line = line.split("//")[0].strip()
            if line.endswith(":"):
                if line[:-1] in targets:
                    begin()
                    self.labels[line[:-1]] = len(blocks) - 1
            elif not line.startswith("."):  # for assemblers and debuggers
                *whole, rest = f"{rest} {line}".split(";")
                # Braces around instructions, and the registers that they declare, mean nothing here.
                for instruction in (re.sub(r"^[{}\s]*(\.reg .*)?", "", statement) for statement in whole):
                    if not instruction:
                        continue
                    if waits := re.match(r"(bar|shfl|redux)\b", instruction):
                        if len(blocks) - 1 not in self.together:
                            begin()
                        size = self.threads if waits[1] == "bar" else WARP
                        self.together[len(blocks) - 1] = max(size, self.together.get(len(blocks) - 1, 0))
                    blocks[-1].append(instruction)
                    if re.search(r"(^|\s)(bra|ret)\b", instruction):
                        begin()
        return blocks if blocks[-1] else blocks[:-1]

    def _compile(self, i: int, block: list[str], mask: str) -> Any:
        lines = [f"following = {i + 1}"]
        for instruction in block:
            try:
                lines += self._translate(instruction, mask)
            except (AttributeError, KeyError, ValueError):
                lines.append(f"raise NotImplementedError({instruction!r})")
        source = "def block(T, R, K, m):\n    " + "\n    ".join(lines) + "\n    return following\n"
        scope = dict(globals())
        exec(compile(source, f"<block {i}>", "exec"), scope)
        return scope["block"]

    def _translate(self, instruction: str, mask: str) -> list[str]:
        predicate, name, rest = _match(r"(?:@(!?%\w+)\s+)?([\w.]+)(?:\s+(.*))?", instruction)
        if predicate:
            taken = "~" * predicate.startswith("!") + self._value(predicate.lstrip("!"), "pred")
            mask = taken if mask == "None" else f"({taken} & m)"
        opcode, *modifiers = name.split(".")
        operands = [o.strip() for o in re.split(r",(?![^{\[]*[}\]])", rest or "")]
        if opcode in ("bra", "ret"):
            to = self.labels[operands[0]] if opcode == "bra" else "T.END"
            return [f"following = {to}" if mask == "None" else f"following = np.where({mask}, {to}, following)"]
        if name.startswith(("ld.local", "st.local")) or "cc" in modifiers:
            raise ValueError("neither memory of a thread's own nor carries")
        translate = getattr(self, f"_{opcode}", None)
        if translate is None:
            key = next((k for k in (f"{opcode}.{m}" for m in modifiers) if k in _EXPRESSIONS), opcode)
            values = [self._value(o, modifiers[-1]) for o in operands[1:]]
            return [self._assign(operands[0], _EXPRESSIONS[key].format(*values), mask)]
        to, expression = translate(modifiers, operands, mask)
        if isinstance(to, str):
            return [self._assign(to, expression, mask)]
        parts = [self._assign(name, f"parts[{i}]", mask) for i, name in enumerate(to) if name.startswith("%")]
        return [f"parts = {expression}", *parts]

    def _assign(self, register: str, expression: str, mask: str) -> str:
        bits = f"bits({expression}, {_name(self._width(register))})"
        at = f"R[{self._register(register)}]"
        return f"{at} = {bits}" if mask == "None" else f"{at} = put({mask}, {at}, {bits})"

    def _register(self, name: str) -> int:
        return self.registers.setdefault(name, len(self.registers))

    def _width(self, register: str) -> np.dtype:
        return self._stored[_match(r"%([a-zA-Z]+)\d*", register)[0]]

    def _value(self, operand: str, kind: str) -> str:
        """An expression of an operand's numbers, as of a type."""
        dtype = TYPES[kind]
        if re.fullmatch(r"%(tid|ctaid|nctaid)\.[xyz]", operand):
            return f"T.{operand[1:].replace('.', '_')}"
        if operand.startswith("%"):
            value, stored = f"R[{self._register(operand)}]", self._width(operand)
            if stored == dtype:
                return value
            # A narrow number lies in the low bits of a wide register.
            return f"{value}.{'view' if stored.itemsize == dtype.itemsize else 'astype'}({_name(dtype)})"
        if operand in ("global_smem", "__local_depot0"):  # where memory of a kind begins
            operand = "0"
        if operand in self.tables:
            operand = str(self.tables[operand].ctypes.data)
        if operand.startswith(("0f", "0d")):
            number = np.array([int(operand[2:], 16)], UNSIGNED[dtype.itemsize]).view(dtype)
        else:
            number = constant(int(operand, 0), dtype).view(dtype)
        self.constants.append(number)
        return f"K[{len(self.constants) - 1}]"

    def _values(self, operands: list[str], kind: str) -> str:
        return f"[{', '.join(self._value(o, kind) for o in operands)}]"

    def _address(self, operand: str) -> str:
        base, offset = _match(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        kind = "u64" if base.startswith("%") and self._width(base) == U8 else "u32"
        return self._value(base, kind) + (f" + {self._value(offset, kind)}" if offset else "")

    # --- instructions: of modifiers, operands and a mask, where the result goes and what it is ---------------

    def _ld(self, modifiers: list[str], operands: list[str], mask: str) -> tuple[Any, str]:
        to, address = operands
        if modifiers[0] == "param":
            return to, f"T.parameters[{address.strip('[] ')!r}]"
        size, parts = TYPES[modifiers[-1]].itemsize, _parts(to)
        return parts, f"T.load_{modifiers[0]}({self._address(address)}, {size}, {len(parts)}, {mask})"

    def _st(self, modifiers: list[str], operands: list[str], mask: str) -> tuple[Any, str]:
        values = self._values(_parts(operands[1]), modifiers[-1])
        return (), f"T.store_{modifiers[0]}({self._address(operands[0])}, {values}, {mask})"

    def _red(self, modifiers: list[str], operands: list[str], mask: str) -> tuple[Any, str]:
        operation, values = next(m for m in modifiers if m in ATOMIC), self._values(_parts(operands[1]), modifiers[-1])
        return (), f"T.change_atomically({self._address(operands[0])}, {values}, {operation!r}, {mask})"

    def _atom(self, modifiers: list[str], operands: list[str], mask: str) -> tuple[Any, str]:
        return _parts(operands[0]), self._red(modifiers, operands[1:], mask)[1]

    def _bar(self, modifiers: list[str], operands: list[str], mask: str) -> tuple[Any, str]:
        return (), "None"  # see `together`

    def _shfl(self, modifiers: list[str], operands: list[str], mask: str) -> tuple[Any, str]:
        value, lane, whole = (self._value(o, "b32") for o in operands[1:4])
        return operands[0], f"T.shuffle({value}, {lane}, {whole}, {modifiers[1]!r})"

    def _redux(self, modifiers: list[str], operands: list[str], mask: str) -> tuple[Any, str]:
        return operands[0], f"T.reduce({self._value(operands[1], modifiers[-1])}, {modifiers[1]!r})"

    def _mov(self, modifiers: list[str], operands: list[str], mask: str) -> tuple[Any, str]:
        kind, (to, source) = modifiers[-1], operands
        if to.startswith("{"):
            return _parts(to), f"unpack({self._value(source, kind)}, {len(_parts(to))})"
        if source.startswith("{"):
            parts = _parts(source)
            return to, f"pack({self._values(parts, f'b{8 * TYPES[kind].itemsize // len(parts)}')})"
        return to, self._value(source, kind)

    def _cvt(self, modifiers: list[str], operands: list[str], mask: str) -> tuple[Any, str]:
        *how, to, of = modifiers
        rounding = next((h for h in how if h in ROUNDING), None)
        values = [self._value(o, of) for o in operands[1:]]
        if to.endswith("x2"):
            low, high = (f"convert({v}, {of!r}, {to[:-2]!r})" for v in reversed(values))
            return operands[0], f"pack([{low}, {high}])"
        return operands[0], f"convert({values[0]}, {of!r}, {to!r}, {rounding!r})"

    def _selp(self, modifiers: list[str], operands: list[str], mask: str) -> tuple[Any, str]:
        a, b = (self._value(o, modifiers[-1]) for o in operands[1:3])
        return operands[0], f"np.where({self._value(operands[3], 'pred')}, {a}, {b})"

    def _setp(self, modifiers: list[str], operands: list[str], mask: str) -> tuple[Any, str]:
        comparison, kind = modifiers
        a, b = (self._value(o, kind) for o in operands[1:])
        return operands[0], _COMPARISONS[comparison].format(a=a, b=b)

    def _add(self, modifiers: list[str], operands: list[str], mask: str, sign: str = "") -> tuple[Any, str]:
        kind, (to, a, b) = modifiers[-1], operands
        if len(modifiers) == 1 and a in self._products:
            x, y, c = (self._value(o, kind) for o in (*self._products[a], b))
            return to, f"fused({x}, {y}, {sign}{c})"
        if len(modifiers) == 1 and b in self._products:
            x, y, c = (self._value(o, kind) for o in (*self._products[b], a))
            return to, f"fused({sign}{x}, {y}, {c})"
        return to, f"({self._value(a, kind)} {sign or '+'} {self._value(b, kind)})"

    def _sub(self, modifiers: list[str], operands: list[str], mask: str) -> tuple[Any, str]:
        return self._add(modifiers, operands, mask, "-")

    def _mad(self, modifiers: list[str], operands: list[str], mask: str) -> tuple[Any, str]:
        how, kind = modifiers
        a, b = (self._value(o, kind) for o in operands[1:3])
        if how == "wide":
            return operands[0], f"(wide({a}) * wide({b}) + {self._value(operands[3], f'{kind[0]}{2 * int(kind[1:])}')})"
        return operands[0], f"({a} * {b} + {self._value(operands[3], kind)})"

    def _shl(self, modifiers: list[str], operands: list[str], mask: str, how: str = "left") -> tuple[Any, str]:
        value, amount = self._value(operands[1], modifiers[-1]), self._value(operands[2], "u32")
        return operands[0], f"shift({value}, {amount}, np.{how}_shift)"

    def _shr(self, modifiers: list[str], operands: list[str], mask: str) -> tuple[Any, str]:
        return self._shl(modifiers, operands, mask, "right")

    def _bfe(self, modifiers: list[str], operands: list[str], mask: str) -> tuple[Any, str]:
        value, (start, length) = self._value(operands[1], modifiers[-1]), (self._value(o, "u32") for o in operands[2:])
        return operands[0], f"bit_field({value}, {start}, {length})"


def _match(pattern: str, text: str) -> tuple[Any, ...]:
    found = re.fullmatch(pattern, text, re.DOTALL)
    if found is None:
        raise ValueError(text)
    return found.groups()


def _parts(operand: str) -> list[str]:
    """The registers of a vector, or the one that is none."""
    return [o.strip() for o in operand.strip("{} ").split(",")]


def _name(dtype: np.dtype) -> str:
    return "BOOL" if dtype == BOOL else f"{dtype.kind.upper()}{dtype.itemsize}"


def _products(body: str) -> dict[str, list[str]]:
    """Products that ptxas fuses with an addition, as it may where PTX names no rounding: their factors, by register."""
    written = Counter(re.findall(r"^\s*(?:@!?%p\d+\s+)?[\w.]+\s+\{?\s*(%\w+)", body, re.MULTILINE))
    found = re.findall(r"^\s*mul\.f(?:32|64)\s+(%\w+), (\S+), (\S+);", body, re.MULTILINE)
    return {product: factors for product, *factors in found if max(written[r] for r in (product, *factors)) == 1}


# --- what translated instructions call -----------------------------------------------------------------


def constant(value: float, dtype: np.dtype) -> Array:
    """One number for all threads, as bits."""
    unsigned = UNSIGNED[dtype.itemsize]
    if dtype.kind == "f":
        return np.array([value], dtype).view(unsigned)
    return np.array([int(value) & (2 ** (8 * dtype.itemsize) - 1)], unsigned)


def bits(value: Array, dtype: np.dtype) -> Array:
    """A result as its register holds it."""
    if value.dtype == dtype:
        return value
    return value.view(dtype) if value.dtype.itemsize == dtype.itemsize else value.astype(dtype)


def put(mask: Array, old: Array | None, new: Array) -> Array:
    return np.where(mask, new, new.dtype.type(0) if old is None else old)


def wide(value: Array) -> Array:
    return value.astype(f"{value.dtype.kind}{2 * value.dtype.itemsize}")


def high(a: Array, b: Array) -> Array:
    return (wide(a) * wide(b) >> 8 * a.dtype.itemsize).astype(a.dtype)


def quotient(a: Array, b: Array) -> Array:
    """Towards zero, of integers."""
    return a / b if a.dtype.kind == "f" else (a - remainder(a, b)) // _but_zero(b)


def remainder(a: Array, b: Array) -> Array:
    return np.fmod(a, _but_zero(b))


def _but_zero(value: Array) -> Array:
    """Whatever a GPU gives where integers are divided by zero, it does not stop."""
    return np.where(value == 0, value.dtype.type(1), value)


def shift(value: Array, amount: Array, how: np.ufunc) -> Array:
    """Nothing is left by a shift beyond the width, or the sign."""
    most = 8 * value.dtype.itemsize - 1
    shifted = how(value, np.minimum(amount, most).astype(value.dtype))
    return shifted if value.dtype.kind == "i" else np.where(amount > most, value.dtype.type(0), shifted)


def bit_field(value: Array, start: Array, length: Array) -> Array:
    above = (8 * value.dtype.itemsize - start - length).astype(value.dtype)
    return value << above >> (above + start.astype(value.dtype))


def fused(a: Array, b: Array, c: Array) -> Array:
    """A product and a sum, rounded once; in fp64 to the precision that there is."""
    more = F8 if a.dtype == F4 else np.dtype(np.longdouble)
    return (a.astype(more) * b.astype(more) + c.astype(more)).astype(a.dtype)


def unpack(value: Array, parts: int) -> Array:
    part = UNSIGNED[value.dtype.itemsize // parts]
    return np.ascontiguousarray(value).view(part).reshape(-1, parts).T.copy()


def pack(parts: list[Array]) -> Array:
    """The first is lowest."""
    whole = UNSIGNED[parts[0].dtype.itemsize * len(parts)]
    return np.ascontiguousarray(np.stack(np.broadcast_arrays(*parts), -1)).view(whole)[:, 0]


ROUNDING: dict[str, Any] = {"rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc, "rni": np.rint}


def convert(value: Array, of: str, to: str, rounding: str | None = None) -> Array:
    if of == "bf16":
        value = (value.astype(U4) << U4.type(16)).view(F4)
    if rounding:
        value = ROUNDING[rounding](value)
    dtype = TYPES[to]
    if to == "bf16":
        return torch.from_numpy(value.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
    if value.dtype.kind == "f" and dtype.kind != "f":  # the nearest that there is, and 0 for NaN
        least, most = (float(limit) for limit in (np.iinfo(dtype).min, np.iinfo(dtype).max))
        exact = np.clip(np.nan_to_num(value.astype(F8)), least, most)
        return np.where(exact < most, np.where(exact < most, exact, 0).astype(dtype), np.iinfo(dtype).max).astype(dtype)
    return value.astype(dtype)
