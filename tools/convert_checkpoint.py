#!/usr/bin/env python3
"""``megatron-dppo convert`` as a script: training checkpoint <-> Hugging Face folder (megatron_dppo/convert.py)."""

from __future__ import annotations

import sys

from megatron_dppo.convert import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
