"""CUDA text to a cubin to a launch; it knows no layer."""

from megaproof import bare

bare.refuse(__name__)
