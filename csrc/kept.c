/* SPDX-License-Identifier: Apache-2.0
 *
 * kept.c - copies rows of results, and puts them back.
 *
 * Owns: the copies.
 */
#include "kept.h"

#include <string.h>

#include "layer.h"
#include "workspace.h"

static size_t bytes_of_query(const mha_kept *kept)
{
    size_t bytes = 0;
    for (size_t i = 0; i < sizeof kept->results / sizeof *kept->results; i++)
        bytes += kept->results[i].heads * kept->results[i].bytes;
    return bytes;
}

mha_status mha_make_room(mha_kept *kept, const mha_layer *layer, const mha_call *call, size_t queries)
{
    const mha_widths *w = &layer->widths;
    const size_t size = layer->kernels->size, heads = call->wanted == MHA_WANT_AVERAGES ? 1 : w->H;
    const size_t keys = call->S + mha_extra_keys(layer, call);
    mha_plan plan;
    mha_begin_plan(&plan);
    kept->results[0].rows = call->output;
    kept->results[0].heads = 1;
    kept->results[0].bytes = call->output.data ? w->Eo * size : 0;
    kept->results[1].rows = call->context;
    kept->results[1].heads = 1;
    kept->results[1].bytes = call->context.data ? w->H * w->Dv * size : 0;
    kept->results[2].rows = mha_contiguous_rows(call->attn_weights, layer->kernels->dtype, heads, call->L, keys);
    kept->results[2].heads = heads;
    kept->results[2].bytes = call->wanted ? keys * size : 0;
    mha_place(&plan, &kept->query, queries, 1, sizeof *kept->query);
    mha_place(&plan, &kept->copies, queries, bytes_of_query(kept), 1);
    return mha_allocate(&plan, &kept->memory);
}

/* Copies the results of a query between the call and its place among the copies. */
static void copy_results(const mha_kept *kept, size_t place, bool is_back)
{
    const size_t n = kept->query[place][0], l = kept->query[place][1];
    char *copy = kept->copies + place * bytes_of_query(kept);
    for (size_t i = 0; i < sizeof kept->results / sizeof *kept->results; i++)
        for (size_t h = 0; h < kept->results[i].heads && kept->results[i].bytes > 0; h++) {
            char *row = mha_row_at(&kept->results[i].rows, n, h, l);
            memcpy(is_back ? row : copy, is_back ? copy : row, kept->results[i].bytes);
            copy += kept->results[i].bytes;
        }
}

void mha_keep_results(mha_kept *kept, size_t n, size_t l)
{
    kept->query[kept->queries][0] = n;
    kept->query[kept->queries][1] = l;
    copy_results(kept, kept->queries++, false);
}

void mha_put_back(const mha_kept *kept)
{
    for (size_t place = 0; place < kept->queries; place++)
        copy_results(kept, place, true);
}
