/* SPDX-License-Identifier: Apache-2.0
 *
 * cpu.c - which kernels this process runs: what the CPU has, what the operating system saves, what the user asked for.
 *
 * Owns: the list of levels, and the choice, which is made once. An instruction set counts only if the operating system
 * also saves its registers (XGETBV).
 */
#include "cpu.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP /* Linux 4.15 */
#define HWCAP_ASIMDDP (1 << 20)
#endif
#endif

enum { AVX2 = 1, AVX512 = 2, AVX512_VNNI = 4, AVX512_BF16 = 8, NEON = 16, NEON_DOTPROD = 32 };

typedef struct {
    const char *name;
    const mha_kernels *kernels;
    const mha_narrow_kernels *narrow[2]; /* by mha_narrow_type */
    unsigned needs;
} level;

/* Best first. */
static const level levels[] = {
#ifdef MHA_KNOWS_AVX512_BF16
    {"avx512_bf16", mha_kernels_avx512, {&mha_int8_avx512_vnni, &mha_bf16_avx512_bf16},
     AVX512 | AVX512_VNNI | AVX512_BF16},
#endif
#if defined(__x86_64__)
    {"avx512_vnni", mha_kernels_avx512, {&mha_int8_avx512_vnni, &mha_bf16_avx512}, AVX512 | AVX512_VNNI},
    {"avx512", mha_kernels_avx512, {&mha_int8_avx512, &mha_bf16_avx512}, AVX512},
    {"avx2", mha_kernels_avx2, {&mha_int8_avx2, &mha_bf16_avx2}, AVX2},
#endif
#if defined(__aarch64__)
    {"neon_dotprod", mha_kernels_neon, {&mha_int8_neon_dotprod, &mha_bf16_neon}, NEON | NEON_DOTPROD},
    {"neon", mha_kernels_neon, {&mha_int8_neon, &mha_bf16_neon}, NEON},
#endif
    {"portable", mha_kernels_portable, {&mha_int8_portable, &mha_bf16_portable}, 0},
};
enum { LEVELS = sizeof levels / sizeof *levels };

static const level *supported[LEVELS]; /* best first */
static size_t supported_count;
static const level *chosen; /* NULL: `refusal` says why */
static char refusal[256];

#if defined(__x86_64__)

/* Whether all bits of `mask` are set. */
static bool has(unsigned bits, unsigned mask)
{
    return (bits & mask) == mask;
}

static unsigned detect(void)
{
    /* Registers that the system saves: XMM 0x02, YMM 0x04, opmask 0x20, upper halves of ZMM 0x40, ZMM16-31 0x80. macOS
     * reports the last three only after their first use, so AVX-512 stays off there. */
    const unsigned ymm_state = 0x06, zmm_state = 0xe6;
    const unsigned avx512 = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
    unsigned eax, ebx, ecx, edx, saved, saved_high;

    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !has(ecx, bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C))
        return 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !has(ebx, bit_AVX2))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(saved_high) : "c"(0));
    if (!has(saved, ymm_state))
        return 0;
    if (!has(ebx, avx512) || !has(saved, zmm_state))
        return AVX2;
    const unsigned vnni = has(ecx, bit_AVX512VNNI) ? AVX512_VNNI : 0, bf16_bit = 1 << 5;
    const unsigned bf16 = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && has(eax, bf16_bit) ? AVX512_BF16 : 0;
    return AVX2 | AVX512 | vnni | bf16;
}

#elif defined(__aarch64__)

/* NEON is part of the architecture. Its dot products are not. */
static unsigned detect(void)
{
#ifdef __APPLE__
    int has_dotprod = 0;
    size_t size = sizeof has_dotprod;
    if (sysctlbyname("hw.optional.arm.FEAT_DotProd", &has_dotprod, &size, NULL, 0) != 0)
        has_dotprod = 0;
#else
    const bool has_dotprod = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
    return has_dotprod ? NEON | NEON_DOTPROD : NEON;
}

#else

static unsigned detect(void)
{
    return 0;
}

#endif

static const level *find_supported(const char *name)
{
    for (size_t i = 0; i < supported_count; i++)
        if (strcmp(supported[i]->name, name) == 0)
            return supported[i];
    return NULL;
}

static void choose(void)
{
    unsigned present = detect();
    for (size_t i = 0; i < LEVELS; i++)
        if ((levels[i].needs & ~present) == 0)
            supported[supported_count++] = &levels[i];

    const char *wanted = getenv("MHA_C_CPU");
    chosen = wanted == NULL || *wanted == '\0' ? supported[0] : find_supported(wanted);
    if (chosen == NULL) {
        size_t used = (size_t)snprintf(refusal, sizeof refusal, "MHA_C_CPU is '%.64s', but this build can run only",
                                       wanted);
        for (size_t i = 0; i < supported_count && used < sizeof refusal; i++)
            used += (size_t)snprintf(refusal + used, sizeof refusal - used, "%s '%s'", i == 0 ? "" : ",",
                                     supported[i]->name);
        if (used < sizeof refusal)
            snprintf(refusal + used, sizeof refusal - used, " on this CPU");
    }
}

static void choose_once(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, choose);
}

bool mha_cpu_init(const char **reason)
{
    choose_once();
    if (chosen == NULL)
        *reason = refusal;
    return chosen != NULL;
}

const mha_kernels *mha_cpu_kernels(mha_dtype dtype)
{
    return &chosen->kernels[mha_computed_in(dtype)];
}

const mha_narrow_kernels *mha_cpu_narrow(mha_narrow_type type)
{
    return chosen->narrow[type];
}

const char *mha_cpu_name(void)
{
    return chosen->name;
}

const char *mha_cpu_supported(size_t i)
{
    choose_once();
    return i < supported_count ? supported[i]->name : NULL;
}

const mha_kernels *mha_cpu_kernels_named(const char *name, mha_dtype dtype)
{
    choose_once();
    const level *found = find_supported(name);
    return found != NULL ? &found->kernels[mha_computed_in(dtype)] : NULL;
}

const mha_narrow_kernels *mha_cpu_narrow_named(const char *name, mha_narrow_type type)
{
    choose_once();
    const level *found = find_supported(name);
    return found != NULL ? found->narrow[type] : NULL;
}
