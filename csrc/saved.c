/* SPDX-License-Identifier: Apache-2.0
 *
 * saved.c - copies rows of results, and puts them back.
 *
 * Owns: the copies.
 */
#include "saved.h"

#include <string.h>

#include "layer.h"
#include "workspace.h"

static size_t bytes_of_query(const mha_saved *saved)
{
    size_t bytes = 0;
    for (size_t i = 0; i < sizeof saved->results / sizeof *saved->results; i++)
        bytes += saved->results[i].heads * saved->results[i].bytes;
    return bytes;
}

mha_status mha_make_room(mha_saved *saved, const mha_layer *layer, const mha_call *call, size_t queries)
{
    const mha_widths *w = &layer->widths;
    const size_t size = layer->kernels->size, heads = call->wanted == MHA_WANT_AVERAGES ? 1 : w->H;
    const size_t keys = call->S + mha_extra_keys(layer, call);
    mha_plan plan;
    mha_begin_plan(&plan);
    saved->results[0].rows = call->output;
    saved->results[0].heads = 1;
    saved->results[0].bytes = call->output.data ? w->Eo * size : 0;
    saved->results[1].rows = call->context;
    saved->results[1].heads = 1;
    saved->results[1].bytes = call->context.data ? w->H * w->Dv * size : 0;
    saved->results[2].rows = mha_contiguous_rows(call->attn_weights, layer->kernels->dtype, heads, call->L, keys);
    saved->results[2].heads = heads;
    saved->results[2].bytes = call->wanted ? keys * size : 0;
    mha_place(&plan, &saved->query, queries, 1, sizeof *saved->query);
    mha_place(&plan, &saved->copies, queries, bytes_of_query(saved), 1);
    return mha_allocate(&plan, &saved->memory);
}

/* Copies the results of a query between the call and its place among the copies. */
static void copy_results(const mha_saved *saved, size_t place, bool is_back)
{
    const size_t n = saved->query[place][0], l = saved->query[place][1];
    char *copy = saved->copies + place * bytes_of_query(saved);
    for (size_t i = 0; i < sizeof saved->results / sizeof *saved->results; i++)
        for (size_t h = 0; h < saved->results[i].heads && saved->results[i].bytes > 0; h++) {
            char *row = mha_row_at(&saved->results[i].rows, n, h, l);
            memcpy(is_back ? row : copy, is_back ? copy : row, saved->results[i].bytes);
            copy += saved->results[i].bytes;
        }
}

void mha_save_results(mha_saved *saved, size_t n, size_t l)
{
    saved->query[saved->queries][0] = n;
    saved->query[saved->queries][1] = l;
    copy_results(saved, saved->queries++, false);
}

void mha_put_back(const mha_saved *saved)
{
    for (size_t place = 0; place < saved->queries; place++)
        copy_results(saved, place, true);
}
