/* SPDX-License-Identifier: Apache-2.0
 *
 * probabilities.h - attention whose probabilities are wanted, or its scores.
 */
#ifndef MHA_PROBABILITIES_H
#define MHA_PROBABILITIES_H

#include "attention.h"

/* mha_plan_attention(), if anything besides the context is wanted. */
size_t mha_plan_probabilities(mha_attention *a, mha_plan *plan);

/* Fills the context, then the probabilities; or the scores alone. */
mha_status mha_attend_with_probabilities(mha_attention *attention);

#endif
