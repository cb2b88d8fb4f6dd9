"""``python -m megatron_dppo``: the command ``megatron-dppo`` of an installation that has no scripts on its path."""

from __future__ import annotations

import sys

from megatron_dppo.cli import main

sys.exit(main())
