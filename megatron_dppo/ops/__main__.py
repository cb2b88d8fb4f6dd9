"""``python -m megatron_dppo.ops``: which backends there are, and why not the others."""

from megatron_dppo.ops.backend import backend_report, cpu_kernel_level

if __name__ == "__main__":
    for name, state in backend_report().items():
        level = cpu_kernel_level() if name == "cpu" else ""
        print(f"{name:6} {state}{level and f' ({level})'}")
