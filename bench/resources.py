"""What each kernel costs on each architecture, read from its machine code. No GPU is needed.

The real launchers run on tensors without memory; each launch is compiled for the architecture asked for
instead of started, with exactly the arguments that a user's call would specialise it on.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ARCHITECTURES = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Case:
    """One call of a launcher: a choice of stages, dtype, layout, gradients and shapes."""

    kernel: str  # "gather", "walk", "scatter" or "reduce" (the scatter kernel without atomics)
    mode: str
    padding_mode: str
    dtype: str = "float32"
    channels_last: bool = False
    need_parameters: bool = True
    kind: str = "affine"
    size: tuple[int, ...] = (48, 64)
    channels: int = 64
    align_corners: bool = False
    far: bool = False
    """Strides that need 64-bit offsets."""
    tangent: bool = False
    """The change along a direction of both the parameters and the image: forward mode, second derivatives."""
    deterministic: bool = False
    fill: bool = False
    """A fill, and in the forward the mask beside the output."""
    supersample: int = 1
    project: str = ""
    """Of the gather: a volume's output reduced along its depth."""
    large: bool = False
    """So many pixels that a program takes several tiles of what it owns."""
    maps: int = 1

    @property
    def stages(self) -> str:
        words = [self.kind, f"{len(self.size)}-D", self.mode, self.padding_mode, self.dtype]
        words.append("channels_last" if self.channels_last else "contiguous")
        if self.kernel in ("walk", "scatter"):
            words.append("+theta" if self.need_parameters else "-theta")
        words += [f"C={self.channels}"] * (self.channels != 64) + ["size_1"] * (1 in self.size)
        if self.size not in _SIZES.values():
            words.append("x".join(map(str, reversed(self.size))))
        words += ["corners"] * self.align_corners + ["int64"] * self.far
        words += ["tangent"] * self.tangent + ["deterministic"] * self.deterministic
        words += ["fill"] * self.fill
        words += [f"supersample={self.supersample}"] * (self.supersample != 1) + [self.project] * bool(self.project)
        words += ["large"] * self.large + [f"K={self.maps}"] * (self.maps != 1)
        return " ".join(words)


@dataclass(frozen=True)
class Resources:
    kernel: str
    stages: str
    arch: str
    registers: int
    spills: int
    """Instructions that store to or load from local (AMD: scratch) memory."""
    local_bytes: int
    shared_bytes: int
    load_widths: dict[str, int]
    """Bits per thread of each global load → how many such instructions."""
    loads_together: int
    """The most global loads with no store or atomic between them, in the order of the code: memory serves no more at a
    time, as one behind a store comes after what that waits for. Loads that wait for each other are not told apart.
    """
    atomics: int
    cas_loops: int
    instructions: list[int]
    """Machine instructions at each level of loops: outside of any, in the outermost ones without those further in,
    and so on, as if every branch that skips some were not taken. Loops beside each other are added."""


_SIZES = {1: (256,), 2: (48, 64), 3: (6, 8, 16)}
"""Of images whose tiles, and their outputs', are those of large ones."""
_SMALL_SIZES = ((14, 14), (7, 7), (1, 512), (512, 1), (1, 32, 64))
"""Those whose tiles, or their outputs', follow the size: fewer pixels, or another shape."""
MODES, PADDING_MODES = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")


def cases(
    kind: str,
    modes: tuple[str, ...] = MODES,
    padding_modes: tuple[str, ...] = PADDING_MODES,
    image_alone: bool = False,
    **fixed: Any,
) -> list[Case]:
    """Every kernel that a transform's launchers can start, with every combination of its stages. The image's gradient
    alone, `image_alone`, is a part of what a kernel does for the parameters' too, and never took more registers.
    """
    result = []
    for mode, padding_mode in itertools.product(modes, padding_modes):
        # Nearest has none in the transform.
        gradients = (False,) if mode == "nearest" else (True, False) if image_alone else (True,)
        walks = kind == "affine"
        result.append(Case("gather", mode, padding_mode, kind=kind, **fixed))
        if walks and padding_mode != "reflection":  # the walk sees only whether the padding folds
            result += [Case("walk", mode, padding_mode, need_parameters=g, kind=kind, **fixed) for g in gradients]
        if not walks or padding_mode != "zeros":
            result += [Case("scatter", mode, padding_mode, need_parameters=g, kind=kind, **fixed) for g in gradients]
        if mode != "nearest":
            result.append(Case("reduce", mode, padding_mode, kind=kind, **fixed))
    return result


