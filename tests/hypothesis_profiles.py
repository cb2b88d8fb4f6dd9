"""How hypothesis draws examples, in this process: imported by conftest.py, and by the processes of tests/rank_pool.py.

The same examples in every run, so that a change is what makes a test fail. --hypothesis-profile=explore draws others each
time; a failure then prints what reproduces it. How long an example takes says nothing on a shared machine.
"""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("repeat", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", derandomize=False, deadline=None, print_blob=True)
hypothesis.settings.load_profile("repeat")
