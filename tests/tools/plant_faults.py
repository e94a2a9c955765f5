# SPDX-License-Identifier: Apache-2.0
"""Plants small faults in the C sources, one at a time, and reports which of them the tests notice.

    python tests/tools/plant_faults.py [--quick] [--seed N] [WORD ...]      only faults whose name contains a WORD

For every third function of csrc/ (--quick: every thirtieth) a fault is drawn from those that its text allows: another
comparison, operator or constant, a condition negated, a statement left out, arguments or members exchanged, a loop's
last turn skipped. It is named by file, function and kind. The draw depends on the seed and on the function's own name
and text, so that a change elsewhere does not change it. NAMED holds faults where a generator cannot go: in tables,
macros and constants.

A fault after which the compiler makes the same code is no fault, and another one is drawn. So is one that UNSEEN
explains: it changes how long a call takes or how much memory it needs, and no result.

The changed file is compiled again, in build/faults/, and the tests of its subject run, quick ones first. The first that
fails ends the fault's turn. Each has to pass without any fault before it counts.
x86-64 only: changed kernels are those of AVX2, or the portable ones where the CPU lacks it.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from workbench import REPOSITORY, TESTS, Workbench, empty_folder

SHARE, QUICK_SHARE = 3, 30  # one function in so many
DRAWS = 20  # before a function is taken for one without a fault
KERNELS = "avx2" if "avx2" in Path("/proc/cpuinfo").read_text() else "portable"


class Fault(NamedTuple):
    """Where something is wrong and what: text[begin:end] of the file is replaced."""

    name: str
    file: str
    begin: int
    end: int
    new: str


# ---- Reading C ----

Edit = tuple[int, int, str]  # begin, end, what stands there instead
FUNCTION = re.compile(r"^(?!typedef|enum|struct|union)\w[^;{}=]*?\b(?:[VG]\((\w+)\)|(\w+))\([^;{}]*\)\n\{\n(.*?)^\}",
                      re.M | re.S)
BLANK = re.compile(r'/\*.*?\*/|"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|^#(?:[^\n]*\\\n)*[^\n]*', re.M | re.S)


def masked(text: str) -> str:
    """The text with blanks for comments, strings and preprocessor lines, all else where it was."""
    return BLANK.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def functions_in(text: str) -> Iterator[tuple[str, int, int]]:
    """The functions of a file: name, beginning and end of the body."""
    for found in FUNCTION.finditer(masked(text)):
        yield found[1] or found[2], found.start(3), found.end(3)


def closing(text: str, at: int) -> int:
    """Where the bracket closes that opens at a place."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    return len(text)


def split_arguments(text: str, begin: int, end: int) -> list[tuple[int, int]]:
    """The parts between commas outside brackets, without blanks around them."""
    parts, depth, start = [], 0, begin
    for i in range(begin, end + 1):
        if i == end or (text[i] == "," and depth == 0):
            part = text[start:i]
            parts.append((start + len(part) - len(part.lstrip()), start + len(part.rstrip())))
            start = i + 1
        else:
            depth += (text[i] in "([{") - (text[i] in ")]}")
    return parts


def alternatives(source: Path) -> dict[str, list[str]]:
    """For each name those that could stand in its place: members declared together, alternatives of a typedef enum."""
    found: dict[str, list[str]] = {}
    for file in sorted(source.rglob("*.[ch]")):
        text = masked(file.read_text())
        members = [declared for body in re.findall(r"\bstruct\b[^;(){}]*\{([^{}]*)\}", text)
                   for declared in re.findall(r"^ {4}(?:const )?\w+ ([^;()]*,[^;()]*);", body, re.M)]
        enumerators = re.findall(r"typedef enum \{(.*?)\}", text, re.S)
        for names in [*(re.findall(r"\w+", re.sub(r"\[.*?\]|const", "", one)) for one in members),
                      *(re.findall(r"\bMHA_\w+", one) for one in enumerators)]:
            for name, other in zip(names, [*names[1:], names[0]], strict=True):
                if other not in found.setdefault(name, []):
                    found[name].append(other)
    return found


# ---- Kinds of faults: each finds the places of a function's text at which it is possible ----

COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
OPERATORS = {"+": "-", "-": "+", "*": "+", "/": "*", "%": "/", "&&": "||", "||": "&&", "&": "|", "|": "&", "<<": ">>"}


def other_operators(table: dict[str, str]) -> Callable[[str], Iterator[Edit]]:
    """A kind that exchanges binary operators, which have blanks around them."""
    pattern = re.compile(rf"(?<= )(?:{'|'.join(map(re.escape, sorted(table, key=len, reverse=True)))})(?= )")

    def find(text: str) -> Iterator[Edit]:
        for found in pattern.finditer(text):
            yield found.start(), found.end(), table[found[0]]
    return find


def other_constants(text: str) -> Iterator[Edit]:
    """A number is one more, so that the -1 of a failure becomes the 0 of a success."""
    for found in re.finditer(r"(?<![\w.])-?\d+(?![\w.])|\btrue\b|\bfalse\b", text):
        yield found.start(), found.end(), {"true": "false", "false": "true"}.get(found[0]) or str(int(found[0]) + 1)


def negated_conditions(text: str) -> Iterator[Edit]:
    for found in re.finditer(r"\b(?:if|while) \(", text):
        end = closing(text, found.end() - 1)
        yield found.end() - 1, end + 1, f"(!{text[found.end() - 1:end + 1]})"


def missing_statements(text: str) -> Iterator[Edit]:
    for found in re.finditer(r"(?:[;{}:)]|else)\s*\n\s+(?=[\w*(])", text):
        end = text.find(";", found.end())
        statement = text[found.end():end]
        keyword = re.match(r"return|break|continue|goto|if|for|while|do|switch|case|default|else|static|const",
                           statement)
        declaration = re.match(r"(?:struct )?[\w()]+(?:\s*\*+\s*|\s+)(?:const\s+)?\w+(?:\[.*?\])?\s*(?:=|,|$)",
                               statement)
        if not keyword and not declaration and "{" not in statement.replace("{0}", ""):
            yield found.end(), end, ""


SYMMETRIC = ["mha_smaller(", "mha_larger(", "mha_is_same_walk("]  # their two arguments are alike


def exchanged_arguments(text: str) -> Iterator[Edit]:
    for found in re.finditer(r"\b(?!if|for|while|switch|return|sizeof)(?:V\(\w+\)|\w+)\(", text):
        parts = split_arguments(text, found.end(), closing(text, found.end() - 1))
        for (begin, middle), (start, end) in zip(parts, parts[1:], strict=False):
            if text[begin:middle] != text[start:end] and found[0] not in SYMMETRIC:
                yield begin, end, text[start:end] + text[middle:start] + text[begin:middle]


def last_turns(text: str) -> Iterator[Edit]:
    for found in re.finditer(r"\bfor \([^;]*; (\w+) < [^;]*; (?:\1 \+= (\w+))?", text):
        yield found.start(1), found.end(1), f"{found[1]} + {found[2] or 1}"


def exchanged_names(others: dict[str, list[str]]) -> Callable[[str], Iterator[Edit]]:
    """A kind that puts a member or an enumerator in the place of its neighbour."""
    def find(text: str) -> Iterator[Edit]:
        for found in re.finditer(r"(?<=\.)\w+\b(?! = )|(?<=->)\w+\b|\bMHA_\w+", text):
            for other in others.get(found[0], []):
                yield found.start(), found.end(), other
    return find


def kinds(source: Path) -> dict[str, Callable[[str], Iterator[Edit]]]:
    """Every kind by its name."""
    return {
        "another comparison": other_operators(COMPARISONS),
        "another operator": other_operators(OPERATORS),
        "another constant": other_constants,
        "negated condition": negated_conditions,
        "missing statement": missing_statements,
        "exchanged arguments": exchanged_arguments,
        "skipped turn": last_turns,
        "exchanged names": exchanged_names(alternatives(source)),
    }


# ---- What no test can notice ----

class Unseen(NamedTuple):
    """Faults that change no result: those of some files whose name and change (see describe()) match, and why. With no
    change, all faults of a function."""

    files: str
    name: str
    change: str
    why: str


