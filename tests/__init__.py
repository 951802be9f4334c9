"""The suite: cases, inputs, checks of every room, and the checks of the checks (meta)."""

from megaproof import bare

bare.refuse(__name__)