def mixed(kind: str, **fixed: Any) -> list[Case]:
    """The same with every mode and every padding, but not every pair of them: neither sees the other."""
    return cases(kind, ("bilinear",), **fixed) + cases(kind, ("nearest", "bicubic"), ("border",), **fixed)


CHAINS = (
    "thin_plate[20]",
    "free_form[8,6]",
    "piecewise_affine[12]",
    "linear_basis[8]",
    "affine+displacement",
    "projective+free_form[8,6]+thin_plate[9]+pixel_displacement",
)


def all_cases() -> list[tuple[Case, str]]:
    """What the tests compile: every stage for every architecture, and on one of them every combination of stages and
    the dtypes, layouts, dimensions and shapes that specialise it further.
    """
    wide: dict[str, Any] = {"dtype": "bfloat16", "channels_last": True}
    linear, smooth, folding, mirrored = ("bilinear",), ("bilinear", "bicubic"), ("border",), ("reflection",)
    everywhere = mixed("affine") + cases("displacement", linear, ("zeros",))
    everywhere += cases("grid", smooth, mirrored, **wide) + cases("grid", ("nearest",), folding, **wide)
    once = cases("affine", image_alone=True) + cases("grid", image_alone=True, **wide) + mixed("affine", **wide)
    once += cases("grid", linear, ("zeros", "reflection")) + cases("grid", linear, folding, channels=3)
    for dtype, channels_last in (("float32", True), ("bfloat16", False), ("float64", False), ("float64", True)):
        once += cases("affine", linear, ("zeros", "border"), dtype=dtype, channels_last=channels_last)
    for shape in ({"channels": 3}, {"channels": 3, **wide}, {"size": (1, 9)}, {"far": True}):
        once += cases("affine", linear, folding, **shape)
    once += cases("grid", linear, mirrored, align_corners=True)  # of a matrix, the host takes care of it
    once += cases("affine", linear, folding, size=(256,))
    for dtype, channels in itertools.product(("float32", "bfloat16"), (1, 3)):
        few = cases("affine", linear, ("zeros",), dtype=dtype, channels=channels)
        once += [case for case in few if case.kernel in ("gather", "walk")]
    once.append(Case("scatter", "bilinear", "zeros", kind="displacement", channels=3))
    for size in _SMALL_SIZES:
        once += cases("affine", linear, folding, size=size)
    once += cases("grid", linear, ("zeros",), size=(14, 14)) + cases("grid", linear, ("zeros",), size=(1, 512), **wide)
    once += cases("projective", smooth, mirrored) + cases("projective", linear, folding, **wide)
    once += cases("projective", linear, ("zeros",), size=(6, 8, 16)) + cases("pixel_displacement", linear, ("zeros",))
    once += cases("projective", linear, folding, tangent=True)
    once += cases("affine", ("bilinear", "nearest"), ("zeros", "reflection"), size=(6, 8, 16))
    once.append(Case("walk", "bilinear", "border", size=(6, 8, 16)))
    once += cases("affine", ("bicubic",), ("zeros",), size=(6, 8, 16)) + cases(
        "grid", MODES, ("zeros",), size=(6, 8, 16)
    )
    once += cases("affine", ("bilinear", "bicubic"), folding, tangent=True) + cases(
        "grid", linear, folding, tangent=True
    )
    once += cases("affine", linear, folding, tangent=True, **wide)
    once += cases("affine", linear, folding, tangent=True, size=(6, 8, 16))
    for kind in CHAINS:
        once += cases(kind, linear, ("zeros",))
    once += cases("free_form[8,8,8]", linear, folding, size=(6, 8, 16)) + cases(CHAINS[0], linear, folding, **wide)
    once += cases(CHAINS[0], linear, folding, tangent=True)
    for supersample in (0, 2):
        once += cases("affine", linear, folding, supersample=supersample)
    once += cases("projective", linear, ("zeros",), supersample=0) + cases(
        "affine", linear, folding, supersample=0, **wide
    )
    once += cases("affine", linear, folding, supersample=0, tangent=True)
    once += cases("affine", linear, ("zeros",), supersample=2, size=(6, 8, 16))
    volume = Case("gather", "bilinear", "zeros", size=(6, 16, 32))
    once += [replace(volume, project=project) for project in ("sum", "argmax")]
    once += [replace(volume, project="sum", tangent=True), replace(volume, project="sum", **wide)]
    fixed = [
        *cases("affine", smooth, folding),
        *cases("grid", smooth, folding),
        *cases("grid", linear, folding, **wide),
    ]
    once += [replace(case, deterministic=True) for case in fixed if case.kernel == "scatter"]
    filled = cases("grid", linear, ("zeros",)) + cases("affine", ("bicubic",), ("zeros",), size=(6, 8, 16))
    for more in ({}, {"tangent": True}, wide):
        filled += cases("affine", linear, ("zeros",), **more)
    once += [replace(case, fill=True) for case in filled]
    once += [replace(cases("affine", linear, folding)[0], fill=True)]  # the mask alone
    loops = cases("affine", linear, folding) + cases("projective", linear, folding, size=(6, 8, 16))
    loops = [replace(case, large=True) for case in loops if case.kernel in ("scatter", "reduce")]
    everywhere = loops + everywhere  # the longest first: no worker is to wait for one at the end
    larger = cases("affine", linear, folding, **wide) + cases("affine", linear, folding, supersample=0)
    larger += cases("projective", linear, folding, tangent=True) + cases("affine", linear, folding, tangent=True)
    larger += cases("affine", linear, ("zeros",), size=(6, 8, 16)) + cases("affine", ("bicubic",), ("reflection",))
    once += [replace(case, large=True) for case in larger if case.kernel == "reduce"]
    owners = [case for case in cases("affine", linear, ("zeros", "border")) if case.kernel in ("gather", "walk")]
    owners = [replace(case, size=size) for case in owners for size in ((48, 64), (6, 8, 16))]
    once += [replace(case, large=True, channels=3) for case in owners if case.padding_mode == "zeros"]
    walks = [case for case in owners if case.kernel == "walk"]
    once += [replace(case, large=True) for case in walks]
    once += [replace(case, maps=3, **more) for case in walks for more in ({}, wide)]
    hungry = cases("grid", ("bicubic",), ("zeros",), channels_last=True, tangent=True)
    hungry += cases("grid", ("bicubic",), ("zeros", "border"), **wide)
    hungry.append(replace(volume, project="sum", tangent=True, fill=True))
    on = dict.fromkeys(ARCHITECTURES, everywhere)
    on["sm_80"] = everywhere + hungry  # whose compiler spills first
    on["sm_90"] = everywhere + once
    return [(case, arch) for arch, some in on.items() for case in dict.fromkeys(some)]


