/* SPDX-License-Identifier: Apache-2.0
 *
 * guarded.h - buffers that touch a page nobody may access, so that one byte too far is a crash.
 *
 *      AT_END    | no access | ... canaries ... data | no access |
 *      AT_START  | no access | data ... canaries ... | no access |
 *
 * Owns: a few slots, each mapped once and used by one buffer at a time. Canaries are bytes 0xff: a float or a double of
 * them is NaN, so that what is wrongly read shows, too.
 */
#ifndef MHA_TESTS_GUARDED_H
#define MHA_TESTS_GUARDED_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { GUARDED_SLOTS = 16, GUARDED_BYTES = 1 << 21, CANARY = 0xff, CANARIES = 1024 };

typedef enum { AT_END = 0, AT_START } guarded_side;

typedef struct {
    unsigned char *first, *end; /* of what may be accessed */
    unsigned char *data;
    size_t bytes;
} guarded;

static guarded guarded_slots[GUARDED_SLOTS];

static inline void guarded_map(guarded *g)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), room = GUARDED_BYTES / page * page + page;
    unsigned char *pages = mmap(NULL, room + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages + page, room, PROT_READ | PROT_WRITE) != 0) {
        perror("guarded memory");
        exit(2);
    }
    *g = (guarded){.first = pages + page, .end = pages + page + room};
}

/* A fresh buffer of `bytes` bytes, all canaries, in place of the slot's last one. */
static inline void *guarded_buffer(size_t slot, size_t bytes, guarded_side side)
{
    guarded *g = &guarded_slots[slot];
    if (!g->first)
        guarded_map(g);
    if (bytes > GUARDED_BYTES) {
        fprintf(stderr, "a buffer of %zu bytes is too large for a test\n", bytes);
        exit(2);
    }
    const size_t room = (size_t)(g->end - g->first), around = room - bytes < CANARIES ? room - bytes : CANARIES;
    g->bytes = bytes;
    g->data = side == AT_START ? g->first : g->end - bytes;
    memset(side == AT_START ? g->first : g->data - around, CANARY, bytes + around);
    return g->data;
}

static inline bool all_canaries(const unsigned char *bytes, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (bytes[i] != CANARY)
            return false;
    return true;
}

/* Nothing beside the slot's buffer was written. (On its other side any access would have crashed.) */
static inline bool guarded_intact(size_t slot)
{
    const guarded *g = &guarded_slots[slot];
    const size_t before = (size_t)(g->data - g->first), after = (size_t)(g->end - g->data) - g->bytes;
    const size_t around = before < CANARIES ? before : CANARIES, behind = after < CANARIES ? after : CANARIES;
    return all_canaries(g->data - around, around) && all_canaries(g->data + g->bytes, behind);
}

#endif
