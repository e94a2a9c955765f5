/* SPDX-License-Identifier: Apache-2.0
 *
 * threads.h - the thread pool: a parallel loop over tasks.
 *
 * Owns: the worker threads of this process. They are created when they are first needed. They take part in one loop at
 * a time, and sleep between loops. A forked child starts with no workers. A worker does not stay on the CPU of its
 * caller if its affinity mask allows another one.
 */
#ifndef MHA_THREADS_H
#define MHA_THREADS_H

#include "base.h"

/* Runs one task. `worker` is less than the loop's `threads`. Two tasks with the same `worker` never run at the same
 * time. */
typedef void (*mha_task)(void *context, size_t task, size_t worker);

/* The parallel version of
 *
 *     for (size_t task = 0; task < tasks; task++) run(context, task, 0);
 *
 * Tasks are handed out in that order to at most `threads` threads. The caller is one of them, worker 0. The loop runs
 * serially in the caller if `threads` or `tasks` is 1, if the pool is busy with the loop of another caller, if a task
 * calls it, or if no worker can be started. So it waits for nothing but its own tasks.
 *
 * Returns MHA_STOPPED if stop.should_stop() returned true; tasks that were not handed out yet are then not run.
 * Otherwise it returns MHA_OK. In both cases no task is running any more. A loop whose stop is `with_task` belongs to
 * the task that calls it, and stops with that task.
 *
 * Tasks must not fork. should_stop() may. If the loop had workers, it then returns MHA_STOPPED in the child, because
 * the workers and their tasks do not exist there. */
mha_status mha_parallel_for(size_t threads, size_t tasks, mha_task run, void *context, mha_stop stop);

/* For a task that takes long: whether it has to return because the loop is to be stopped. In the caller's own tasks
 * this asks should_stop(). */
bool mha_is_stopped(void);

#endif
