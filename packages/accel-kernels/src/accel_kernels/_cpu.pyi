SEGMENT_BYTES: int
TABLE_ROW_BYTES: int

def isas() -> list[str]: ...
def has_openmp() -> bool: ...
def is_writable(address: int, num_bytes: int) -> bool: ...
def step(
    optimizer: int,
    param: int,
    grad: int,
    grad_dtype: int,
    state0: int,
    state1: int,
    low: int,
    low_dtype: int,
    segments: bytes,
    grad_scale: float,
    num_threads: int,
    isa: str,
) -> None: ...
def step_table(
    optimizer: int, rows: bytes, segments: bytes, grad_scale: float, num_threads: int, isa: str
) -> None: ...
def cast_copy(
    src: int,
    src_dtype: int,
    dst: int,
    dst_dtype: int,
    numel: int,
    scale: float,
    stochastic: bool,
    key: int,
    num_threads: int,
    isa: str,
) -> None: ...
def norm(grad: int, dtype: int, numel: int, scale: float, out: int, num_threads: int, isa: str) -> None: ...
def stream_4r3w(
    p: int, g: int, m: int, v: int, numel: int, non_temporal: bool, num_threads: int, isa: str
) -> None: ...
