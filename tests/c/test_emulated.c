/* SPDX-License-Identifier: Apache-2.0
 *
 * test_emulated.c - emulated instructions of AVX-512 against their definitions in Intel's manual ("Intel 64 and IA-32
 * Architectures Software Developer's Manual", volume 2): those of products of int8 and of halves.
 *
 * The kernels' own tests hold the others to account.
 */
#include <immintrin.h>

#include "check.h"
#include "numbers.h"

enum { WORDS = 16, CASES = 1 << 14 };

/* The words of a vector. In a quarter of the cases, half of the bytes are the least and the largest there are. */
static void fill(uint32_t words[WORDS], uint64_t seed, uint64_t number)
{
    static const uint8_t extreme[] = {0, 0x7f, 0x80, 0xff};
    uint8_t bytes[4 * WORDS];
    for (uint64_t i = 0; i < sizeof bytes; i++) {
        const uint64_t word = random_word(seed, number * sizeof bytes + i);
        bytes[i] = number % 4 == 0 && word >> 32 & 1 ? extreme[word % 4] : (uint8_t)word;
    }
    memcpy(words, bytes, sizeof bytes);
}

static float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* ---- VPDPBUSD: unsigned bytes of a by signed bytes of b, four products to a sum, which wraps around ---- */

static void test_dpbusd(void)
{
    DESCRIBE("_mm512_dpbusd_epi32");
    for (uint64_t n = 0; n < CASES; n++) {
        uint32_t sums[WORDS], a[WORDS], b[WORDS], got[WORDS];
        fill(sums, 1, n);
        fill(a, 2, n);
        fill(b, 3, n);
        _mm512_storeu_si512(got, _mm512_dpbusd_epi32(_mm512_loadu_si512(sums), _mm512_loadu_si512(a),
                                                     _mm512_loadu_si512(b)));
        for (size_t i = 0; i < WORDS; i++) {
            uint32_t wanted = sums[i];
            for (unsigned bit = 0; bit < 32; bit += 8)
                wanted += (uint32_t)((int)(a[i] >> bit & 0xff) * (int8_t)(b[i] >> bit & 0xff));
            CHECK(got[i] == wanted, "%#x + %#x * %#x is %#x instead of %#x", sums[i], a[i], b[i], got[i], wanted);
        }
    }
}

/* ---- VPMADDWD: signed words of 16 bits, two products to a sum, which wraps around ---- */

static void test_madd(void)
{
    DESCRIBE("_mm512_madd_epi16");
    for (uint64_t n = 0; n < CASES; n++) {
        uint32_t a[WORDS], b[WORDS], got[WORDS];
        fill(a, 8, n);
        fill(b, 9, n);
        _mm512_storeu_si512(got, _mm512_madd_epi16(_mm512_loadu_si512(a), _mm512_loadu_si512(b)));
        for (size_t i = 0; i < WORDS; i++) {
            const uint32_t upper = (uint32_t)((int16_t)(a[i] >> 16) * (int16_t)(b[i] >> 16));
            const uint32_t wanted = upper + (uint32_t)((int16_t)(a[i] & 0xffff) * (int16_t)(b[i] & 0xffff));
            CHECK(got[i] == wanted, "%#x * %#x is %#x instead of %#x", a[i], b[i], got[i], wanted);
        }
    }
}

/* ---- VDPBF16PS: the upper halves' product is added first, then the lower ones', with one rounding each. Subnormal
 * numbers are zeros, before and after each step. ---- */

static float without_subnormal(float x)
{
    return fpclassify(x) == FP_SUBNORMAL ? copysignf(0, x) : x;
}

static float fma_without_subnormals(float a, float b, float c)
{
    return without_subnormal(fmaf(without_subnormal(a), without_subnormal(b), without_subnormal(c)));
}

/* Any two bfloat16, or a float32: near 1, near 2^-63, whose products are near the least normal number, or subnormal. */
static uint32_t small(uint32_t word, uint64_t n)
{
    static const uint32_t exponents[] = {0x3f803f80, 0x20002000, 0x00800080, 0};
    return (word & 0x80ff80ff) | exponents[n % 4];
}

