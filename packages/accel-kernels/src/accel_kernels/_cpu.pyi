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
def stream_mix(
    src: int,
    read_bytes: int,
    dst: int,
    written_bytes: int,
    places: int,
    non_temporal: bool,
    num_threads: int,
    isa: str,
) -> float: ...
def quantize(
    src: int,
    src_dtype: int,
    out: int,
    numel: int,
    bits: int,
    block_size: int,
    symmetric: bool,
    stochastic: bool,
    key: int,
    num_threads: int,
    isa: str,
) -> None: ...
def dequantize_sum(
    sources: list[int],
    out: int,
    out_dtype: int,
    numel: int,
    bits: int,
    block_size: int,
    symmetric: bool,
    scale: float,
    num_threads: int,
    isa: str,
) -> None: ...
def requantize_sum(
    sources: list[int],
    out: int,
    numel: int,
    bits: int,
    out_bits: int,
    block_size: int,
    symmetric: bool,
    scale: float,
    stochastic: bool,
    key: int,
    num_threads: int,
    isa: str,
) -> None: ...
def pack_signs(
    src: int, src_dtype: int, error: int, out: int, numel: int, squared: bool, num_threads: int, isa: str
) -> None: ...
def mean_signs(
    sources: list[int], out: int, out_dtype: int, numel: int, num_threads: int, isa: str
) -> None: ...
def linear(
    kind: int,
    x: int,
    x_stride: int,
    weight: int,
    scale: int,
    zero: int,
    bias: int,
    out: int,
    m: int,
    n: int,
    k: int,
    group: int,
    dtype: int,
    num_threads: int,
    isa: str,
) -> None: ...
def paged_attention(
    q: int,
    q_token_stride: int,
    q_head_stride: int,
    k_cache: int,
    v_cache: int,
    k_scale: int,
    v_scale: int,
    block_tables: int,
    table_stride: int,
    table_width: int,
    query_starts: int,
    context_lens: int,
    alibi_slopes: int,
    out: int,
    num_tokens: int,
    num_sequences: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_blocks: int,
    block_size: int,
    window: int,
    scale: float,
    softcap: float,
    dtype: int,
    num_threads: int,
    isa: str,
) -> None: ...
def write_kv(
    k: int,
    k_token_stride: int,
    k_head_stride: int,
    v: int,
    v_token_stride: int,
    v_head_stride: int,
    k_cache: int,
    v_cache: int,
    k_scale: int,
    v_scale: int,
    slots: int,
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    num_blocks: int,
    block_size: int,
    dtype: int,
    num_threads: int,
    isa: str,
) -> None: ...
def rms_norm(
    x: int,
    x_token: int,
    x_head: int,
    residual: int,
    residual_token: int,
    residual_head: int,
    out: int,
    out_token: int,
    out_head: int,
    weight: int,
    weight_dtype: int,
    num_rows: int,
    num_heads: int,
    dim: int,
    eps: float,
    weight_offset: float,
    dtype: int,
    num_threads: int,
    isa: str,
) -> None: ...
def rotary(
    x: int,
    token_stride: int,
    head_stride: int,
    num_heads: int,
    cos: int,
    cos_stride: int,
    sin: int,
    sin_stride: int,
    num_positions: int,
    positions: int,
    num_tokens: int,
    half: int,
    interleaved: bool,
    dtype: int,
    num_threads: int,
    isa: str,
) -> None: ...
def gated(
    gate_up: int,
    stride: int,
    out: int,
    out_stride: int,
    num_rows: int,
    width: int,
    gelu: bool,
    dtype: int,
    num_threads: int,
    isa: str,
) -> None: ...
def stream_read(p: int, numel: int, num_threads: int, isa: str) -> float: ...
def why_no_uring() -> str: ...
def direct_alignment(descriptor: int) -> tuple[int, int]: ...

class TransferFile: ...

class Transfer:
    def wait(self) -> None: ...
    def is_done(self) -> bool: ...
    def failure(self) -> tuple[int, int, int] | None: ...
    def bytes_done(self) -> int: ...

class TransferEngine:
    def __init__(self, name: str, queue_depth: int, block_bytes: int, num_threads: int) -> None: ...
    def attach(self, direct: int, buffered: int, align: int, memory_align: int) -> TransferFile: ...
    def detach(self, file: TransferFile) -> None: ...
    def submit(self, pieces: list[tuple[TransferFile, int, int, int]], writes: bool) -> Transfer: ...
    def add_buffer(self, address: int, nbytes: int) -> int: ...
    def remove_buffer(self, buffer_id: int) -> None: ...
    def close(self) -> None: ...

class Tape:
    def __len__(self) -> int: ...
    def record(self) -> None: ...
    def replay(self, num_threads: int) -> None: ...

def stop_recording() -> None: ...
