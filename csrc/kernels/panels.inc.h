/* SPDX-License-Identifier: Apache-2.0
 *
 * panels.inc.h - rows to panels and back (kernels.inc.h includes it).
 */

/* v[i] = row i of a square, times scale. Rows from `count` on are 0. */
INLINE void V(load_square)(const REAL *rows, size_t row_stride, size_t count, VEC scale, VEC v[])
{
    if (count >= LANES) {
        MHA_UNROLL
        for (size_t i = 0; i < LANES; i++)
            v[i] = V(load)(rows + i * row_stride) * scale;
        return;
    }
    MHA_UNROLL
    for (size_t i = 0; i < LANES; i++) {
        v[i] = V(splat)(0);
        if (i < count)
            v[i] = V(load)(rows + i * row_stride) * scale;
    }
}

/* Whole squares are not inlined: they need more registers than the few numbers of a narrow head. */
NOINLINE void V(pack_squares)(const REAL *rows, size_t row_stride, size_t count, size_t width, VEC scale, REAL *panel,
                              size_t P)
{
    for (size_t d = 0; d < width; d += LANES) {
        VEC v[LANES];
        V(load_square)(rows + d, row_stride, count, scale, v);
        V(transpose)(v);
        MHA_UNROLL
        for (size_t i = 0; i < LANES; i++)
            V(store)(panel + (d + i) * P, v[i]);
    }
}

/* panel[d][i] = rows[i][d] * scale for features `first` to `width`, number by number. */
INLINE void V(pack_features)(const REAL *rows, size_t row_stride, size_t count, size_t first, size_t width, REAL scale,
                             REAL *panel, size_t P)
{
    for (size_t d = first; d < width; d++) {
        const REAL *from = rows + d;
        REAL *to = panel + d * P;
        V(store)(to, V(splat)(0));
        for (size_t i = 0; i < count; i++, from += row_stride)
            to[i] = *from * scale;
    }
}

static void V(pack_panel)(const void *rows_, size_t row_stride, size_t count, size_t width, double scale_, void *panel_,
                          size_t vectors)
{
    const REAL scale = (REAL)scale_;
    const size_t P = vectors * LANES, whole = width / LANES * LANES;
    for (size_t lane = 0; lane < P; lane += LANES) {
        const size_t used = count <= lane ? 0 : count - lane < LANES ? count - lane : LANES;
        const REAL *rows = (const REAL *)rows_ + lane * row_stride;
        REAL *panel = (REAL *)panel_ + lane;
        if (whole > 0)
            V(pack_squares)(rows, row_stride, used, whole, V(splat)(scale), panel, P);
        V(pack_features)(rows, row_stride, used, whole, width, scale, panel, P);
    }
}

NOINLINE void V(unpack_squares)(const REAL *panel, size_t P, VEC factor, size_t count, size_t width, REAL *rows,
                                size_t row_stride)
{
    for (size_t d = 0; d < width; d += LANES) {
        VEC v[LANES];
        V(load_square)(panel + d * P, P, LANES, factor, v);
        V(transpose)(v);
        MHA_UNROLL
        for (size_t i = 0; i < LANES; i++)
            if (i < count)
                V(store)(rows + i * row_stride + d, v[i]);
    }
}

/* rows[i][d] = panel[d][i] * factor[i] for features `first` to `width`, number by number. */
INLINE void V(unpack_features)(const REAL *panel, size_t P, const REAL *factor, size_t count, size_t first,
                               size_t width, REAL *rows, size_t row_stride)
{
    for (size_t d = first; d < width; d++) {
        const REAL *from = panel + d * P;
        REAL *to = rows + d;
        for (size_t i = 0; i < count; i++, to += row_stride)
            *to = from[i] * factor[i];
    }
}

static void V(unpack_panel)(const void *panel_, size_t vectors, const void *factor_, size_t count, size_t width,
                            void *rows_, size_t row_stride)
{
    const size_t P = vectors * LANES, whole = width / LANES * LANES;
    for (size_t lane = 0; lane < count; lane += LANES) {
        const size_t used = count - lane < LANES ? count - lane : LANES;
        const REAL *panel = (const REAL *)panel_ + lane, *factor = (const REAL *)factor_ + lane;
        REAL *rows = (REAL *)rows_ + lane * row_stride;
        if (whole > 0)
            V(unpack_squares)(panel, P, V(load)(factor), used, whole, rows, row_stride);
        V(unpack_features)(panel, P, factor, used, whole, width, rows, row_stride);
    }
}