UNSEEN = [
    Unseen("", "", r"__builtin_prefetch|prefetch|madvise|MADV_", "a hint to the hardware or to the system"),
    Unseen("tiles?", r"prefetch|(hardware_keeps_up|lines_of_step)\(\)", "", "what is prefetched"),
    Unseen("groups", r"tile\(\)", r"-> .*a_4 = rows >= 4", "an address that four rows do not use"),
    Unseen("projection", r"prefetch_row\(\)|next_weights\(\)", "", "what is prefetched"),
    Unseen("attention", r"prefetch_share\(\)|count_sharers\(\)", "", "what is prefetched"),
    Unseen("projection", r"narrow_slice\(\)", r"-> .*spare\) : 1;", "rows of bfloat16 have no largest number"),
    Unseen("projection", r"choose_tasks_per_block\(\)", "", "how threads share the work"),
    Unseen("projection", r"choose_blocking\(\)", r"-> .*(panels [-+*] threads|\(p\.at_once, p|\) \+ p\.at_once)",
           "how threads share the work"),
    Unseen("probabilities", r"(even_parts|are_panels_even)\(\)", "", "how threads share the work"),
    Unseen("schedule", r"min_chunks\(\)", "", "how threads share the work"),
    Unseen("attention", r"has_halves\(\)", r"-> .*a->(k|v|context)\.type", "all four are of one type"),
    Unseen("attention", r"narrow_keys\(\)", r"-> .*a->D, 1,", "rows of bfloat16 have no largest number"),
    Unseen("attention", r"attend_block\(\)", r"-> copied\[s->hkv / COPY_HEADS\]",
           "how often blocks are copied; sanitize.py asan checks the index"),
    Unseen("attention", r"choose_tasks\(\)", "", "how threads share the work"),
    Unseen("attention", r"step\(\)", r"-> .*dropout_p >= 0", "weights are multiplied by 1"),
    Unseen("attention", r"mha_attend_panels\(\)", r"-> .*\(b - 1\) % 2", "the same as (b + 1) % 2"),
    Unseen("attention", r"tasks_of_handful\(\)", "", "how threads share the work"),
    Unseen("attention", r"is_handful\(\)", r"-> .* < MHA_HANDFUL", "which of two ways with equal bits, at one size"),
    Unseen("pass", r"goes_by_rows\(\)", "", "in which order rows are visited"),
    Unseen("python/module", r"monotonic_seconds\(\)", "", "how often the call looks at signals, and at its CPUs"),
    Unseen("", r"_operations\(\)", "", "how many threads a call uses, and whether it keeps the GIL"),
    Unseen("processors", r"(quota_of|lists|cgroup_quota|read_line)\(\)", "", "needs a cgroup with a quota"),
    Unseen("processors", r"usable_cpus\(\)", "quota", "needs a cgroup with a quota"),
    Unseen("attention", r"mha_plan_panels\(\)", r"-> .*(layout|state) = \{1\}", "alignment, which sanitize.py ubsan checks"),
    Unseen("attention", r"mha_plan_panels\(\)", r"reserve\(&state, 1, P.* -> .*\(&state, 2, P", "room that is not used"),
    Unseen("few_queries", "", r"pack_panel\(bk.* -> .*size, 1, 1,", "the distance between rows of which there is one"),
    Unseen("few_queries", "", r"-> .*memcmp\(zero, number", "the same comparison"),
    Unseen("kernels/kernels", r"mha_multiply_chained\(\)", r"-> .*depth >= chain", "an empty chain, which adds 0"),
    Unseen("layer", r"place_extra\(\)", r"-> .*3 \* heads", "room that is not used"),
    Unseen("sdpa", r"plan_attention\(\)", r"-> .*s->items : 1,", "room that is not used"),
    Unseen("spare", "", r"-> .*(bytes > LARGE|taken < MAX_SPARE)", "which memory is kept, at one size"),
    Unseen("spare", r"offer\(\)", r"-> .*h->bytes (- MHA_HUGE|\+ MHA_HUGE_PAGE - 2)", "how many pages are offered"),
    Unseen("projection", r"take_slice\(\)", r"^run\.distance = .* -> +;", "whether a single row is copied"),
    Unseen("projection", "", r"-> .*PANELS_PER_POLL <= next", "how often it asks whether to stop"),
    Unseen("schedule", r"run_scheduled\(\)", r"-> .*chunks (>= 1|> 2) \?", "how threads share the work"),
    Unseen("threads", r"sleep_while\(\)", r"-> .*NULL, NULL, 1\)", "an argument that FUTEX_WAIT ignores"),
    Unseen("threads", r"withdraw\(\)", r"-> .*gate == 0 && changes_soon", "how long the caller waits before it sleeps"),
    Unseen("workspace", r"mha_row_stride\(\)", r"-> .*lines / 2 == 0", "where rows begin"),
    Unseen("arrays", r"find_bounds\(\)", r"-> .*stride <= 0", "a distance of 0 moves neither bound"),
    Unseen("python/sdpa", r"collect_double\(\)", r"^PyErr_Clear\(\); +-> +;", "PyErr_Format() does it, too"),
    Unseen("python/sdpa", r"is_readable\(\)", r"-> .*<= 1 && strides", "rows are copied that could be read in place"),
    Unseen("python/sdpa", r"is_readable\(\)", r"-> .*array, 2\) <= 2", "two rows that descend are read right, too"),
    Unseen("python/", "", r"^return 0; +-> +return 1;", "callers ask whether it is negative"),
    Unseen("python/", "", r"\? -1 : 0.* -> .*\? -1 : 1", "callers ask whether it is negative"),
    Unseen("torch_checks", r"check_batch\(\)", r"-> .*key = arguments->value_shape", "the shapes agree here"),
    Unseen("cpu", r"detect\(\)", "", "needs a CPU with fewer instructions"),
]


