# SPDX-License-Identifier: Apache-2.0
"""The inner loop of every tile stays in registers: it is compiled as the package is, disassembled, and searched for
references to the stack.

All speed comes from these loops. They use every register there is, so that a compiler which loads one value too early,
or unrolls too eagerly, must spill, and the results would still be right.
"""

import ast
import itertools
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
KERNELS = REPOSITORY / "csrc" / "kernels"
AARCH64_HEADERS = Path("/usr/aarch64-linux-gnu/include")
LEVELS = {"avx2": "x86_64", "avx512": "x86_64", "avx512_vnni": "x86_64", "avx512_bf16": "x86_64",
          "neon": "aarch64", "neon_dotprod": "aarch64"}
DTYPES = ["f32", "f64", "bf16", "f16", "int8"]
MACHINE = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())

FUNCTION = re.compile(r"^[0-9a-f]+ <_?(\w+)(?:\.\w+)*>:$")
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(\S.*)$")
TILE = re.compile(r"tiles_(\d+)x(\d+)x(\d+)_(f32|f64|bf16_pairs|bf16|f16|int8)")
JUMP = re.compile(r"^(?:j\w+|b|b\.\w+|cbn?z|tbn?z)\s.*?(?:0x)?([0-9a-f]+) <")
FINAL = re.compile(r"^(?:jmp|b|ret\w*)\b(?!\.)")
MULTIPLY_ADD = re.compile(r"^(?:vfmadd\d+p[sd]|fmla|vpmaddwd|vpdpbusd|vdpbf16ps|sdot|sadalp)\b")
COPY = re.compile(r"^(?:vmov\w+\s+%[xy]mm\d+,\s*%[xy]mm\d+$|dup\b|ld1r\b|mov\s+v)")
CALL = re.compile(r"^(?:call|bl|push|pop)\b")
STACK = {"x86_64": r"%[er]sp\b", "aarch64": r"\bsp\b"}
#: Where a function makes the frame pointer from the stack pointer, that register is another name of the stack.
FRAME = {"x86_64": (r"mov\w*\s+%rsp,\s*%rbp", r"%[er]bp\b"), "aarch64": (r"(?:mov|add)\s+x29,\s*sp", r"\bx29\b")}


