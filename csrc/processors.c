/* SPDX-License-Identifier: Apache-2.0
 *
 * processors.c - the CPUs of this process, by its affinity mask and its cgroups.
 *
 * Owns: nothing; it asks the system each time.
 */
#include "processors.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__linux__)

#include <sched.h>

enum { CPU_SETS = 8 }; /* for 8192 CPUs, the most that Linux can be built for */

int mha_current_cpu(void)
{
    return sched_getcpu();
}

void mha_leave_cpu(int cpu)
{
    cpu_set_t allowed[CPU_SETS], others[CPU_SETS];
    if (cpu < 0 || sched_getcpu() != cpu || sched_getaffinity(0, sizeof allowed, allowed) != 0)
        return;
    memcpy(others, allowed, sizeof others);
    CPU_CLR_S((size_t)cpu, sizeof others, others);
    /* the thread moves at once; the call fails if there is no other CPU */
    if (sched_setaffinity(0, sizeof others, others) == 0)
        (void)sched_setaffinity(0, sizeof allowed, allowed);
}

static bool read_line(const char *directory, const char *name, char *line, int size)
{
    char path[4096 + 64];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "re");
    bool read = file != NULL && fgets(line, size, file) != NULL;
    if (file != NULL)
        fclose(file);
    return read;
}

/* The quota of one cgroup in CPUs, rounded up. SIZE_MAX if it has none. Version 2 writes "quota period" or "max period"
 * to one file. Version 1 has two files and a quota of -1. */
static size_t quota_of(const char *directory)
{
    char first[64], second[64], *rest;
    long long quota = 0, period = 0;
    if (read_line(directory, "cpu.max", first, sizeof first)) {
        quota = strtoll(first, &rest, 10);
        period = strtoll(rest, NULL, 10);
    } else if (read_line(directory, "cpu.cfs_quota_us", first, sizeof first) &&
               read_line(directory, "cpu.cfs_period_us", second, sizeof second)) {
        quota = strtoll(first, NULL, 10);
        period = strtoll(second, NULL, 10);
    }
    return quota > 0 && period > 0 ? (size_t)((quota - 1) / period + 1) : SIZE_MAX;
}

/* Whether `name` is in a comma-separated list. */
static bool lists(const char *list, const char *name)
{
    size_t length = strlen(name);
    for (; list != NULL; list = strchr(list, ',')) {
        list += *list == ',';
        if (strncmp(list, name, length) == 0 && (list[length] == ',' || list[length] == '\0'))
            return true;
    }
    return false;
}

/* The smallest quota among the cgroups of this process and their parents. The path that the system reports may begin
 * outside the container. Then only the root of it exists here, and the root is the right one. */
static size_t cgroup_quota(void)
{
    size_t min_quota = SIZE_MAX;
    char line[4096], directory[4096 + 32];
    FILE *file = fopen("/proc/self/cgroup", "re");
    while (file != NULL && fgets(line, sizeof line, file) != NULL) { /* number:controllers:path */
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *path = controllers != NULL ? strchr(controllers + 1, ':') : NULL;
        if (path == NULL)
            continue;
        *controllers++ = '\0';
        *path++ = '\0';
        bool version_2 = *controllers == '\0';
        if (!version_2 && !lists(controllers, "cpu"))
            continue;
        for (char *end = path + strlen(path); end != NULL; end = strrchr(path, '/')) {
            *end = '\0';
            snprintf(directory, sizeof directory, "/sys/fs/cgroup%s%s", version_2 ? "" : "/cpu", path);
            size_t quota = quota_of(directory);
            min_quota = quota < min_quota ? quota : min_quota;
        }
    }
    if (file != NULL)
        fclose(file);
    return min_quota;
}

size_t mha_usable_cpus(void)
{
    cpu_set_t allowed[CPU_SETS];
    size_t cpus = 0;
    if (sched_getaffinity(0, sizeof allowed, allowed) == 0)
        cpus = (size_t)CPU_COUNT_S(sizeof allowed, allowed);
    size_t quota = cgroup_quota();
    cpus = quota < cpus ? quota : cpus;
    return cpus > 1 ? cpus : 1;
}

#else

int mha_current_cpu(void)
{
    return -1;
}

void mha_leave_cpu(int cpu)
{
    (void)cpu;
}

size_t mha_usable_cpus(void)
{
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    return cpus > 1 ? (size_t)cpus : 1;
}

#endif
