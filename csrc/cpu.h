/* SPDX-License-Identifier: Apache-2.0
 *
 * cpu.h - which kernels this process runs.
 */
#ifndef MHA_CPU_H
#define MHA_CPU_H

#include <stddef.h>

#include "kernels/kernels.h"

/* Chooses the kernels once: the best level that CPU and operating system support, or the level that the environment
 * variable MHA_C_CPU names. If this build or this CPU does not have that level, returns false and sets *reason to a
 * sentence in static storage. Later calls repeat the first answer. */
bool mha_cpu_init(const char **reason);

/* The chosen table. mha_cpu_init() must have returned true. */
const mha_kernels *mha_cpu_kernels(mha_dtype dtype);

/* The chosen kernels of narrow products. */
const mha_narrow_kernels *mha_cpu_narrow(mha_narrow_type type);

/* The name of the chosen level. */
const char *mha_cpu_name(void);

/* The name of level i of those that this CPU can run, best first. NULL past the last. */
const char *mha_cpu_supported(size_t i);

/* The tables of a supported level by its name, for tests. NULL if there is none. */
const mha_kernels *mha_cpu_kernels_named(const char *name, mha_dtype dtype);
const mha_narrow_kernels *mha_cpu_narrow_named(const char *name, mha_narrow_type type);

#endif
