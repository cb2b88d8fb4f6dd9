"""How far an update in a layout may be from the same update on one rank."""

from __future__ import annotations

# A layout changes the order of sums and nothing else. One fp32 rounding is 6e-8; a log-prob has passed some 20 dependent
# ones and sums of 64 and 250 terms: 1e-6. The loss averages 72 such tokens, whose errors are independent and whose values
# cancel to no less than a third of their mean size: 1e-6 / sqrt(72) * 3 = 4e-7.
LOSS_TOLERANCE = 1e-6
# A gradient element has passed four layers forwards and backwards, and is a sum over up to 103 positions that cancel: some
# 1e-6 of the largest element. The norm is off by at most the norm of the elements' differences.
GRADIENT_TOLERANCE = 1e-5
# What these tolerances have to tell apart is far away: a reduction left out or done twice changes a parameter's gradient by
# tens of per cent, one token counted too often changes every gradient by 1/72.
