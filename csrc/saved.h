/* SPDX-License-Identifier: Apache-2.0
 *
 * saved.h - copies of the results of some queries. Another pass overwrites all results of their items. Then the copies
 * are put back.
 */
#ifndef MHA_SAVED_H
#define MHA_SAVED_H

#include "mha.h"

/* Initialise with zeros. Release `memory` with mha_release(), also after an error. */
typedef struct {
    struct {
        mha_rows rows; /* of the call */
        size_t heads;
        size_t bytes; /* of a row; 0: not wanted */
    } results[3];     /* output, context, probabilities */
    size_t queries;
    size_t (*query)[2]; /* [queries]: an item's index, and the query's */
    char *copies;
    char *memory;
} mha_saved;

/* Makes room for the results of some queries. */
mha_status mha_make_room(mha_saved *saved, const mha_layer *layer, const mha_call *call, size_t queries);

/* Copies the results of one more query. */
void mha_save_results(mha_saved *saved, size_t n, size_t l);

/* Writes them where they came from. */
void mha_put_back(const mha_saved *saved);

#endif
