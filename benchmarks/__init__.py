"""One program per question about speed and memory: `python -m benchmarks.operator`, `.block`, `.detector`, `.scaling`.

Each prints a table of times and one of memory, and writes benchmarks/results/NAME-MACHINE.json, which
`python -m benchmarks.document` turns into the tables of docs/performance.md. `python -m benchmarks.kernels` helps to
tune the CUDA kernels.
"""