def measure_all(todo: list[tuple[Case, str]], workers: int | None = None) -> Iterator[Resources]:
    """Compile in parallel processes and read the machine code, in order."""
    # Forking is safe here, as no thread of this process holds a lock yet, and spares each worker the import.
    with concurrent.futures.ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        compiled = zip(todo, pool.map(_compile_one, todo), strict=True)
        for arch, rest in itertools.groupby(compiled, lambda item: item[0][1]):
            while some := list(itertools.islice(rest, 32)):
                binaries = [binary for _, (_, binary) in some]
                codes = map(_amd_code, binaries) if _is_amd(arch) else _nvidia_codes(arch, binaries)
                for ((case, _), (shared, _)), code in zip(some, codes, strict=True):
                    yield Resources(case.kernel, case.stages, arch, shared_bytes=shared, **code)


def _compile_one(item: tuple[Case, str]) -> tuple[int, Any]:
    """Bytes of shared memory, and the cubin or, for AMD, the assembler's text."""
    torch.set_num_threads(1)
    compiled = compile_case(*item)
    return compiled.metadata.shared, compiled.asm["amdgcn" if _is_amd(item[1]) else "cubin"]


def _is_amd(arch: str) -> bool:
    return ARCHITECTURES[arch][0] == "hip"


def compile_case(case: Case, arch: str):
    """The compiled kernel that a launcher would start for this case."""
    from tri_stn import kernels  # type: ignore[attr-defined]  # mapped there by setuptools

    scale = {2: 64, 3: 24}[len(case.size)] if case.large else 0.5
    size = tuple(max(1, int(n * scale)) for n in case.size)
    image = _image(case, size if case.large and case.kernel == "walk" else case.size)
    output = _image(case, size, case.maps)
    parameters, auxiliary = _map(case, output.shape[2:])
    tangents = (image, parameters) if case.tangent else (None, None)
    fill = torch.empty(case.channels, device="meta") if case.fill and case.padding_mode == "zeros" else None
    options: dict[str, Any] = {
        "kind": case.kind,
        "mode": case.mode,
        "padding_mode": case.padding_mode,
        "align_corners": case.align_corners,
        "supersample": case.supersample,
    }
    name = {"reduce": "scatter"}.get(case.kernel, case.kernel) + "_kernel"
    with _compiling_for(arch, name) as found:
        if case.kernel == "gather":
            mask = output.new_empty((len(output), 1, *output.shape[2:])) if case.fill and not case.tangent else None
            if case.project:
                options |= {"project": case.project, "depth": output.shape[2]}
                output = output[:, :, 0].to(torch.int32 if case.project == "argmax" else output.dtype)
            kernels.gather(output, image, parameters, auxiliary, fill, *tangents, mask=mask, **options)
        else:
            grad_image = None if case.kernel == "reduce" else torch.empty_like(image)
            grad_parameters = torch.empty_like(parameters) if case.need_parameters else None
            grad_auxiliary = auxiliary if case.need_parameters else None
            options["deterministic"] = case.deterministic
            kernels.adjoint(
                grad_image,
                grad_parameters,
                grad_auxiliary,
                output,
                image,
                parameters,
                auxiliary,
                fill,
                *tangents,
                **options,
            )
    (compiled,) = found
    return compiled


