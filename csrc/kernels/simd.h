/* SPDX-License-Identifier: Apache-2.0
 *
 * simd.h - the vector vocabulary: what each simd_*.h defines, and what all of them use.
 *
 * Every simd_*.h defines this vocabulary for f32 and f64. The operators + - * / are the compiler's own.
 *   vec_f32                 lanes_f32 numbers
 *   load(p), store(p, v)    any alignment
 *   broadcast(p), splat(x)  one number in every lane, from memory or from a register
 *   fma(a, b, c)            a * b + c, rounded once (in simd_portable.h twice)
 *   max(a, b)               a or b if one of them is NaN
 *   power(v)                2^(k / 8) for f32, 2^k for f64; k, plus 8 * 127 or 1023, is the integer in v's low bits
 *   zero_below(v, t, x)     v, but 0 where t < x; NaN stays
 *   either(a, b), unlike(a, b)  bitwise or, exclusive or
 *   hide(words, i)          -inf where bit i of the lane's word is set, else 0
 *   transpose(v)            v[i] lane j <-> v[j] lane i, for as many vectors as lanes
 *   HOLD(v)                 keeps v in a register; gcc would load it again for each of two or three uses
 *   nonzero(p)              of no dtype: bit i says that byte i of 16 is not 0
 *   widen_bf16(p), widen_f16(p)        of float32 alone: a vector of halves from memory
 *   narrow_bf16(p, v), narrow_f16(p, v)  and to memory, rounded to the nearest, ties to even; NaN becomes quiet
 *   round_bf16(v)           of float32 alone: a vector rounded like that, as float32
 *   swap_neighbours(v)      of float32 alone: lane 2 i <-> lane 2 i + 1
 *   REGISTERS               how many vectors fit into registers: the sums, up to 3 vectors of a panel and 1 broadcast
 *   WIDEN_BF16_TIGHT        optional: widen_bf16(p) without a register for a constant
 *   ROWS_OF_MANY            optional: the rows of tiles of 1, 2 and 3 vectors in products of many rows; not of halves
 */
#ifndef MHA_SIMD_H
#define MHA_SIMD_H

#include <stdint.h>

/* MHA_UNROLL stands before a loop over an array of vectors. gcc keeps such an array in memory instead of registers
 * unless the loop is unrolled. MHA_UNROLL_4 stands before the loop of a tile; clang would spill. */
#ifdef __clang__
#define MHA_UNROLL _Pragma("unroll")
#define MHA_UNROLL_4
#else
#define MHA_UNROLL _Pragma("GCC unroll 64")
#define MHA_UNROLL_4 _Pragma("GCC unroll 4")
#endif

/* The table with which power() makes 2^(k / 8) of an integer k. Let k = 8 n + j, shifted to where the exponent begins,
 * so that its last three bits are in the mantissa. These bits are then the float 2^n (1 + j / 8). mha_powers[j]
 * is how many units in the last place the float nearest to 2^n 2^(j / 8) is away. It is the same for every n. */
static const int32_t mha_powers[8] = {0, -289342, -509968, -655657, -719629, -694486, -572163, -343865};

#endif
