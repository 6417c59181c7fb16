"""The back ends, each a module with the three functions of ``dispatch.Backend``."""