def compile_flags():
    """The flags that setup.py always gives, read and not run."""
    for node in ast.walk(ast.parse((REPOSITORY / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == "extra_compile_args":
            return [flag.value for flag in node.value.elts if isinstance(flag, ast.Constant)]
    raise AssertionError("setup.py has no extra_compile_args")


def need(tool):
    """The tool, if it is installed; else the test is skipped."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    return tool


def compiler_for(compiler, target):
    """The command that compiles for the target: directly, or across."""
    if target == MACHINE:
        return [need(compiler)]
    if target != "aarch64":
        pytest.skip(f"no cross compiler for {target} is known here")
    if compiler == "gcc":
        return [need("aarch64-linux-gnu-gcc")]
    if not AARCH64_HEADERS.is_dir():
        pytest.skip("clang finds no C headers for aarch64")
    return [need("clang"), "--target=aarch64-linux-gnu", "-isystem", str(AARCH64_HEADERS)]


def disassembler_for(target):
    """Binutils for the target, or LLVM's, which knows all of them."""
    candidates = ["objdump"] if target == MACHINE else [f"{target}-linux-gnu-objdump"]
    for tool in [*candidates, "llvm-objdump"]:
        if shutil.which(tool):
            return tool
    return pytest.skip(f"no disassembler for {target} is installed")


def disassemble(compiler, level, folder):
    """The functions of a kernel file: name -> [(address, instruction)]."""
    target = LEVELS[level]
    made = folder / f"{level}.o"
    subprocess.run([*compiler_for(compiler, target), *compile_flags(), "-c", str(KERNELS / f"{level}.c"), "-o",
                    str(made)], check=True)
    text = subprocess.run([disassembler_for(target), "-d", "--no-show-raw-insn", str(made)], check=True,
                          capture_output=True, text=True).stdout
    functions, current = {}, []
    for line in text.splitlines():
        if found := FUNCTION.match(line):
            current = functions.setdefault(found[1], [])
        elif found := INSTRUCTION.match(line):
            current.append((int(found[1], 16), found[2]))
    return functions


def jump_target(instruction):
    """Where a jump goes; None for other instructions."""
    jump = JUMP.match(instruction)
    return int(jump[1], 16) if jump else None


def reachable(function, first, last):
    """The instructions that can follow the one at `first`, none of them outside [first, last]."""
    order = {address: i for i, (address, _) in enumerate(function)}
    seen, waiting = set(), [first]
    while waiting:
        address = waiting.pop()
        if address in seen or address not in order or not first <= address <= last:
            continue
        seen.add(address)
        i = order[address]
        instruction = function[i][1]
        waiting.append(jump_target(instruction))
        if not FINAL.match(instruction) and i + 1 < len(function):
            waiting.append(function[i + 1][0])
    return seen


def loops(function):
    """The instructions of every innermost loop: from the target of a backward jump to the jump, if the one leads to the
    other. (gcc moves rare blocks behind the end, and jumps back from there; that is no loop.)"""
    bodies = []
    for address, instruction in function:
        target = jump_target(instruction)
        if target is not None and target <= address:
            body = reachable(function, target, address)
            if address in body:
                bodies.append(body)
    for body in bodies:
        if not any(other < body for other in bodies):
            yield [i for a, i in function if a in body]


def stack_references(function, loop, target):
    """What in the loop touches the stack, or calls."""
    makes, frame_pointer = FRAME[target]
    names = STACK[target]
    if any(re.match(makes, instruction) for _, instruction in function):
        names += "|" + frame_pointer
    return [i for i in loop if re.search(names, i) or CALL.match(i)]


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """Disassembles each level once per compiler."""
    known = {}

    def get(compiler, level):
        if (compiler, level) not in known:
            known[compiler, level] = disassemble(compiler, level, tmp_path_factory.mktemp(f"{compiler}-{level}"))
        return known[compiler, level]
    return get


@pytest.mark.parametrize(("level", "dtype"), [*itertools.product(("avx2", "avx512", "neon"), DTYPES),
                                              ("avx512_vnni", "int8"), ("neon_dotprod", "int8"),
                                              ("avx512_bf16", "bf16_pairs")])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_nothing_spills(functions, compiler, level, dtype):
    """Every tile of R rows, Q panels and V vectors has a loop of R * Q * V multiply-adds (or, unrolled, a multiple) and
    no stack."""
    code = functions(compiler, level)
    tiles = {(int(m[1]), int(m[2]), int(m[3])): code[name]
             for name in code if (m := TILE.fullmatch(name)) and m[4] == dtype}
    vectors = max(v for _, _, v in tiles)
    most_rows = [max((r for r, _, v_ in tiles if v_ == v), default=0) for v in range(1, vectors + 1)]
    of_one_panel = {(r + 1, 1, v) for v, most in enumerate(most_rows, 1) for r in range(most)}
    of_several = {(r, q, v) for r, q in [(1, 2), (1, 3), (1, 4), (2, 2)] for v in range(2, vectors + 1)}
    assert set(tiles) == of_one_panel | of_several
    assert most_rows[-1] * vectors >= 12, "fewer accumulators than the smallest register file has room for"
    wrong = []
    for (r, q, v), function in sorted(tiles.items()):
        name = f"{r}x{q}x{v}"
        counted = [(sum(bool(MULTIPLY_ADD.match(i)) for i in loop), loop) for loop in loops(function)]
        hot = [(count, loop) for count, loop in counted if count]
        if not hot:
            wrong.append(f"{name}: no loop with multiply-adds")
        for count, loop in hot:
            if count % (r * q * v):
                wrong.append(f"{name}: a loop of {count} multiply-adds")
            wrong += [f"{name}: {i}" for i in stack_references(function, loop, LEVELS[level])]
    assert not wrong, f"{compiler}, {level}, {dtype}:\n" + "\n".join(wrong)


@pytest.mark.parametrize(("level", "tile"), [
    *(("avx2", f"tiles_4x1x3_{dtype}") for dtype in DTYPES[:-1]), ("avx2", "tiles_6x1x2_int8"),
    *(("neon", f"tiles_8x1x3_{dtype}") for dtype in DTYPES[:-1]), ("neon_dotprod", "tiles_8x1x3_int8")])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_nothing_is_copied(functions, compiler, level, tile):
    """Nor does a full tile move numbers between registers: with AVX2, instructions are scarce, and in many ARM cores
    moves, and loads to all lanes, take the turns of multiplications."""
    hot = [loop for loop in loops(functions(compiler, level)[tile]) if any(map(MULTIPLY_ADD.match, loop))]
    assert hot
    assert not [i for loop in hot for i in loop if COPY.match(i)]


def test_a_spill_is_seen():
    """What this file calls a reference to the stack, and what not."""
    loop = ["vfmadd231ps (%rdx),%ymm0,%ymm3", "vmovaps 0x20(%rsp),%ymm1", "mov (%rbp),%rax", "jne 8 <f+0x8>"]
    plain = list(enumerate(loop))
    assert stack_references(plain, loop, "x86_64") == loop[1:2]
    assert stack_references([(9, "mov    %rsp,%rbp"), *plain], loop, "x86_64") == loop[1:3]
    loop = ["ldr\tq0, [sp, #16]", "fmla\tv6.4s, v1.4s, v2.4s", "str q1, [x29, #8]", "ldp q0, q1, [x2]"]
    assert stack_references(list(enumerate(loop)), loop, "aarch64") == loop[:1]
    assert stack_references([(9, "mov x29, sp"), *enumerate(loop)], loop, "aarch64") == [loop[0], loop[2]]


def test_a_loop_is_seen():
    """A jump back makes a loop only where it can come to pass again."""
    loop = [(0, "nop"), (4, "fmla v6.4s, v1.4s, v2.4s"), (8, "b.ne    4 <f+0x4>  // b.any"), (12, "ret")]
    assert list(loops(loop)) == [[loop[1][1], loop[2][1]]]
    moved = [(0, "je     8 <f+0x8>"), (4, "ret"), (8, "nop"), (12, "jmp    4 <f+0x4>")]
    assert not list(loops(moved))
    nested = [(0, "fmla v6.4s, v1.4s, v2.4s"), (4, "b.ne    0 <f>"), (8, "str x0, [sp]"), (12, "b.ne    0 <f>")]
    assert list(loops(nested)) == [[i for _, i in nested[:2]]]
