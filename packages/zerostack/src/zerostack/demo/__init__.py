"""`zerostack demo`: a small GPT, this machine's processes, ZeRO-3, and proof that it is the same training.

Modules, in the order in which a run passes through them: `settings` (what is asked for), `launch` (processes and
Ctrl-C), `text` (bytes to learn from), `gpt` (the model, plain torch), `training` (one rank's run), `held` (bytes
that each rank holds), `report` (picture and tables), `export` (the model, to be served).
"""
