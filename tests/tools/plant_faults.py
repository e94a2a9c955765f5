# SPDX-License-Identifier: Apache-2.0
"""Plants small faults in the C sources, one at a time, and reports which of them the tests notice.

    python tests/tools/plant_faults.py [WORD ...]        only faults whose file or description contains a WORD

A fault is an exact piece of text and what replaces it; a text that is no longer there, or is there twice, is an error.
The changed file alone is compiled again, in build/faults/. With a fault stand the tests that should notice it, quick
ones first; the first that fails ends its turn. Each has to pass without any fault before it counts.
x86-64 only: changed kernels are those of AVX2, or the portable ones where the CPU lacks it.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from workbench import REPOSITORY, TESTS, Workbench, empty_folder


class Fault(NamedTuple):
    """What is wrong, where, and what should notice: C programs by name, files of pytest or tests in them."""

    what: str
    file: str
    old: str
    new: str
    tests: str


FAULTS = [
    # The kernels
    Fault("a product's rows shared out wrongly", "kernels/kernels.inc.h", "(p, &at, tiles - larger);",
          "(p, &at, tiles - (larger > 1));", "kernels"),
    Fault("one chain too few takes the larger tiles", "kernels/kernels.inc.h", "p->rows % tiles;",
          "p->rows % tiles / 2;", "kernels"),
    Fault("rescaling forgotten in a product", "kernels/kernels.inc.h",
          "chain = V(fma)(V(load)(addend + lane), V(load)(factor + lane), chain);",
          "chain = V(load)(addend + lane) + chain;", "kernels"),
    Fault("queries of the last lanes are not scaled", "kernels/kernels.inc.h",
          "to[i] = *from * scale;", "to[i] = *from;", "kernels"),
    Fault("unused lanes of a packed panel are not cleared", "kernels/kernels.inc.h",
          "V(store)(to, V(splat)(0));", "", "kernels"),
    Fault("a panel is unpacked one vector too far", "kernels/kernels.inc.h",
          "const size_t used = count - lane < LANES ? count - lane : LANES;", "const size_t used = LANES;", "kernels"),
    Fault("wrong polarity of boolean masks", "kernels/kernels.inc.h", "== MHA_MASK_HIDE ? bits : ~bits;",
          "== MHA_MASK_HIDE ? ~bits : bits;", "kernels forward"),
    Fault("a boolean mask is read from the item's first key", "kernels/kernels.inc.h",
          "nonzero(row + block->first_key + i) << i;", "nonzero(row + i) << i;", "kernels forward"),
    Fault("the last keys of a boolean mask are not read", "kernels/kernels.inc.h",
          "!= 0) << i;\n    }", "!= 0 && keys > 16) << i;\n    }", "kernels forward"),
    Fault("a float64 mask read as float32's neighbour", "kernels/kernels.inc.h",
          "row + (ptrdiff_t)i * stride);", "row + (ptrdiff_t)(i & ~(size_t)1) * stride);", "kernels"),
    Fault("causal masks hide the query's own key", "kernels/kernels.inc.h", "? 0 : query + 1 - block->first_key;",
          "? 0 : query - block->first_key;", "kernels forward"),
    Fault("causal masks hide the query's own key among gathered ones", "kernels/kernels.inc.h",
          "block->index[seen - 1] > query", "block->index[seen - 1] >= query", "kernels forward"),
    Fault("a hidden key keeps its float mask", "kernels/kernels.inc.h", "x = V(load)(at) + x;", "x = V(load)(at);",
          "kernels forward"),
    Fault("every second word of hidden keys is lost", "kernels/kernels.inc.h", "(bits >> (i * WORD_BITS));", "bits;",
          "kernels forward"),
    Fault("padding is not added to the attention mask", "kernels/kernels.inc.h",
          "v[i] + V(splat)(of_keys[k + i]);", "v[i];", "kernels forward"),
    Fault("keys that the last lane does not see are out of view", "kernels/kernels.inc.h", "by_all &= bits;",
          "by_all = bits;", "kernels"),
    Fault("keys that numbers hide from the last lanes are out of view", "kernels/kernels.inc.h",
          "not_hidden = V(either)(not_hidden, V(unlike)(V(load)(bias + lane), infinite));",
          "not_hidden = V(unlike)(V(load)(bias + lane), infinite);", "kernels"),
    Fault("the running maximum is not carried on", "kernels/kernels.inc.h",
          "V(store)(maximum, new);\n        V(store)(factor, rescale);", "V(store)(factor, rescale);", "softmax"),
    Fault("the sum is not rescaled", "kernels/kernels.inc.h",
          "V(fma)(V(load)(sum), rescale, block_sum)", "V(load)(sum) + block_sum", "softmax forward"),
    Fault("merging forgets the second maximum", "kernels/kernels.inc.h", "V(max)(old, old_2)", "old", "softmax"),
    Fault("an empty row is divided by 0", "kernels/kernels.inc.h", "sum[lane] = of_nothing;", "(void)of_nothing;",
          "softmax forward"),
    Fault("a coefficient of exp is a little off", "kernels/kernels.inc.h", "0x1.00087cp-1f", "0x1.000900p-1f", "exp"),
    Fault("a power that exp looks up is off by a unit", "kernels/powers.h", "-572163", "-572162", "exp"),
    Fault("exp is not cut off where it underflows", "kernels/kernels.inc.h", "#define EXP_LOWEST_f32 (-0x1.5d589ep+6f)",
          "#define EXP_LOWEST_f32 (-0x1.8p+6f)", "exp softmax"),
    Fault("dropout's group of four keys is off by one", "kernels/kernels.inc.h", "held = s / 4;", "held = s / 4 + 1;",
          "test_dropout.py::test_distribution"),
    Fault("dropout scales what it drops", "kernels/kernels.inc.h", "< block->threshold ? kept : 0;",
          "< block->threshold ? 0 : kept;", "kernels test_dropout.py"),
    # Blocks, masks, padding
    Fault("the last key of a ragged block is lost", "masks.c",
          "mha_smaller(mha_live_count(live, n) - before, MHA_BLOCK_KEYS);",
          "mha_smaller(mha_live_count(live, n) - before, MHA_BLOCK_KEYS - 1);", "forward"),
    Fault("a block with a gap counts as a run", "masks.c", "index[keys - 1] - index[0] != keys - 1",
          "index[keys - 1] - index[0] > keys", "forward"),
    Fault("removed keys are searched one too far", "masks.c", "if (index[middle] < s)", "if (index[middle] <= s)",
          "forward"),
    Fault("a block that begins with the last query's own key is hidden", "masks.c", "block->first_key > last_query",
          "block->first_key >= last_query", "forward"),
    Fault("the last query's own key is out of view", "masks.c", "mha_key_number(block, keys - 1) > last_query",
          "mha_key_number(block, keys - 1) >= last_query", "forward"),
    Fault("a block that crosses the diagonal counts as visible", "masks.c",
          "mha_key_number(block, keys - 1) > first_query", "block->first_key > first_query", "forward"),
    Fault("a float padding mask is thrown away", "masks.c", "*adds |= value != 0;", "(void)adds;", "forward"),
    Fault("key_padding_mask of the first item for all", "masks.c", "mask_at(&masks->keys, n, 0, 0)",
          "mask_at(&masks->keys, 0, 0, 0)", "forward"),
    Fault("the live keys' list is lost on release", "masks.c", "mha_release(live->block);", "(void)live;",
          "allocations"),
    # Projections
    Fault("the bias is added once for every slice", "projection.c", "if (first_feature == 0) {",
          "if (first_feature == 0 || target->panels->bias) {", "forward"),
    Fault("a slice of features is counted from the wrong one", "projection.c",
          "(ptrdiff_t)first_feature * stride_e", "(ptrdiff_t)(first_feature / 2) * stride_e", "forward"),
    Fault("a chain of rows overlaps the one before", "projection.c", "chain_bytes = p->block_rows * p->chain * item",
          "chain_bytes = (p->block_rows - 1) * p->chain * item", "forward"),
    Fault("rows that lie irregularly are taken for regular ones", "projection.c",
          "            return 0;\n    return distance;", "            break;\n    return distance;", "forward"),
    Fault("a panel does not end at the end of a head", "projection.c", "(target->part - feature) / lanes, vectors)",
          "target->part / lanes, vectors)", "forward"),
    Fault("the second head of a panel begins with the first one's weights", "projection.c",
          "product->b = (const char *)product->b + here * lanes * item;", "", "forward"),
    Fault("the strip of another panel is used between slices", "projection.c",
          "p->slices > 1 ? i - first_panel : 0", "p->slices > 1 ? (i - first_panel) % 4 : 0", "forward"),
    Fault("rows of a block at its edge are left out", "projection.c",
          "block_number + 1) - first_row;", "block_number + 1) - first_row - (block_number > 0);", "forward"),
    Fault("the last blocks go round as if there were as many as before", "projection.c",
          "task % together / abreast * p->task_panels;", "task % together / p->abreast * p->task_panels;", "forward"),
    Fault("larger blocks of rows are not counted", "projection.c", "mha_first_of_part(p->wholes, p->blocks, block)",
          "(p->wholes / p->blocks * block)", "forward"),
    Fault("a narrow output is written beyond its last feature", "projection.c", "panel.first + P <= target->stride",
          "panel.first <= target->stride", "forward"),
    Fault("the rows of another block count as copied", "projection.c", " || copied->first_row != first_row", "",
          "forward"),
    Fault("the rows of another input count as copied", "projection.c", "copied->plan != p || ", "", "forward"),
    Fault("the rows of the last call count as copied", "projection.c",
          "copied_by(&j, worker)->plan = NULL;", "{}", "test_reproducibility.py"),
    Fault("the features of another slice count as copied", "projection.c", " || copied->first_feature != first_feature)",
          ")", "forward"),
    # Attention
    Fault("scores are not scaled", "attention.c", "lanes.count, a->D, a->scale,", "lanes.count, a->D, 1,", "forward"),
    Fault("kept scores of another head", "attention.c", "add_weights(a, &w[i], h, &block,",
          "add_weights(a, &w[i], first_head, &block,", "forward"),
    Fault("grouped heads read the wrong keys", "attention.c", "&a->extra_k : &a->k, n, hkv",
          "&a->extra_k : &a->k, n, a->Hkv - 1 - hkv", "forward"),
    Fault("values of the wrong head", "attention.c", "&a->extra_v : &a->v, n, hkv",
          "&a->extra_v : &a->v, n, 0", "forward"),
    Fault("no dropout in the second pass", "attention.c",
          "drop_out(a, w->n, h, w->lanes, block, block->keys, scores);", ";",
          "forward test_dropout.py"),
    Fault("keys out of view keep the scores of another block", "attention.c",
          "    if (s->kept)\n        hide_rest(a, s->lanes, block, view, scores);\n", "", "forward"),
    Fault("averaged weights are a sum", "attention.c", "1 / (double)w->heads", "1", "forward"),
    Fault("weights of gathered keys land in the wrong column", "attention.c", "block->index[i] * item,", "i * item,",
          "forward"),
    Fault("removed columns are not written", "attention.c", "if (first == 0 && a->live->index)", "if (first == 1)",
          "forward"),
    # Few queries
    Fault("merging leaves out the last chunk", "few_queries.c", "chunk < f->chunks; chunk++",
          "chunk + 1 < f->chunks; chunk++", "forward"),
    Fault("the value bias of an empty row", "few_queries.c",
          "is_zero(kernels, sum + lane * kernels->item) ? 0 : 1", "1", "forward"),
    Fault("an item of numbers that are not finite is not begun anew", "forward.c",
          "} while (status == MHA_OK && given_up > 0);", "} while (false);", "test_extreme_numbers.py"),
    Fault("the last features of Wk are left out", "few_queries.c", "if (e < Ek)\n", "if (e > Ek)\n", "forward"),
    Fault("queries see another query's heads", "few_queries.c", "w->l * H + panel.first", "panel.first", "forward"),
    # The pass
    Fault("inputs that only look alike are joined", "forward.c", "a->stride_n == b->stride_n &&", "",
          "test_inputs.py::test_inputs_that_differ_in_one_stride"),
    Fault("the query's rows for the keys", "forward.c", "(i > 1 || every_key)", "true",
          "test_inputs.py::test_a_query_that_is_the_beginning_of_its_keys"),
    Fault("the extra keys are not cleared", "forward.c", "memset(k, 0, extra * f->at.extra_k.row * item);", "",
          "forward allocations"),
    Fault("keys that are given are taken for heads side by side", "forward.c", "to + h * m->head * item",
          "to + h * width * item", "test_functional.py::test_static_keys_and_values"),
    Fault("few queries take those of another head", "forward.c", "few.q_head = f->at.q.head;", "few.q_head = 0;",
          "forward"),
    Fault("the order of the output", "forward.c", "r % call->N * call->L + r / call->N", "r", "forward"),
    Fault("the workspace is not given back", "forward.c", "        mha_give_workspace(f->block);\n", "", "allocations"),
    Fault("N * S is not checked for overflow", "forward.c",
          "|| __builtin_mul_overflow(call->N, call->S, &positions)", "", "allocations"),
    Fault("one head's mask for all", "attention.c", "!is_shared || s->lanes.first", "s->lanes.first", "forward"),
    Fault("the mask of other queries", "attention.c", " || s->lanes.first != states[i - 1].lanes.first)", ")", "forward"),
    # Chunks of items
    Fault("the workspace of chunks is not given back", "forward.c", "    mha_give_workspace(j.block);\n", "",
          "allocations"),
    Fault("a chunk begins dropout anew", "forward.c", ".first_item = first,", ".first_item = 0,",
          "test_reproducibility.py::test_chunks"),
    Fault("items of a chunk lie one after another in the output", "forward.c", "output->run_stride = Eo;",
          "output->run_stride = f->call->L * Eo;", "forward"),
    Fault("an output over the inputs is written chunk by chunk", "forward.c",
          " || (call->output && !call->output_is_apart)", "", "forward"),
    Fault("a chunk reads the masks of the first one", "masks.c", "mask_at(&masks->attn, first, 0, 0)",
          "masks->attn.data", "forward"),
    Fault("rows of a chunk are counted through the batch", "masks.c", "live->row[n] - live->row[0] + before",
          "live->row[n] + before", "forward"),
    Fault("rows of a run are taken from the first ones", "projection.c", "+ (ptrdiff_t)r * product->a_row", "+ 0",
          "forward"),
    Fault("memory before an array's first element is forgotten", "python/arrays.c", "(stride < 0 ? begin : end)",
          "(end)", "test_reproducibility.py::test_chunks"),
    # Weights and workspace
    Fault("the bias of the wrong projection", "weights.c", "given->v_weight, given->v_bias",
          "given->v_weight, given->k_bias", "forward"),
    Fault("weights that are not released", "weights.c", "mha_release(weights->block);", ";", "allocations"),
    Fault("a stale workspace that is too small", "workspace.c", "header_of(memory)->bytes < bytes",
          "header_of(memory)->bytes * 2 < bytes", "allocations forward"),
    Fault("an overflow of a plan is allocated all the same", "workspace.c",
          "    if (layout->too_large)\n        return MHA_TOO_LARGE;\n    *block = allocate(", "    *block = allocate(",
          "allocations"),
    Fault("a spare block is replaced and lost", "workspace.c",
          "memory = atomic_exchange(spare_of(header_of(memory)->bytes), memory);",
          "(void)(atomic_exchange(spare_of(header_of(memory)->bytes), memory), memory = NULL);", "allocations"),
    Fault("a very large workspace is kept from the system", "workspace.c", "h->taken <= MOST_SPARE", "h->taken > 0",
          "test_ownership.py::test_memory_of_a_very_large_call"),
    Fault("no very large workspace is kept", "workspace.c", "MADV_FREE) == 0;", "MADV_FREE) != 0;",
          "test_ownership.py::test_memory_of_a_very_large_call"),
    # sdpa
    Fault("broadcast heads counted wrongly", "sdpa.c", "(i % s->groups * heads / s->groups)", "(i % s->groups)",
          "sdpa"),
    Fault("batch axes in the wrong order", "sdpa.c", "axis-- > 0; rest /=", "axis-- > 0; rest /= 1 +", "sdpa"),
    Fault("scale of no features", "sdpa.c", "attention.scale = 1;", "attention.scale = call->scale;", "sdpa"),
    # Threads
    Fault("a ticket is handed out twice", "threads.c",
          "atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed)",
          "atomic_fetch_add_explicit(&job->next, worker != 1, memory_order_relaxed)", "threads"),
    Fault("a forked child keeps the old pool", "threads.c", "memset(&pool, 0, sizeof pool);", "", "threads"),
    Fault("the rounding mode stays the worker's", "threads.c", "fesetenv(&pool.current->environment);", "", "threads"),
    Fault("workers stay on the caller's CPU", "threads.c", "leave_cpu(pool.current->cpu);", "", "threads"),
    Fault("workers that left a CPU may not come back", "threads.c",
          "(void)sched_setaffinity(0, sizeof allowed, allowed);", ";", "threads"),
    Fault("workers take the process's signals", "threads.c", "sigfillset(&blocked);",
          "sigemptyset(&blocked);", "threads"),
    Fault("stopping is forgotten", "threads.c", "atomic_store_explicit(&job->stopped, true, memory_order_relaxed);",
          "", "threads"),
    Fault("a loop within a task goes on when that is stopped", "threads.c",
          "        if (mha_is_stopped())\n            return MHA_STOPPED;\n", "", "threads"),
    # The binding
    Fault("a lost release of an argument", "python/arguments.c", "Py_XDECREF(arguments->key_padding_mask);", "",
          "test_ownership.py::test_references[masks]"),
    Fault("a lost release of the output", "python/arguments.c", "Py_XDECREF(arguments->output);", "",
          "test_ownership.py::test_results_die"),
    Fault("any out= is taken for a contiguous one", "python/arguments.c",
          "&& PyArray_ISCARRAY((PyArrayObject *)arguments->out_object)", "",
          "test_inputs.py::test_out_in_every_layout"),
    Fault("the mask of torch's wrong function", "python/sdpa.c", "call->mask.kind = MHA_MASK_SHOW;", ";",
          "test_functional.py::test_a_block_of_hidden_keys_is_not_read test_functional.py::test_masks"),
    Fault("the size of a result is not checked", "python/arrays.c",
          "shape[i] != 0 && __builtin_mul_overflow(bytes, shape[i], &bytes)", "false",
          "test_huge_sizes.py::test_a_result_beyond_the_address_space"),
    Fault("byte order is ignored", "python/arrays.c", "if (!PyArray_ISBYTESWAPPED(array))", "if (true)",
          "test_inputs.py::test_every_layout"),
    Fault("a masked array is read", "python/arrays.c", "has_attribute((PyObject *)array, state->filled_name)", "0",
          "test_advice.py::test_masked_arrays_are_refused"),
    Fault("text is true", "python/arguments.c", "if (PyUnicode_Check(object)) {\n        PyErr_Format(PyExc_TypeError, \"%s "
          "must be True", "if (false) {\n        PyErr_Format(PyExc_TypeError, \"%s must be True",
          "test_advice.py::test_arguments_of_wrong_types_are_refused_when_they_are_given"),
    Fault("advice is asked for about any exception", "python/advised_function.c",
          " || !PyErr_ExceptionMatches(PyExc_TypeError)", "",
          "test_advice.py::test_advice_is_asked_for_type_errors_with_keywords_alone"),
    Fault("an unchecked shape of a bias", "python/weights_type.c", '"in_proj_bias", true, 1, {q + k + v}',
          '"in_proj_bias", true, 1, {-1}', "test_hostile_arguments.py::test_parameters_that_cannot_be"),
    Fault("the key weights may be freed under the core", "python/weights_type.c",
          "self->k_weight = Py_NewRef(given.k_weight);", "self->k_weight = NULL;",
          "test_ownership.py::test_key_weights_live_as_long_as_they_are_read"),
    Fault("Ctrl-C is not looked for", "python/module.c", "if (watches_signals)\n", "if (!watches_signals)\n",
          "test_threads.py::test_ctrl_c"),
    Fault("torch's check of the mask's batch is missing", "python/torch_checks.c", "if (mask_N == N && mask_S == S)",
          "if (mask_S == S)", "test_errors.py::test_torch_raises_the_same"),
    Fault("paths of another number of items", "python/stages.c", "||\n        !array_has_shape(array, 1, &N)", "",
          "test_explain.py::test_paths_that_cannot_be"),
    Fault("a number of threads with something behind it", "python/thread_count.c",
          "(*end == '\\0' || *end == separator)", "true", "test_threads.py::test_wrong_environment"),
]


KERNELS = "avx2" if "avx2" in Path("/proc/cpuinfo").read_text() else "portable"


class FaultyBench(Workbench):
    """A copy of the sources, compiled once, and one file of them wrong at a time."""

    def __init__(self, folder):
        shutil.copytree(REPOSITORY / "csrc", folder / "csrc")
        super().__init__(folder, folder / "csrc")
        self.sound = set()

    def plant(self, fault):
        """Changes one file, and returns what restore() needs."""
        path = self.source / fault.file
        text = path.read_text()
        path.write_text(text.replace(fault.old, fault.new))
        changed = path if path.suffix == ".c" else self.source / "kernels" / f"{KERNELS}.c"
        made = self.object_of(changed)
        sound = made.read_bytes()
        self.compile(changed)
        return path, text, made, sound

    def restore(self, planted):
        """Undoes it."""
        path, text, made, sound = planted
        path.write_text(text)
        made.write_bytes(sound)

    def check_soundness(self, name):
        """A test has to pass while nothing is wrong."""
        if name not in self.sound and not self.passes(name):
            sys.exit(f"{name} fails without any fault")
        self.sound.add(name)

    def passes(self, name):
        """Whether a C program, a file of pytest, or a test in one passes."""
        if ".py" in name:
            self.link_extension()
            command, environment = self.pytest("-qx", name)
            environment["MHA_C_CPU"] = KERNELS  # a newer CPU would run others than the changed ones
        else:
            command, environment = [self.link_program(name)], None
        try:
            return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=900, cwd=TESTS,
                                  env=environment, check=False).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def catch(self, fault):
        """The first test that notices the fault, or None."""
        for name in fault.tests.split():
            self.check_soundness(name)
            planted = self.plant(fault)
            noticed = not self.passes(name)
            self.restore(planted)
            if noticed:
                return name
        return None


def check_texts(bench):
    """Every text that a fault replaces has to be there, once."""
    lost = [fault for fault in FAULTS if (bench.source / fault.file).read_text().count(fault.old) != 1]
    if lost:
        sys.exit("\n".join(f"{fault.file} does not have exactly once: {fault.old}" for fault in lost))


def main():
    """Plants them all; exit status 1 if any goes unnoticed."""
    words = sys.argv[1:]
    faults = [f for f in FAULTS if not words or any(word in f"{f.file} {f.what}" for word in words)]
    began = time.monotonic()
    bench = FaultyBench(empty_folder("faults"))
    check_texts(bench)
    missed = 0
    for fault in faults:
        before = time.monotonic()
        catcher = bench.catch(fault)
        missed += catcher is None
        print(f"{f'caught by {catcher}' if catcher else 'MISSED'} in {time.monotonic() - before:.0f} s  "
              f"{fault.file}: {fault.what}", flush=True)
    print(f"{len(faults)} faults planted, {len(faults) - missed} caught, {missed} missed, in "
          f"{(time.monotonic() - began) / 60:.0f} minutes")
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
