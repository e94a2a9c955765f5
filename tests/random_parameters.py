# SPDX-License-Identifier: Apache-2.0
"""Models of torch whose attention matters: new ones hide mistakes, since they have small weights and zero biases."""

import math

import torch


@torch.no_grad()
def set_random_parameters(model):
    """Gives a model random numbers that are large enough for each trait of its attention to matter."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        numbers = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:  # products of normal numbers remain of the size of 1 or 2
            parameter.copy_(1.5 * numbers / math.sqrt(parameter[0].numel()))
        else:
            parameter.add_(0.2 * numbers)  # biases, and the factors of normalisations
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
    return model
