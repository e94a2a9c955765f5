/* SPDX-License-Identifier: Apache-2.0
 *
 * rowwise.h - steps that take each row by itself: copies, residual connections, norms, activations.
 */
#ifndef MHA_ROWWISE_H
#define MHA_ROWWISE_H

#include "threads.h"
#include "walk.h"

/* Copies `width` numbers of each head from the rows of x to those of y. */
typedef struct {
    const mha_walk *walk;
    const mha_rows *x, *y;
    size_t heads, width;
} mha_copied_rows;

mha_status mha_copy_rows(const mha_copied_rows *copied, const mha_team *team);

/* sum = x + added, then y = norm(sum), for the rows of a walk. Their features are adjacent. */
typedef struct {
    const mha_kernels *kernels;
    const mha_walk *walk;
    size_t width;
    const mha_rows *x, *added; /* added NULL: y = norm(x) */
    const mha_rows *sum;       /* may be x or added; not used if added is NULL */
    const mha_norm *norm;
    const mha_rows *y; /* may be sum; NULL: no norm */
} mha_residual;

mha_status mha_add_and_normalize(const mha_residual *residual, const mha_team *team);

/* The first `width` numbers of each row of x are activated, and written to y. If there are 2 * width of them, they are
 * multiplied by the others. Distances between rows are in bytes. y may be x, with the same distance. */
typedef struct {
    const mha_kernels *kernels;
    mha_activation activation;
    bool is_gated;
    size_t rows, width;
    const char *x;
    size_t x_distance;
    char *y;
    size_t y_distance;
} mha_activated_rows;

mha_status mha_activate_rows(const mha_activated_rows *activated, const mha_team *team);

#endif
