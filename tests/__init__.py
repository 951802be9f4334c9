"""The suite: cases, inputs, checks of every room, and the checks of the checks (meta)."""
