/* SPDX-License-Identifier: Apache-2.0
 *
 * arguments.h - the arguments of a forward call: from Python objects to the core's mha_call, and back.
 *
 * Owns: every reference that a call needs, in one struct, which one function releases.
 *
 *     collect_arguments  ->  check_arguments  ->  prepare_call  ->  (the core)  ->  hand_back
 */
#ifndef MHA_PYTHON_ARGUMENTS_H
#define MHA_PYTHON_ARGUMENTS_H

#include "module.h"
#include "weights_type.h"

typedef struct {
    const weights_object *weights; /* borrowed from the caller's arguments */
    PyArrayObject *out;            /* borrowed, too; NULL: no out= */

    PyArrayObject *query, *key, *value;           /* the same array if the same object was passed */
    PyArrayObject *key_padding_mask, *attn_mask;  /* NULL: none */
    PyArrayObject *static_k, *static_v;           /* NULL: none */
    PyArrayObject *paths;                         /* of attend(), one bool for each batch item; NULL otherwise */
    PyArrayObject *output;                        /* what the core writes; may be out */
    PyArrayObject *attn_weights;                  /* NULL: not wanted */
    PyArrayObject *norms[4]; /* weights and biases of a layer's norms; NULL: none */

    bool is_batched, batch_first, need_weights, average_attn_weights;
    bool without_output; /* only parts of the pass are wanted (stages.c) */
    double dropout_p; /* as given */

    /* (length, batch, features) of the inputs: torch's internal order, whatever batch_first says. */
    npy_intp query_shape[3], key_shape[3], value_shape[3];
    npy_intp S; /* keys that are attended to: those of static_k, if it is given */

    mha_call call;
} call_arguments;

/* The positional arguments of a call: their numbers, and their names in _core's signatures. */
#define CALL_ARGUMENTS(X) \
    X(WEIGHTS, weights) X(QUERY, query) X(KEY, key) X(VALUE, value) X(KEY_PADDING_MASK, key_padding_mask) \
    X(NEED_WEIGHTS, need_weights) X(ATTN_MASK, attn_mask) X(AVERAGE_ATTN_WEIGHTS, average_attn_weights) \
    X(IS_CAUSAL, is_causal) X(OUT, out) X(BATCH_FIRST, batch_first) X(ADD_ZERO_ATTN, add_zero_attn) \
    X(MASKED_ROWS, masked_rows) X(DROPOUT_P, dropout_p) X(DROPOUT_SEED, dropout_seed) X(DROPOUT_CALL, dropout_call)

enum {
#define NUMBER(number, name) ARGUMENT_##number,
    CALL_ARGUMENTS(NUMBER)
#undef NUMBER
    CALL_COUNT,
    ARGUMENT_STATIC_K = CALL_COUNT, /* forward() alone takes this argument and the next, which may be missing */
    ARGUMENT_STATIC_V,
    FORWARD_COUNT
};

/* These functions return 0, or -1 with an exception. `arguments` starts as all zeros. Collecting runs Python code:
 * protocol methods, warnings, other threads. It may change arrays that were collected before. From the checks until the
 * core starts no Python code runs, so the core reads what was checked. */
int collect_arguments(const module_state *state, PyObject *const *objects, Py_ssize_t count,
                      call_arguments *arguments);
int prepare_call(call_arguments *arguments);    /* widens halves, allocates the results and completes `call` */

/* Runs the core. Returns 0, or -1 with an exception. */
int run_forward(module_state *state, call_arguments *arguments);

/* The value of a flag: anything that Python can test for truth, except text. */
int collect_flag(PyObject *object, const char *name, bool *flag);

/* The output as the caller gets it: a new reference, or NULL with an exception. */
PyObject *stored_output(const call_arguments *arguments);

/* The tuple of the output and the weights, which forward() returns. */
PyObject *hand_back(const call_arguments *arguments);

void release_arguments(call_arguments *arguments);

#endif
