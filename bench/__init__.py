"""How fast the fused kernel is, and beside what: `python -m bench sweep | dense | phases | floor | report | twins`.

`measure` times: the whole layer on one rank with the load of one of eight (sweep), the main loop alone (dense), the
phases of each role (phases), the predictions (twins). `model` says without a GPU what a chip could reach at best.
`results` holds what was measured, a folder a chip; `peers` what public kernels took on the same chip. `report` reads
both, derives, judges and writes docs/results.md. `command` holds the options of the sweep.
"""

from megaproof import bare

bare.refuse(__name__)
