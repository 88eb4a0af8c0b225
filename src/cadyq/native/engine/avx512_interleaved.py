"""Writes the assembly of the interleaved Winograd kernels: python avx512_interleaved.py OUTPUT.

Each function multiplies one Winograd position of four tiles (64 inputs, 64 outputs) and meanwhile does one
task for a neighbouring round of tiles, instruction by instruction: dot products keep two of the vector units
busy, transforms use the others. Compilers neither keep the accumulators in registers nor mix the two streams.

Registers: zmm16-31 accumulators, zmm12-15 weights, zmm11 broadcast inputs; zmm0-10 belong to the task.
rdi inputs, rsi weights, rdx results, rcx the task (struct Task of avx512_interleaved.h), rax a loop counter.
"""

from __future__ import annotations

import sys

TILES = 8
INPUT_PLANE = TILES * 128 + 64  # bytes between Winograd positions: transformed inputs
PRODUCT_PLANE = TILES * 256 + 64  # the same for products
HALF_STEPS = 16  # each function loops twice over half of the 32 pairs of inputs
ROWS = ("r8", "r9", "r10", "r11", "rbx", "r12")
SAVED = ("rbx", "r12", "r13", "r14", "r15")

# struct Task
DESTINATIONS, RESIDUALS = 64, 80
# struct Constants: per channel first, then what is the same for all channels
FACTOR, BIAS, SLOPE, REQUANT, FIXED = 0, 256, 512, 768, 1024
INVERSE9, MAX16, MIN16, LOW, HIGH, FLIP, ORDER = 0, 4, 8, 64, 128, 192, 256

Code = list[str]


def op(name: str, *registers: int) -> str:
    """An instruction on zmm registers, destination last."""
    return f"{name} " + ", ".join(f"%zmm{r}" for r in registers)


def multiply(step: int) -> Code:
    """One pair of inputs of four tiles times 64 outputs."""
    code = [f"vmovdqa64 {step * 256 + 64 * i}(%rsi), %zmm{12 + i}" for i in range(4)]
    for tile in range(4):
        code.append(f"vpbroadcastd {tile * 128 + 4 * step}(%rdi), %zmm11")
        code += [op("vpdpwssd", 12 + i, 11, 16 + 4 * tile + i) for i in range(4)]
    return code


def transform_input(targets: list[str]) -> Code:
    """B^T of zmm0-5, equation (11)."""

    def put(k: int) -> str:
        return f"vmovdqa64 %zmm8, {targets[k]}"

    return [
        "vpsllw $2, %zmm2, %zmm6", "vpsllw $2, %zmm1, %zmm7",
        op("vpsubw", 2, 4, 9), op("vpsubw", 1, 3, 10),  # d4 - d2, d3 - d1
        op("vpsubw", 6, 4, 6), op("vpsubw", 7, 3, 7),  # d4 - 4 d2, d3 - 4 d1
        op("vpaddw", 7, 6, 8), put(1), op("vpsubw", 7, 6, 8), put(2),
        op("vpaddw", 10, 10, 10), op("vpaddw", 10, 9, 8), put(3), op("vpsubw", 10, 9, 8), put(4),
        op("vpsubw", 2, 0, 8), "vpsllw $2, %zmm8, %zmm8", op("vpaddw", 9, 8, 8), put(0),
        op("vpsubw", 3, 5, 8), op("vpaddw", 10, 10, 10), op("vpsubw", 10, 8, 8), put(5),
    ]  # fmt: skip


# A^T of zmm0-5; results in these registers, in order
RESULTS = (0, 4, 2, 3)
TRANSFORM_OUTPUT = [
    op("vpaddd", 2, 1, 6), op("vpsubd", 2, 1, 1), op("vpaddd", 4, 3, 2), op("vpsubd", 4, 3, 3),
    op("vpaddd", 6, 0, 0), op("vpaddd", 2, 0, 0),
    op("vpaddd", 3, 3, 3), op("vpaddd", 3, 1, 4),
    op("vpaddd", 5, 3, 3), "vpslld $2, %zmm3, %zmm3", op("vpaddd", 1, 3, 3),
    "vpslld $2, %zmm2, %zmm2", op("vpaddd", 6, 2, 2),
]  # fmt: skip


def input_columns(load: str) -> list[Code]:
    """Codes of six rows to Z[row][column][64], one column at a time."""
    parts = []
    for q in range(6):
        code = [f"{load} {q * 64}(%{ROWS[a]}), %zmm{a}" for a in range(6)]
        parts.append(code + transform_input([f"{(k * 6 + q) * 128}(%rcx)" for k in range(6)]))
    return parts


