/* SPDX-License-Identifier: Apache-2.0
 *
 * torch_checks.h - the checks of torch.nn.MultiheadAttention.forward.
 */
#ifndef MHA_PYTHON_TORCH_CHECKS_H
#define MHA_PYTHON_TORCH_CHECKS_H

#include "arguments.h"

/* Makes torch's checks in torch's order, and finds the shapes. Returns 0, or -1 with an exception. */
int check_arguments(call_arguments *arguments);

#endif
