"""Stand-ins that let the CUDA builds of SGLang's dependencies run on a CPU host.

This folder goes on the PYTHONPATH of server processes only (see server.py); nothing here is imported by the trainer.
"""
