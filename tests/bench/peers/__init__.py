"""What benchmarks are compared with, and the subject beside them: each a program of its own, measured in one process.

`python -m tests.bench.peers.NAME CONFIG`, with CONFIG in JSON, reads that many records of prices from the
log's beginning, decodes each with the same decoder and folds it into a count and a sum for its security. It prints one
line: {"records": …, "seconds": …, "sum": …}, timed from the first record to the last.
"""
