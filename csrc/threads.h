/* SPDX-License-Identifier: Apache-2.0
 *
 * threads.h - the thread pool: a parallel loop over tasks.
 *
 * Owns: the worker threads of this process. They are created when they are first needed. They take part in one loop at
 * a time, and sleep between loops. A forked child starts with no workers. A worker does not stay on the CPU of its
 * caller if its affinity mask allows another one and there is a CPU for each thread.
 */
#ifndef MHA_THREADS_H
#define MHA_THREADS_H

#include "base.h"

/* More threads than this do not help on any machine. Each of them has a share of the workspace. */
enum { MHA_MAX_THREADS = 1024 };

/* Who runs the loops of a call, and the memory of each thread. */
typedef struct {
    size_t threads; /* at least 1 */
    mha_stop stop;
    bool in_task;   /* a task of another loop makes this call: its loops run in that task's thread, and stop with it */
    char *scratch;  /* scratch_bytes for each thread */
    size_t scratch_bytes;
} mha_team;

static inline char *mha_scratch_of(const mha_team *team, size_t worker)
{
    return team->scratch + worker * team->scratch_bytes;
}

/* Runs one task. `worker` is less than team->threads. Two tasks with the same `worker` never run at the same
 * time. */
typedef void (*mha_task)(void *context, size_t task, size_t worker);

/* The parallel version of
 *
 *     for (size_t task = 0; task < tasks; task++) run(context, task, 0);
 *
 * Tasks are handed out in that order to at most team->threads threads. The caller is one of them, worker 0. The loop
 * runs serially in the caller if there is one thread or one task, if the pool is busy with the loop of another caller,
 * if a task calls it, or if no worker can be started. So it waits for nothing but its own tasks.
 *
 * Returns MHA_STOPPED if should_stop() returned true; tasks that were not handed out yet are then not run. Otherwise it
 * returns MHA_OK. In both cases no task is running any more.
 *
 * Tasks must not fork. should_stop() may. If the loop had workers, it then returns MHA_STOPPED in the child, because
 * the workers and their tasks do not exist there. */
mha_status mha_parallel_for(const mha_team *team, size_t tasks, mha_task run, void *context);

/* For a task that takes long: whether it has to return because the loop is to be stopped. In the caller's own tasks
 * this asks should_stop(). */
bool mha_is_stopped(void);

#endif
