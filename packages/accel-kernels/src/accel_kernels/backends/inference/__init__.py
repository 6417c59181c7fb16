"""The back ends of the inference ops, each a module with the functions of ``dispatch.InferenceBackend``."""
