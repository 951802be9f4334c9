"""`python -m bench sweep`: kernel time of the fused layer on one rank with the load of one of eight.

`command` holds the options, `points` what they ask for, `load` the layer, `timer` the clock, `yardsticks` what is
measured beside the kernel, `rows` every column of a result, `compare` the verdict, `files` how it is
written; `sweep` puts them together. `dense_rows` is `python -m bench dense`: the main loop alone.
`report` is `python -m bench report`: `results` reads the JSON, `derived` adds what follows from it, `targets` judges,
`sections` and `plot` show.
"""

from megaproof.bench.command import bench_command

__all__ = ["bench_command"]