# ---- Where a generator cannot go ----

class Named(NamedTuple):
    """What is wrong, and the text that is replaced, which has to be in the file once."""

    what: str
    file: str
    old: str
    new: str


NAMED = [
    Named("a coefficient of exp is a little off", "kernels/softmax.inc.h", "0x1.00087cp-1f", "0x1.000900p-1f"),
    Named("a power that exp looks up is off by a unit", "kernels/simd.h", "-572163", "-572162"),
    Named("exp is not cut off where it underflows", "kernels/softmax.inc.h",
          "#define EXP_LOWEST_f32 (-0x1.5d589ep+6f)", "#define EXP_LOWEST_f32 (-0x1.8p+6f)"),
    Named("every fourth row of a tile is the one before", "kernels/tile.inc.h",
          "(r % 4 == 3 ? a_rows_3 : r % 4 * a_row)", "(r % 4 == 3 ? 2 * a_row : r % 4 * a_row)"),
    Named("the second vector of a panel is taken for the third", "kernels/tile.inc.h",
          "c##r##0_2 = V(fma)(a_r, b_2, c##r##0_2);", "c##r##0_2 = V(fma)(a_r, b_1, c##r##0_2);"),
    Named("rows of an addend are as far apart as those of the result", "kernels/tile.inc.h", "addend += addend_row;",
          "addend += c_row;"),
    Named("a float64 mask is taken for the kernels' own in float32", "kernels/masks.inc.h",
          "#define own_kind_f32 MHA_MASK_FLOAT32", "#define own_kind_f32 MHA_MASK_FLOAT64"),
    Named("a worker hands its ticket out twice", "threads.c",
          "atomic_fetch_add_explicit(&loop->next, 1, memory_order_relaxed)",
          "atomic_fetch_add_explicit(&loop->next, worker != 1, memory_order_relaxed)"),
]

