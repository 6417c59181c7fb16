"""Other formats: what they hold, read part by part; and written from a step, part by part.

- `source`: what every format gives: names, shapes, dtypes, values, and any box of any tensor.
- `safetensors_files`: directories in the layout of Hugging Face, and single files.
- `unpickle`: what admits tensors and plain containers, and refuses the rest by name.
- `torch_records`: one tensor in a file of torch, read in part.
- `dcp`: directories of torch.distributed.checkpoint.
- `deepspeed`: DeepSpeed's directories, ZeRO 1 to 3 and universal; read only.
- `convert`: from any of them to any that can be written.
"""
