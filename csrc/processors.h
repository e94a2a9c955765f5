/* SPDX-License-Identifier: Apache-2.0
 *
 * processors.h - the CPUs of this process.
 */
#ifndef MHA_PROCESSORS_H
#define MHA_PROCESSORS_H

#include <stddef.h>

/* The number of CPUs that this process may use: the smaller of its affinity mask and its cgroup quota, rounded up, at
 * least 1. Asks the system each time. */
size_t mha_usable_cpus(void);

/* The CPU on which this thread runs; -1: unknown. */
int mha_current_cpu(void);

/* Moves this thread to another CPU if it is on `cpu`. -1 stands for no CPU.
 *
 * If all CPUs were busy a moment ago, Linux may wake a thread on the CPU of the thread that woke it, although another
 * CPU is idle, and may leave both there for tens of milliseconds. Meanwhile the two threads share one CPU, and each
 * waits for the other. */
void mha_leave_cpu(int cpu);

#endif
