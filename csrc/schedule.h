/* SPDX-License-Identifier: Apache-2.0
 *
 * schedule.h - which items go through the steps of a pass together: all of them, or chunks.
 */
#ifndef MHA_SCHEDULE_H
#define MHA_SCHEDULE_H

#include "batch.h"
#include "threads.h"
#include "workspace.h"

/* The steps of a pass. plan() describes a pass over some items in `pass`, which has MHA_MAX_PASS bytes, and plans its
 * workspace. run() runs it when there is one. `context` and the batch stay where they are meanwhile. */
typedef struct {
    void (*plan)(void *pass, const void *context, const mha_batch *batch, const mha_team *team, mha_plan *plan);
    mha_status (*run)(void *pass);
} mha_steps;

enum { MHA_MAX_PASS = 4096 };

/* Runs the steps for all items together, with as many threads as the team has. */
mha_status mha_run_at_once(const mha_steps *steps, const void *context, const mha_batch *batch, const mha_team *team);

/* Runs the steps for all items together, or for chunks of them, each in one thread. An item has up to `rows` queries or
 * keys. */
mha_status mha_run_scheduled(const mha_steps *steps, const void *context, const mha_batch *batch, size_t rows,
                             const mha_team *team);

#endif
