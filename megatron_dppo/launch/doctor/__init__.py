"""Whether a host can train: what is installed, what the host offers, and whether small things work (checks.py).

Where trainer and engine disagree, ``mismatch/`` says by how much, on which side, and from which operator on.
"""
