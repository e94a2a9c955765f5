/* SPDX-License-Identifier: Apache-2.0
 *
 * docstrings.h - what inspect.signature() and help() show of the module's functions; module.c alone includes it.
 */
#ifndef MHA_PYTHON_DOCSTRINGS_H
#define MHA_PYTHON_DOCSTRINGS_H

#include "arguments.h"
#include "block.h"
#include "norm.h"
#include "sdpa.h"

#define NAME(number, name) #name ", "

static const char forward_doc[] =
    "forward($module, " CALL_ARGUMENTS(NAME) "static_k=None, static_v=None, /)\n--\n\n"
    "The forward pass: torch's checks, in torch's order and words, then the result.\n\n"
    "masked_rows is \"torch\", \"zero\" or \"nan\". dropout_p is that of this call: 0 outside training. Inputs and\n"
    "masks are whatever exposes an array; None is no mask. out is returned as the first result; as with NumPy's\n"
    "ufuncs a wrong type or dtype of it is a TypeError, a wrong shape or a read-only array a ValueError. static_k and\n"
    "static_v, given together, take the place of the projected keys and values where they are not None.\n"
    "An exception that the checks raise has the attribute refused: nothing was computed.";

static const char scaled_dot_product_attention_doc[] =
    "scaled_dot_product_attention($module, " SDPA_ARGUMENTS(NAME) "/)\n--\n\n"
    "Attention without projections: torch's checks, in torch's order and words, then the result: a new C-contiguous\n"
    "array, or out, as in forward().\n"
    "An exception that the checks raise has the attribute refused: nothing was computed.";

static const char normalize_doc[] =
    "normalize($module, " NORM_ARGUMENTS(NAME) "/)\n--\n\n"
    "layer_norm, or rms_norm if is_rms: torch's checks, in torch's order and words, then the result: a new\n"
    "C-contiguous array. None is no weight, no bias, and the machine's epsilon for rms_norm.\n"
    "An exception that the checks raise has the attribute refused: nothing was computed.";

static const char transform_doc[] =
    "transform($module, " CALL_ARGUMENTS(NAME) BLOCK_ARGUMENTS(NAME) "/)\n--\n\n"
    "A layer of a Transformer: forward() without weights, between a residual connection and a norm, then the\n"
    "feed-forward network between others. Without linear1 and linear2, it ends after the first norm.\n\n"
    "A norm is a tuple (weight, bias, eps, is_rms). With zeroes_padding, rows that key_padding_mask hides are 0.\n"
    "An exception that the checks raise has the attribute refused: nothing was computed.";

static const char linear_map_doc[] =
    "linear($module, weights, input, /)\n--\n\n"
    "The rows of the input times a Linear: a new C-contiguous array.";

static const char activate_doc[] =
    "activate($module, input, activation, is_gated, /)\n--\n\n"
    "The activation of each number: \"relu\", \"gelu\", \"gelu_tanh\", \"silu\" or \"quick_gelu\". If it is gated,\n"
    "that of the first half of each row, times the second half.";

static const char project_doc[] =
    "project($module, weights, input, x, batch_first, /)\n--\n\n"
    "The projection of one input, \"query\", \"key\" or \"value\": (N, length, features), or (length, features).";

static const char scores_doc[] =
    "scores($module, " CALL_ARGUMENTS(NAME) "/)\n--\n\n"
    "The arguments of forward() that ask for the weights of each head; the scores after the masks in their place.";

static const char attend_doc[] =
    "attend($module, " CALL_ARGUMENTS(NAME) "paths, /)\n--\n\n"
    "The heads' results side by side, (N, L, H * Dv) or (L, H * Dv), and the weights where forward() returns them.\n\n"
    "paths is what takes_few_queries() says, if need be of another layer.";

static const char takes_few_queries_doc[] =
    "takes_few_queries($module, " CALL_ARGUMENTS(NAME) "/)\n--\n\n"
    "(N,) booleans: whether forward() treats a batch item without projecting its keys. Makes the checks of forward().";

static const char sample_doc[] =
    "sample($module, arrays, /)\n--\n\n"
    "Up to 64 numbers of each array of a tuple as bytes, the first and the last among them: other bytes tell that\n"
    "they changed.";

static const char set_num_threads_doc[] =
    "set_num_threads($module, n, /)\n--\n\n"
    "Sets the number of threads of this process; RuntimeError unless n is at least 1.";

static const char get_num_threads_doc[] =
    "get_num_threads($module, /)\n--\n\n"
    "The number of threads that a large call may use here.";

static const char config_doc[] =
    "config($module, /)\n--\n\n"
    "What was built, and what this process uses of it.\n\n"
    "cpu_level: str, cpu_levels: list of str (best first), threads: int, usable_cpus: int, compiler: str, numpy: str\n"
    "(the version that the extension was built against).";

#undef NAME

#endif