# The tests of a subject, quick ones first: C programs by name, files of pytest or tests in them.
SUBJECTS = [
    (r"kernels/", "kernels narrow softmax exp forward block test_dropout.py"),
    (r"cpu", "kernels softmax forward test_reproducibility.py"),
    (r"block|rowwise", "block allocations test_whole_layers.py::test_workspace"),
    (r"threads|processors", "threads test_threads.py test_processes.py"),
    (r"python/advised", "test_advice.py test_ownership.py test_out_of_memory.py"),
    (r"python/sample", "test_packed.py test_hostile_arguments.py test_out_of_memory.py"),
    (r"python/thread_count", "test_threads.py test_hostile_arguments.py test_out_of_memory.py"),
    (r"python/sdpa", "test_functional.py test_hostile_arguments.py test_out_of_memory.py test_ownership.py"),
    (r"python/(block|linear_type)", "test_whole_layers.py::test_steps test_hostile_arguments.py test_out_of_memory.py "
                                    "test_ownership.py"),
    (r"python/stages", "test_explain.py test_hostile_arguments.py test_out_of_memory.py test_ownership.py"),
    (r"python/torch_checks", "test_errors.py test_inputs.py test_functional.py test_hostile_arguments.py"),
    (r"python/module", "test_inputs.py test_threads.py test_ownership.py test_out_of_memory.py test_advice.py "
                       "test_interrupt.py"),
    (r"python/run", "test_inputs.py test_hostile_arguments.py test_threads.py test_out_of_memory.py test_interrupt.py"),
    (r"python/", "test_inputs.py test_errors.py test_packed.py test_functional.py test_hostile_arguments.py "
                 "test_out_of_memory.py test_ownership.py test_advice.py"),
    (r"", "forward narrow block sdpa allocations test_inputs.py test_dropout.py "
          "test_functional.py::test_static_keys_and_values test_reproducibility.py::test_chunks test_hidden.py "
          "test_ownership.py::test_memory_of_a_very_large_call test_explain.py test_extreme_numbers.py"),
]


def tests_of(file: str) -> list[str]:
    """The tests of a file's subject."""
    return next(names.split() for pattern, names in SUBJECTS if re.match(pattern, file))


def draw(source: Path, seed: int, share: int) -> Iterator[Iterator[Fault]]:
    """For every function that is chosen, the faults to try in turn."""
    ways = kinds(source)
    for path in sorted(source.rglob("*.[ch]")):
        file, text = str(path.relative_to(source)), path.read_text()
        if file.startswith("kernels/") and path.suffix == ".c" or "simd_" in file and KERNELS not in file:
            continue
        for function, begin, end in functions_in(text):
            chance = random.Random(f"{seed} {file} {function}")
            if chance.random() * share < 1:
                yield _faults(chance, ways, file, function, masked(text)[begin:end], begin)


def _faults(chance: random.Random, ways: dict[str, Callable[[str], Iterator[Edit]]], file: str, function: str,
            body: str, begin: int) -> Iterator[Fault]:
    found = {kind: list(enumerate(find(body), 1)) for kind, find in ways.items()}
    for _ in range(DRAWS):
        possible = [kind for kind in found if found[kind]]
        if not possible:
            return
        kind = chance.choice(possible)
        number, (start, stop, new) = found[kind].pop(chance.randrange(len(found[kind])))
        yield Fault(f"{file} {function}(): {kind} {number}", file, begin + start, begin + stop, new)


def named_faults(source: Path) -> Iterator[Iterator[Fault]]:
    """The faults of NAMED."""
    for named in NAMED:
        text = (source / named.file).read_text()
        if text.count(named.old) != 1:
            sys.exit(f"{named.file} does not have exactly once: {named.old}")
        at = text.index(named.old)
        yield iter([Fault(f"{named.file}: {named.what}", named.file, at, at + len(named.old), named.new)])


