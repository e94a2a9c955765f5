/* SPDX-License-Identifier: Apache-2.0
 *
 * philox.h - the counter-based random generator of dropout: Philox4x32-10, from Salmon, Moraes, Dror and Shaw,
 * "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
 *
 * A block of four random words depends on the key and the counter alone. So the stream does not depend on threads, on
 * the order of tasks or on the path of a call. The counter of probability (n, h, l, s) is (n, h, l, s / 4), and its
 * word is s % 4: one block serves four keys.
 */
#ifndef MHA_PHILOX_H
#define MHA_PHILOX_H

#include <stdint.h>

typedef struct {
    uint32_t word[4];
} mha_philox_block;

/* The words of the counter are taken modulo 2^32. */
static inline mha_philox_block mha_philox(const uint32_t key[2], uint64_t w0, uint64_t w1, uint64_t w2, uint64_t w3)
{
    uint32_t c0 = (uint32_t)w0, c1 = (uint32_t)w1, c2 = (uint32_t)w2, c3 = (uint32_t)w3;
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (mha_philox_block){{c0, c1, c2, c3}};
}

/* The key of a call's stream. It is a block of the generator with the seed as its key. */
static inline void mha_dropout_key(uint64_t seed, uint64_t call, uint32_t key[2])
{
    const uint32_t seed_words[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    const mha_philox_block block = mha_philox(seed_words, call, call >> 32, 0, 0);
    key[0] = block.word[0];
    key[1] = block.word[1];
}

#endif
