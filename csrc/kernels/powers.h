/* SPDX-License-Identifier: Apache-2.0
 *
 * powers.h - the table with which power() of the vector vocabulary makes 2^(k / 8) of an integer k.
 *
 * Let k = 8 n + j, shifted to where the exponent begins, so that its last three bits are in the mantissa. These bits
 * are then the float 2^n (1 + j / 8). The float nearest to 2^n 2^(j / 8) is so many units in the last place away, for
 * every n:
 */
#ifndef MHA_POWERS_H
#define MHA_POWERS_H

#include <stdint.h>

static const int32_t mha_powers[8] = {0, -289342, -509968, -655657, -719629, -694486, -572163, -343865};

#endif