class FaultyBench(Workbench):
    """A copy of the sources, compiled once, and one file of them wrong at a time."""

    def __init__(self, folder: Path) -> None:
        shutil.copytree(REPOSITORY / "csrc", folder / "csrc")
        super().__init__(folder, folder / "csrc")
        self.flags.remove("-w")  # with it, a number in the place of a pointer would be no error
        self.seconds: dict[str, float] = {}  # that each test takes without a fault

    def users(self, file: str) -> list[Path]:
        """The sources to be compiled again after a change of a file."""
        if file.endswith(".c"):
            return [self.source / file]
        sources = [path for path in self.source.rglob("*.c") if path.parent.name != "kernels" or path.stem == KERNELS]
        command = ["gcc", *self.flags, "-MM", *sources]
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rules = re.split(r"^\w+\.o: ", listed.replace("\\\n", ""), flags=re.M)[1:]
        return [Path(rule.split()[0]) for rule in rules
                if any(Path(name).resolve() == (self.source / file).resolve() for name in rule.split()[1:])]

    def plant(self, fault: Fault) -> bool:
        """Changes the file and compiles it; False, with nothing changed, if that is impossible or changes nothing."""
        path = self.source / fault.file
        self.sound = {made: made.read_bytes() for made in map(self.object_of, self.users(fault.file))}
        self.text = path, path.read_text()
        path.write_text(self.text[1][:fault.begin] + fault.new + self.text[1][fault.end:])
        try:
            for user in self.users(fault.file):
                self.compile(user, ["-Werror=int-conversion", "-Werror=incompatible-pointer-types"],
                             subprocess.DEVNULL)
            if any(made.read_bytes() != sound for made, sound in self.sound.items()):
                return True
        except subprocess.CalledProcessError:
            pass
        self.restore()
        return False

    def restore(self) -> None:
        """Undoes it."""
        self.text[0].write_text(self.text[1])
        for made, sound in self.sound.items():
            made.write_bytes(sound)

    def passes(self, name: str, limit: float) -> bool:
        """Whether a C program, a file of pytest, or a test in one passes within so many seconds."""
        environment: dict[str, str] = dict(os.environ)
        if ".py" in name:
            self.link_extension()
            command, environment = self.pytest("-qx", name)
            environment["MHA_C_CPU"] = KERNELS  # a newer CPU would run others than the changed ones
        else:
            command = [self.link_program(name)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=TESTS, env=environment,
                              start_new_session=True) as process:
            try:
                return process.wait(limit) == 0
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return False

    def check_soundness(self, name: str) -> None:
        """A test has to pass while nothing is wrong."""
        before = time.monotonic()
        if not self.passes(name, 1800):
            sys.exit(f"{name} fails without any fault")
        self.seconds[name] = time.monotonic() - before

    def catch(self, fault: Fault) -> str | None:
        """The first test that notices the fault, which is planted before and after; None if all pass."""
        for name in tests_of(fault.file):
            if name not in self.seconds:
                self.restore()
                self.check_soundness(name)
                self.plant(fault)
            if not self.passes(name, 30 + 10 * self.seconds[name]):
                return name
        return None


def explain(fault: Fault, text: str) -> Unseen | None:
    """Why no test can notice a fault, if UNSEEN says so."""
    change = describe(fault, text)
    return next((unseen for unseen in UNSEEN if re.search(unseen.files, fault.file)
                 and re.search(unseen.name, fault.name) and re.search(unseen.change, change)), None)


def describe(fault: Fault, text: str) -> str:
    """The changed line, before and after."""
    begin, end = text.rfind("\n", 0, fault.begin) + 1, text.find("\n", fault.end)
    after = text[begin:fault.begin] + fault.new + text[fault.end:end]
    return f"{' '.join(text[begin:end].split())}  ->  {' '.join(after.split())}"


def main() -> int:
    """Plants them all; exit status 1 if any goes unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the faults")
    parser.add_argument("--seed", type=int, default=0, help="another draw")
    parser.add_argument("words", nargs="*", metavar="WORD", help="only faults whose name contains one of them")
    options = parser.parse_args()
    began = time.monotonic()
    bench = FaultyBench(empty_folder("faults"))
    named = [] if options.quick else named_faults(bench.source)
    planted = missed = left_out = 0
    for faults in [*draw(bench.source, options.seed, QUICK_SHARE if options.quick else SHARE), *named]:
        for fault in faults:
            if options.words and not any(word in fault.name for word in options.words):
                continue
            text = (bench.source / fault.file).read_text()
            if unseen := explain(fault, text):
                left_out += 1
                print(f"left out: {fault.name}, {unseen.why}", flush=True)
                if unseen.change:
                    continue
                break
            before = time.monotonic()
            if not bench.plant(fault):
                continue
            catcher = bench.catch(fault)
            bench.restore()
            planted, missed = planted + 1, missed + (catcher is None)
            print(f"{f'caught by {catcher}' if catcher else 'MISSED'} in {time.monotonic() - before:.0f} s  "
                  f"{fault.name}: {describe(fault, text)}", flush=True)
            break
    print(f"{planted} faults planted, {planted - missed} caught, {missed} missed, {left_out} left out, in "
          f"{(time.monotonic() - began) / 60:.0f} minutes")
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