def input_rows() -> list[Code]:
    """Z to the transformed inputs, one row at a time."""
    parts = []
    for a in range(6):
        code = [f"vmovdqa64 {(a * 6 + q) * 128}(%r8), %zmm{q}" for q in range(6)]
        parts.append(code + transform_input([f"{(a * 6 + k) * INPUT_PLANE}(%r9)" for k in range(6)]))
    return parts


def output_columns() -> list[Code]:
    """Products to O[row][column][64], one column at a time."""
    parts = []
    for q in range(6):
        code = [f"vmovdqa64 {(a * 6 + q) * PRODUCT_PLANE}(%r8), %zmm{a}" for a in range(6)]
        code += TRANSFORM_OUTPUT
        parts.append(code + [f"vmovdqa64 %zmm{r}, {(a * 6 + q) * 256}(%r9)" for a, r in enumerate(RESULTS)])
    return parts


def output_rows(store: str, slope: bool, covered: bool = False) -> list[Code]:
    """Two rows of O to the target, one row of four pixels at a time: equations (7), (13), (4) and (14).

    Covered codes need no clamping to int16 before, see CadyqQuantizer.

    Only two rows, as this is the longest task: more would take longer than the products it hides behind.
    """
    parts = []
    for a in range(2):
        code = [f"vmovdqa64 {(a * 6 + q) * 256}(%r8), %zmm{q}" for q in range(6)]
        code += TRANSFORM_OUTPUT
        code += [f"movq {DESTINATIONS + 8 * a}(%rcx), %r9", "addq %r12, %r9"]
        code += [f"vmovups {FACTOR}(%r10), %zmm7", f"vmovups {BIAS}(%r10), %zmm8"]
        code += [f"vpmulld {INVERSE9}(%r15){{1to16}}, %zmm{y}, %zmm{y}" for y in RESULTS]
        code += [op("vcvtdq2ps", y, y) for y in RESULTS]
        code += [op("vmulps", 7, y, y) for y in RESULTS] + [op("vaddps", 8, y, y) for y in RESULTS]
        if slope:
            code.append(f"vmovups {SLOPE}(%r10), %zmm9")
            for i, y in enumerate(RESULTS):
                code += [f"vpmovd2m %zmm{y}, %k{i + 1}", f"vmulps %zmm9, %zmm{y}, %zmm{y}{{%k{i + 1}}}"]
        pixels = ("(%r9)", "(%r9, %r13)", "(%r9, %r13, 2)", "(%r9, %r14)")
        if store in ("int16", "residual", "rectified", "snapped"):
            if store == "snapped":  # codes first, with the limits in place of int16's
                code.append(f"vmovups {REQUANT}(%r10), %zmm10")
                code += [f"vrndscaleps $8, %zmm{y}, %zmm{y}" for y in RESULTS]
                code += [f"vminps {MAX16}(%r15){{1to16}}, %zmm{y}, %zmm{y}" for y in RESULTS]
                code += [f"vmaxps {MIN16}(%r15){{1to16}}, %zmm{y}, %zmm{y}" for y in RESULTS]
                code += [op("vmulps", 10, y, y) for y in RESULTS]
            code += [op("vcvtps2dq", y, y) for y in RESULTS]
            if store == "int16":
                code += [f"vpmovsdw %zmm{y}, {p}" for y, p in zip(RESULTS, pixels, strict=True)]
            else:
                code += [f"movq {RESIDUALS + 8 * a}(%rcx), %r11", "addq %r12, %r11"]
                code += [f"vpmovsdw %zmm{y}, %ymm{y}" for y in RESULTS]
                code += [
                    f"vpaddsw {p.replace('r9', 'r11')}, %ymm{y}, %ymm{y}"
                    for y, p in zip(RESULTS, pixels, strict=True)
                ]
                if store == "rectified":
                    code.append(op("vpxord", 10, 10, 10))
                    code += [f"vpmaxsw %ymm10, %ymm{y}, %ymm{y}" for y in RESULTS]
                code += [f"vmovdqu %ymm{y}, {p}" for y, p in zip(RESULTS, pixels, strict=True)]
        else:
            code.append(f"vmovups {REQUANT}(%r10), %zmm10")
            code += [f"vrndscaleps $8, %zmm{y}, %zmm{y}" for y in RESULTS]
            if not covered:
                code += [f"vminps {MAX16}(%r15){{1to16}}, %zmm{y}, %zmm{y}" for y in RESULTS]
                code += [f"vmaxps {MIN16}(%r15){{1to16}}, %zmm{y}, %zmm{y}" for y in RESULTS]
            code += [op("vmulps", 10, y, y) for y in RESULTS] + [op("vcvtps2dq", y, y) for y in RESULTS]
            code += [f"vmovdqa64 {ORDER}(%r15), %zmm1", op("vpackssdw", 4, 0, 0), op("vpackssdw", 3, 2, 2)]
            if store == "signed":
                code += [op("vpacksswb", 2, 0, 0), f"vpmaxsb {LOW}(%r15), %zmm0, %zmm0"]
                code.append(f"vpminsb {HIGH}(%r15), %zmm0, %zmm0")
            else:
                code += [op("vpackuswb", 2, 0, 0), f"vpminub {HIGH}(%r15), %zmm0, %zmm0"]
            code += [
                f"vpxord {FLIP}(%r15), %zmm0, %zmm0",
                op("vpermd", 0, 1, 0),
                f"vmovdqu %xmm0, {pixels[0]}",
            ]
            code += [f"vextracti32x4 ${i}, %zmm0, {pixels[i]}" for i in (1, 2, 3)]
        parts.append(code)
    return parts


