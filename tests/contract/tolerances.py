"""Every tolerance of the contract suite, stated once. They are never loosened for one architecture.

An error is measured against the largest magnitude of the tensor it stands in, or against a hundredth of the largest
magnitude among its kind (outputs, states, gradients), whichever is more: a gradient that is zero but for rounding has
no magnitude of its own.
"""

import torch

# Two programs that compute the same thing: rounding in another order, over up to 131 tokens. eps is 2e-16 and 1.2e-7.
EQUAL = {torch.float64: 1e-9, torch.float32: 2e-5}

# Half precision against float64 with the same weights: a few roundings of the dtype's eps, one after the other.
HALF = {dtype: 16 * torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)}

# float32 against float64 after 10,000 steps: what a trained model would not notice.
DRIFT = 1e-3

# Central differences in float64 over steps of 1e-6: truncation 1e-12, rounding 1e-10.
FINITE_DIFFERENCES = {"atol": 1e-6, "rtol": 1e-5}
