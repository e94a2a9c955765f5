/* SPDX-License-Identifier: Apache-2.0
 *
 * advised_function.h - AdvisedFunction: a Python function, and another one that is asked about its TypeErrors.
 */
#ifndef MHA_PYTHON_ADVISED_FUNCTION_H
#define MHA_PYTHON_ADVISED_FUNCTION_H

#include "module.h"

extern PyType_Spec advised_function_spec;

#endif
