"""One program per question of speed and memory: `python -m benchmarks.operator`, `.block`, `.detector`, `.scaling`.

Each prints one aligned table for times and one for memory, and writes benchmarks/results/NAME-MACHINE.json, which
`python -m benchmarks.document` turns into the tables of docs/performance.md. `python -m benchmarks.kernels` is for who
tunes the CUDA kernels.
"""
