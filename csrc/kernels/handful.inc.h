/* SPDX-License-Identifier: Apache-2.0
 *
 * handful.inc.h - attention of a handful of tokens in one call (kernels.inc.h includes it).
 */

/* c[r][lane] = sum over k of a[r * a_row + k * a_k] * b[k][lane]: the tile without what a product of any size needs. */
INLINE void V(small_product)(const REAL *a, ptrdiff_t a_row, ptrdiff_t a_k, size_t rows, const REAL *b, size_t depth,
                             REAL *c)
{
    const mha_product p = {.depth = depth, .a_row = a_row, .a_k = a_k, .b = b, .b_k = LANES, .c_row = LANES};
    V(progress) at = {.a = a, .c = c};
    for (size_t eights = rows / 8; eights > 0; eights--)
        V(tile)(8, 1, 1, OWN, &p, &at);
    if (rows & 4)
        V(tile)(4, 1, 1, OWN, &p, &at);
    if (rows & 2)
        V(tile)(2, 1, 1, OWN, &p, &at);
    if (rows & 1)
        V(tile)(1, 1, 1, OWN, &p, &at);
}

/* Some queries, at most a vector of them. */
INLINE void V(attend_vector)(const mha_handful *h, const REAL *q, size_t queries, REAL *context)
{
    REAL panel[MHA_HANDFUL * LANES], scores[MHA_HANDFUL * LANES], sums[MHA_HANDFUL * LANES];
    REAL sum[LANES], inverse[LANES];
    const size_t q_row = (size_t)h->q_row, context_row = (size_t)h->context_row;
    if (h->D < LANES)
        V(pack_features)(q, q_row, queries, 0, h->D, (REAL)h->scale, panel, LANES);
    else
        V(pack_panel)(q, q_row, queries, h->D, h->scale, panel, 1);
    V(small_product)(h->k, h->k_row, 1, h->keys, panel, h->D, scores);
    const VEC maximum = V(largest)(scores, h->keys, LANES, V(splat)(V(LOWEST)));
    V(store)(sum, V(sum_of_exps)(scores, h->keys, LANES, maximum, scores));
    V(softmax_end)(sum, inverse, 1, h->empty_row);
    V(small_product)(h->v, 1, h->v_row, h->Dv, scores, h->keys, sums);
    if (h->Dv < LANES)
        V(unpack_features)(sums, LANES, inverse, queries, 0, h->Dv, context, context_row);
    else
        V(unpack_panel)(sums, 1, inverse, queries, h->Dv, context, context_row);
}

static void V(attend_handful)(const mha_handful *h)
{
    for (size_t first = 0; first < h->queries; first += LANES) {
        const size_t queries = h->queries - first < LANES ? h->queries - first : LANES;
        V(attend_vector)(h, (const REAL *)h->q + (ptrdiff_t)first * h->q_row, queries,
                         (REAL *)h->context + (ptrdiff_t)first * h->context_row);
    }
}
