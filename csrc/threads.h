/* SPDX-License-Identifier: Apache-2.0
 *
 * threads.h - the pool: one parallel loop over tasks.
 *
 * Owns: the worker threads of this process. They are created when first needed, take part in one loop at a time and
 * sleep in between; a forked child starts with none. Within their affinity mask they leave a caller its CPU.
 */
#ifndef MHA_THREADS_H
#define MHA_THREADS_H

#include "mha.h"

/* Runs one task; `worker` is below the loop's `threads`, and no two tasks run at once under the same number. */
typedef void (*mha_task)(void *context, size_t task, size_t worker);

/* The parallel version of
 *
 *     for (size_t task = 0; task < tasks; task++) run(context, task, 0);
 *
 * Tasks are handed out in that order to at most `threads` threads, of which the caller is one (worker 0). It runs
 * serially in the caller when threads or tasks is 1, when the pool is busy with another caller's loop, when it is
 * called from inside a task, or when no worker can be started: so it never waits for anything but its own tasks.
 * Returns MHA_STOPPED when stop.should_stop() answered true (tasks not yet handed out are then not run), else MHA_OK;
 * in both cases no task is running any more. A loop whose stop is `with_task` belongs to the task that calls it, and is
 * stopped with that. Tasks must not fork; should_stop() may, and in that child a loop that had workers returns
 * MHA_STOPPED, because they and their tasks are gone.
 */
mha_status mha_parallel_for(size_t threads, size_t tasks, mha_task run, void *context, mha_stop stop);

/* For a task that takes long, now and then: whether to return at once, since the loop is to be stopped. The caller's own
 * tasks ask should_stop() by it. */
bool mha_is_stopped(void);

/* The CPUs this process may use: min(affinity mask, cgroup quota rounded up), at least 1. Asks the system each time. */
size_t mha_usable_cpus(void);

#endif