def _map(case: Case, size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The parameters of the maps of a pair of images, and the field of a chain that has one."""
    from tri_stn import points, reference

    dims, field = len(size), None
    if case.kind not in reference.TRANSFORMS:
        links = points.parse(case.kind)
        shape: tuple[int, ...] = (sum(points.LINKS[name].count(dims, *sizes) for name, sizes in links),)
        for name, sizes in links:
            if points.LINKS[name].reads_field:
                field = torch.empty((2, case.maps, *size, *(sizes or (dims,))), device="meta")
    else:
        matrix = {"affine": (dims, dims + 1), "projective": (dims + 1, dims + 1)}
        shape = matrix.get(case.kind, (*size, dims))
    return torch.empty((2, case.maps, *shape), device="meta"), field


def _image(case: Case, size: tuple[int, ...], maps: int = 1) -> torch.Tensor:
    """A pair of images without memory, or what maps of them make; `far` puts the channels so far apart that only 64
    bits reach the last.
    """
    image = torch.empty(2 * maps, case.channels, *size, dtype=getattr(torch, case.dtype), device="meta")
    if case.channels_last:
        return image.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[image.dim()])
    if case.far:
        return torch.empty_strided(image.shape, (2**40, 2**30, *image.stride()[2:]), dtype=image.dtype, device="meta")
    return image


class Driver:
    """Stands in for a GPU driver: enough for Triton to compile, nothing to launch with."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.arch = arch
        self.target = GPUTarget(*ARCHITECTURES[arch])

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> str:
        return self.arch  # Triton keys its caches by device

    def get_current_stream(self, device) -> int:
        return 0


@contextlib.contextmanager
def launched_by(start: Callable[..., None], arch: str = "sm_90") -> Iterator[None]:
    """Kernels are compiled for an architecture, and handed to start(kernel, grid, arguments) instead of a device."""
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    def run(kernel: Any) -> Callable[..., None]:
        # Before its own arguments: grid, stream, function, metadata of two kinds, two hooks.
        return lambda *given: start(kernel, given[:3], given[9:])

    with (
        mock.patch.object(driver, "_active", Driver(arch)),
        mock.patch.object(CompiledKernel, "run", property(run)),
        mock.patch.object(CompiledKernel, "_init_handles", lambda _: None),
    ):
        yield


@contextlib.contextmanager
def kernels_on_the_cpu() -> Iterator[None]:
    """Tensors on the CPU take the kernels' road; with `launched_by`, to its end."""
    from tri_stn import ops

    with mock.patch.object(ops, "_takes_kernels", lambda _: True), _nothing_remembered(ops.kernels()):
        yield


@contextlib.contextmanager
def _nothing_remembered(kernels: Any) -> Iterator[None]:
    """Launches are worked out inside for what is patched there, and afterwards anew."""
    kernels.launch.forget()
    try:
        yield
    finally:
        kernels.launch.forget()


@contextlib.contextmanager
def _compiling_for(arch: str, name: str) -> Iterator[list]:
    """Turn every launch of that kernel inside into a compilation, collected; those of others into nothing."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from tri_stn import kernels  # type: ignore[attr-defined]  # mapped there by setuptools

    found: list = []
    run = JITFunction.run
    vendor = "as on ROCm" if _is_amd(arch) else None  # launchers ask torch for it, and remember

    def compile_only(self, *args, grid, warmup, **kwargs):
        if self.__name__ == name:  # a launcher's other kernel is another case, perhaps in another process by now
            found.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(driver, "_active", Driver(arch)),
        mock.patch.object(torch.version, "hip", vendor),
        _nothing_remembered(kernels),
    ):
        yield found


def _nvidia_tool(name: str, binary: bytes, *options: str) -> str:
    """What a CUDA binary tool prints, of those in Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def _nvidia_codes(arch: str, cubins: Sequence[bytes]) -> Iterator[dict]:
    """Disassembled together, as raw code: nvdisasm takes a third of a second to start, a hundredth for a kernel."""
    texts = [_text(cubin) for cubin in cubins]
    target = arch.upper().replace("_", "") + "a" * (int(arch[3:]) >= 90)  # as Triton compiles for it
    # Without data flow: half of the time, the same text.
    listing = iter(SASS.findall(_nvidia_tool("nvdisasm", b"".join(texts), "-ndf", "-b", target)))
    for cubin, text in zip(cubins, texts, strict=True):
        code = list(itertools.islice(listing, len(text) // 16))  # bytes of an instruction
        opcodes = [opcode for _, _, opcode, _ in code]
        usage = _nvidia_tool("cuobjdump", cubin, "-res-usage")
        counts = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        widths = Counter(_nvidia_width(op) for op in opcodes if op.startswith("LDG."))
        atomics = [op for op in opcodes if re.match(r"(REDG?|ATOMG?)\b", op)]
        yield {
            "registers": counts["REG"],
            "spills": sum(op.startswith(("LDL", "STL")) for op in opcodes),
            "local_bytes": counts["STACK"] + counts["LOCAL"],
            "load_widths": dict(sorted(widths.items(), key=lambda item: int(item[0]))),
            "loads_together": longest_run(opcodes, r"LDG\b", r"(STG|REDG?|ATOMG?)\b"),
            "atomics": len(atomics),
            "cas_loops": sum(".CAS" in op for op in atomics),
            "instructions": nvidia_instructions(code),
        }
    assert not list(listing)


def _text(cubin: bytes) -> bytes:
    """The machine code in an ELF file of one kernel: its one section that can be executed."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    (count,) = struct.unpack_from("<H", cubin, 0x3C)
    sections = (struct.unpack_from("<8x4Q", cubin, table + 64 * i) for i in range(count))
    (code,) = [cubin[start : start + size] for flags, _, start, size in sections if flags & 4]
    return code


def longest_run(opcodes: Iterable[str], counted: str, end: str) -> int:
    """How many opcodes of a kind come with none of another between them, in the order of the code."""
    longest = run = 0
    for opcode in opcodes:
        run = 0 if re.match(end, opcode) else run + bool(re.match(counted, opcode))
        longest = max(longest, run)
    return longest


SASS = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)", re.MULTILINE)
"""An instruction's address, predicate, opcode and operands."""


def nvidia_instructions(listing: Iterable[tuple[str, str, str, str]]) -> list[int]:
    """How many instructions lie at each level of loops, of what `SASS` finds in what nvdisasm prints of raw code.

    A loop is everything from an instruction to the last branch back to it. That assumes what ptxas does: it keeps a
    loop in one piece, and puts what is rarely needed (a slow path, the 64-bit division that is called) behind an EXIT
    or a return that always happens. A branch from there back into the main code closes no loop, and such a block
    counts as outside of loops, wherever it is entered from.
    """
    places: dict[int, int] = {}  # of each address, the instruction there or, of padding, behind it
    code: list[tuple[str, str, str]] = []
    for address, predicate, opcode, operands in listing:
        places[int(address, 16)] = len(code)
        if opcode != "NOP":
            code.append((predicate, opcode, operands))
    ends: dict[int, int] = {}  # of each loop's first instruction, its last
    padding, start = set(), 0  # where the code begins that no EXIT or return cuts off
    for i, (predicate, opcode, operands) in enumerate(code):
        target = re.search(r"\b0x([0-9a-f]+)\s*$", operands)
        if target and opcode.startswith("BRA"):
            head = places[int(target.group(1), 16)]
            if head == i:
                padding.add(i)  # a branch to itself, behind the end
            elif start <= head < i:
                ends[head] = i
        elif opcode.startswith(("EXIT", "RET")) and not predicate:
            start = i + 1
    loops = ends.items()
    return _by_level(sum(head <= i <= end for head, end in loops) for i in range(len(code)) if i not in padding)


def _by_level(levels: Iterable[int]) -> list[int]:
    counts = Counter(levels)
    return [counts[level] for level in range(max(counts) + 1)]


def _nvidia_width(opcode: str) -> str:
    match = re.search(r"\.[US]?(8|16|64|128|256)\b", opcode)
    return match.group(1) if match else "32"


def _amd_code(code: str) -> dict:
    def metadata(key: str) -> int:
        return int(re.search(rf"^\s+\.{key}:\s+(\d+)", code, re.MULTILINE).group(1))  # type: ignore[union-attr]

    opcodes = re.findall(r"^\s+([a-z]\w+)\b", code, re.MULTILINE)
    names = {"ubyte": 8, "sbyte": 8, "ushort": 16, "sshort": 16, "short": 16, "dword": 32}
    names |= {f"dwordx{n}": 32 * n for n in (2, 3, 4)}
    loads = [m for op in opcodes if (m := re.match(r"(?:global|buffer)_load_([a-z]+x\d|[a-z]+)", op))]
    widths = Counter(str(names[m.group(1)]) for m in loads)
    atomics = [op for op in opcodes if re.match(r"(global|buffer|flat)_atomic_", op)]
    return {
        "registers": metadata("vgpr_count"),
        # Scalar registers spill into lanes of vector registers, not to memory: local_bytes tells.
        "spills": metadata("vgpr_spill_count"),
        "local_bytes": metadata("private_segment_fixed_size"),
        "load_widths": dict(sorted(widths.items(), key=lambda item: int(item[0]))),
        "loads_together": longest_run(opcodes, r"(global|buffer)_load", r"(global|buffer|flat)_(store|atomic)"),
        "atomics": len(atomics),
        "cas_loops": sum("cmpswap" in op for op in atomics),
        "instructions": amd_instructions(code),
    }


def amd_instructions(code: str) -> list[int]:
    """How many instructions lie at each level of loops. LLVM notes beside every block how deep it lies."""
    levels, level = [], 0
    for line in code.partition(".Lfunc_end0:")[0].splitlines():
        if re.match(r"\.LBB\w+:|; %bb\.\d+:", line):
            level = 0
        if found := re.search(r"(?:Loop Header:|in Loop: Header=\w+) Depth=(\d+)", line):
            level = int(found.group(1))
        if re.match(r"\s+(?!s_nop\b)[a-z]\w+", line):
            levels.append(level)
    return _by_level(levels)


def to_json(rows: list[Resources]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=1)
