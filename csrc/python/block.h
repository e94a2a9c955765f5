/* SPDX-License-Identifier: Apache-2.0
 *
 * block.h - a layer of a Transformer, or its first half, as a function of the module.
 */
#ifndef MHA_PYTHON_BLOCK_H
#define MHA_PYTHON_BLOCK_H

#include "module.h"

/* The positional arguments of a call after those of forward(). */
#define BLOCK_ARGUMENTS(X) \
    X(NORM_FIRST, norm_first) X(IS_SELF_ATTENTION, is_self_attention) X(ATTENTION_NORM, attention_norm) \
    X(LINEAR1, linear1) X(ACTIVATION, activation) X(IS_GATED, is_gated) X(LINEAR2, linear2) \
    X(FEED_FORWARD_NORM, feed_forward_norm) X(ZEROES_PADDING, zeroes_padding)

PyObject *transform(PyObject *module, PyObject *const *objects, Py_ssize_t count);

#endif
