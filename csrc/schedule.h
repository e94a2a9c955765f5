/* SPDX-License-Identifier: Apache-2.0
 *
 * schedule.h - which items go through the steps of a pass together: all of them, or chunks.
 */
#ifndef MHA_SCHEDULE_H
#define MHA_SCHEDULE_H

#include "pass.h"

/* The steps of a pass that is planned and has its workspace. */
typedef mha_status (*mha_steps)(mha_pass *pass);

/* Runs the steps for all items together, with as many threads as the team has. */
mha_status mha_run_at_once(mha_steps steps, const mha_passes *passes, const mha_batch *batch, const mha_team *team);

/* Runs the steps for all items together, or for chunks of them, each in one thread. An item has up to `rows` queries or
 * keys. */
mha_status mha_run_scheduled(mha_steps steps, const mha_passes *passes, const mha_batch *batch, size_t rows,
                             const mha_team *team);

#endif
