/* SPDX-License-Identifier: Apache-2.0
 *
 * powers.h - what makes 2^(k / 8) of an integer k, for power() of the vector vocabulary.
 *
 * Moved to where the exponent begins, with its last three bits in the mantissa, k = 8 n + j is 2^n (1 + j / 8). The
 * float nearest to 2^n 2^(j / 8) is so many units of its last place away, whatever n is:
 */
#ifndef MHA_POWERS_H
#define MHA_POWERS_H

#include <stdint.h>

static const int32_t mha_powers[8] = {0, -289342, -509968, -655657, -719629, -694486, -572163, -343865};

#endif