def mix(first: Code, second: Code) -> Code:
    """Both streams in order, the second spread evenly over the first."""
    mixed, done = [], 0
    for i, line in enumerate(first):
        mixed.append(line)
        while done < len(second) and (done + 0.5) * len(first) <= (i + 1) * len(second):
            mixed.append(second[done])
            done += 1
    return mixed + second[done:]


def function(name: str, setup: Code, parts: list[Code], advance: Code) -> Code:
    """A kernel whose task has the given parts in each of its two halves."""
    code = [f".globl {name}", f".type {name}, @function", ".p2align 6", f"{name}:"]
    body = [f"pushq %{r}" for r in SAVED] + setup
    body += [op("vpxord", r, r, r) for r in range(16, 32)]
    body += ["movl $2, %eax", ".p2align 5"]
    loop = mix([i for s in range(HALF_STEPS) for i in multiply(s)], [i for part in parts for i in part])
    loop += [
        f"addq ${4 * HALF_STEPS}, %rdi",
        f"addq ${256 * HALF_STEPS}, %rsi",
        *advance,
        "decl %eax",
        "jnz 1b",
    ]
    end = [f"vmovdqa64 %zmm{16 + r}, {64 * r}(%rdx)" for r in range(16)]
    end += [f"popq %{r}" for r in reversed(SAVED)] + ["ret"]
    indent = ["\t" + line for line in body] + ["1:"] + ["\t" + line for line in loop + end]
    return code + indent + [f".size {name}, .-{name}"]


def program() -> Code:
    """All kernels."""
    code = [".text"]
    fields = [f"movq {8 * i}(%rcx), %{r}" for i, r in enumerate(ROWS)]
    steps = [f"addq $32, %{r}" for r in ROWS] + ["addq $64, %rcx"]
    rows = [*fields, "movq 48(%rcx), %rcx"]
    code += function("cadyq_wino_plain", [], [], [])
    code += function("cadyq_wino_in_columns_s", rows, input_columns("vpmovsxbw"), steps)
    code += function("cadyq_wino_in_columns_u", rows, input_columns("vpmovzxbw"), steps)
    two, both = fields[:2], ["addq $64, %r8", "addq $64, %r9"]
    code += function("cadyq_wino_in_rows", two, input_rows(), both)
    code += function("cadyq_wino_out_columns", two, output_columns(), both)
    # r8 source, r10 constants per channel, r12 offset in the pixel, r13 and r14 one and three pixels,
    # r15 fixed constants
    target = ["movq (%rcx), %r8", "movq 8(%rcx), %r10", "movq 16(%rcx), %r12", "movq 24(%rcx), %r13"]
    target += ["leaq (%r13, %r13, 2), %r14", "movq 32(%rcx), %r15"]
    for store in ("signed", "unsigned", "int16", "residual", "rectified", "snapped"):
        is_code = store in ("signed", "unsigned")
        ahead = ["addq $64, %r8", "addq $64, %r10", f"addq ${16 if is_code else 32}, %r12"]
        for covered in (False, True) if is_code else (False,):
            for slope in (False, True):
                name = f"cadyq_wino_out_{store}{'_covered' * covered}{'_act' * slope}"
                code += function(name, target, output_rows(store, slope, covered), ahead)
    return [*code, '.section .note.GNU-stack, "", @progbits']


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="ascii") as file:
        file.write("\n".join(program()) + "\n")