static void test_dpbf16(void)
{
    static const uint32_t special[] = {0x7f80, 0xff80, 0x7fc0, 0, 0x8000}; /* infinities, NaN, zeros */
    DESCRIBE("_mm512_dpbf16_ps");
    for (uint64_t n = 0; n < CASES; n++) {
        uint32_t sums[WORDS], x[WORDS], y[WORDS];
        float got[WORDS];
        fill(sums, 4, n);
        fill(x, 5, n);
        fill(y, 6, n);
        for (size_t i = 0; i < WORDS && n % 2; i++) {
            sums[i] = small(sums[i], n / 2);
            x[i] = small(x[i], n / 8);
            y[i] = small(y[i], n / 32);
        }
        x[n % WORDS] = special[n % 5] << 16 | special[n / 5 % 5];
        __m512bh a, b;
        memcpy(&a, x, sizeof a);
        memcpy(&b, y, sizeof b);
        _mm512_storeu_ps(got, _mm512_dpbf16_ps(_mm512_loadu_ps(sums), a, b));
        for (size_t i = 0; i < WORDS; i++) {
            const float upper = fma_without_subnormals(float_of(x[i] & 0xffff0000), float_of(y[i] & 0xffff0000),
                                                       float_of(sums[i]));
            const float wanted = fma_without_subnormals(float_of(x[i] << 16), float_of(y[i] << 16), upper);
            CHECK(identical((double)got[i], (double)wanted), "%a + %#x * %#x is %a instead of %a",
                  (double)float_of(sums[i]), x[i], y[i], (double)got[i], (double)wanted);
        }
    }
}

/* ---- VCVTNE2PS2BF16 and VCVTNEPS2BF16: to the nearest, subnormal numbers to zeros, NaN to a quiet one ---- */

static uint16_t as_bf16(uint32_t bits)
{
    const float x = float_of(bits);
    if (isnan(x))
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)nearest_half(MHA_BFLOAT16, (double)without_subnormal(x));
}

static void test_to_bf16(void)
{
    static const uint32_t special[] = {0x007fffff, 0x00800000, 0x7f7fffff, 0x7f800000, 0x7f800001, 0x3f808000};
    DESCRIBE("conversions to bfloat16");
    for (uint64_t n = 0; n < CASES; n++) {
        uint32_t upper[WORDS], lower[WORDS];
        uint16_t both[2 * WORDS], one[WORDS];
        fill(upper, 10, n);
        fill(lower, 11, n);
        upper[n % WORDS] = special[n % 6] | (uint32_t)(n % 2) << 31;
        lower[n % WORDS] = small(lower[n % WORDS], n / WORDS);
        const __m512bh halves = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(upper), _mm512_loadu_ps(lower));
        const __m256bh of_one = _mm512_cvtneps_pbh(_mm512_loadu_ps(upper));
        memcpy(both, &halves, sizeof both);
        memcpy(one, &of_one, sizeof one);
        for (size_t i = 0; i < WORDS; i++) {
            CHECK(both[i] == as_bf16(lower[i]), "%#x becomes %#x", lower[i], both[i]);
            CHECK(both[WORDS + i] == as_bf16(upper[i]), "%#x becomes %#x", upper[i], both[WORDS + i]);
            CHECK(one[i] == as_bf16(upper[i]), "%#x becomes %#x", upper[i], one[i]);
        }
    }
}

/* ---- Integers of 32 bits ---- */

static void test_conversions(void)
{
    DESCRIBE("conversions");
    for (uint64_t n = 0; n < CASES; n++) {
        uint32_t bits[WORDS];
        int32_t rounded_to[WORDS];
        uint8_t bytes[WORDS];
        float x[WORDS], real[WORDS];
        fill(bits, 7, n);
        for (size_t i = 0; i < WORDS; i++) /* of any size, halves of integers among them */
            x[i] = (float)((double)(int32_t)bits[i] * (n % 2 ? 0.5 / (1 << 20) : 1 / (double)(1u << n % 32)));
        for (size_t i = 0; i < WORDS && n % 2; i++)
            x[i] = truncf(x[i]) + 0.5f;
        _mm_storeu_si128((__m128i *)(void *)bytes, _mm512_cvtepi32_epi8(_mm512_loadu_si512(bits)));
        _mm512_storeu_ps(real, _mm512_cvtepi32_ps(_mm512_loadu_si512(bits)));
        _mm512_storeu_si512(rounded_to, _mm512_cvtps_epi32(_mm512_loadu_ps(x)));
        for (size_t i = 0; i < WORDS; i++) {
            const double nearest = nearbyint((double)x[i]);
            const int32_t wanted = nearest >= 0x1p31 ? INT32_MIN : (int32_t)nearest;
            CHECK(bytes[i] == (bits[i] & 0xff), "%#x becomes %#x", bits[i], bytes[i]);
            CHECK(identical((double)real[i], (double)(float)(int32_t)bits[i]), "%#x becomes %a", bits[i],
                  (double)real[i]);
            CHECK(rounded_to[i] == wanted, "%a becomes %d instead of %d", (double)x[i], rounded_to[i], wanted);
        }
    }
}

int main(void)
{
    test_dpbusd();
    test_madd();
    test_dpbf16();
    test_to_bf16();
    test_conversions();
    return check_report("test_emulated");
}
