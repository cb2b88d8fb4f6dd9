"""What only a machine with a GPU can show, row by row, in one table. The command is ``tools/gpu_check.sh`` (docs/gpu.md).

    __main__.py     options, preparation, the sections in their order
    wheels.py       what the interpreter lacks, from a folder of wheels
    extension.py    megatron_dppo._C, built in place for the GPU at hand
    supervise.py    runs a section in a process of its own, each row within its limit
    worker.py       that process
    table.py        the rows: a file of JSON lines that grows, and Markdown at the end
    findings.py     what a section is made of
    sections/       one module each

The standard library alone is imported outside the worker: what is broken on the machine breaks a row, not the table.
"""
