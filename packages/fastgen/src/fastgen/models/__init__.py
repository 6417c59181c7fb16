"""Decoders: one description (`spec`), one module built from it (`decoder`, `layers`, `moe`), a register of families."""
