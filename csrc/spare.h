/* SPDX-License-Identifier: Apache-2.0
 *
 * spare.h - the workspace of a call, which is kept for the next call.
 */
#ifndef MHA_SPARE_H
#define MHA_SPARE_H

#include "workspace.h"

/* Takes the workspace of a call, uninitialised, and sets the pointers: what an earlier call left, if it is large
 * enough, or fresh memory. It is given back for the next call. Meanwhile the system may take back most of a very large
 * one. */
mha_status mha_take_workspace(const mha_plan *plan, char **workspace);
void mha_give_workspace(char *workspace); /* NULL is allowed */
void mha_free_spare(void);                /* frees the workspaces that were kept */

#endif
