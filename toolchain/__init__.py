"""From a CUDA text to a cubin to a launch. It knows no kernel and no layer: what it is told stands in a `Program`.

program     one program: its sources, kernels, macros, and what the gate expects; compiles and loads it
build       source text -> cubin, through NVRTC
cache       folders that only their owner can write, and entries with a digest beside each
gate, sass  what a cubin must pass: ptxas' report, and the instructions
code, pins  the digests of cubins and of their code, and the file that holds those that were gated
launch      a cubin on the device: libraries, kernels, tensor maps
files       files that are never half written, locks, and what killed runs leave
child       processes of our own; template: one that has imported all they need, and forks them
signals     SIGTERM ends a process as an interrupt does
optimized   where asserts are left out, nothing is proven
"""

from megaproof import bare

bare.refuse(__name__)
