// The table of inference kernels that each instruction set provides; as kernels.h, with two more instruction sets.
//
// A kernel works on the ranges it is given and knows nothing about threads; inference_dispatch.cpp splits the work.
#pragma once
#include <cstdint>

#include "accel/kernels.h"

namespace accel {

enum class WeightKind : int { dense = 0, int8 = 1, int4 = 2 };

// out[M, N] = x[M, K] @ weight[N, K]^T + bias, all of `dtype` unless the weight is quantized.
struct LinearArgs {
    const void* x;
    std::int64_t x_stride;  // elements from row to row
    const void* weight;     // rows of K elements; int4: of K / 2 bytes
    const float* scale;     // int8: [N]; int4: [N, K / group]
    const std::uint8_t* zero;  // int4: [N, K / group], or null for 8
    const void* bias;          // [N] or null
    void* out;                 // rows of N elements
    std::int64_t m, n, k, group;
    DType dtype;
    WeightKind kind;
};

struct AttentionArgs {
    const void* q;  // [T, Hq, D]
    std::int64_t q_token_stride, q_head_stride;
    const void* k_cache;  // [num_blocks, Hkv, block_size, D]
    const void* v_cache;
    const float* k_scale;  // [num_blocks, Hkv, block_size], or null: the caches are of `dtype`, else int8
    const float* v_scale;
    const std::int32_t* block_tables;  // [S, B]
    const std::int32_t* query_starts;  // [S + 1]
    const std::int32_t* context_lens;  // [S]
    const float* alibi_slopes;         // [Hq] or null
    void* out;                         // [T, Hq, D]
    std::int64_t num_sequences, num_heads, num_kv_heads, head_dim, num_blocks, block_size, table_width;
    std::int64_t table_stride, window;
    float scale, softcap;
    DType dtype;
};

// Rows (query, head of the group) of one sequence and key head that share key tiles, over some chunks of its keys.
struct AttentionTask {
    std::int64_t sequence, kv_head, row_begin, row_end;  // row = query * group + head in the group
    std::int64_t chunk_begin, chunk_end;
    float* partial;  // null: write the result; else where the states of the chunks go
};
constexpr std::int64_t kKeyTile = 64;       // keys in a tile; tiles and chunks are counted from key 0
constexpr std::int64_t kKeyChunk = 1024;    // keys that are reduced together, before the results of chunks are merged
constexpr std::int64_t kMaxQueryRows = 64;  // rows in a task

struct WriteKvArgs {
    const void* src[2];  // k, v: [T, H, D]
    std::int64_t token_stride[2], head_stride[2];
    void* cache[2];
    float* scale[2];  // null: caches of `dtype`
    const std::int64_t* slots;
    std::int64_t num_heads, head_dim, block_size;
    DType dtype;
};

// Rows addressed by two indices (token, head); a plain matrix has one head.
struct Rows {
    void* data;
    std::int64_t token_stride, head_stride;
};

struct RmsNormArgs {
    Rows x, residual, out;  // residual.data may be null
    const void* weight;
    DType weight_dtype, dtype;
    std::int64_t num_heads, dim;
    float eps, weight_offset;
};

struct RotaryArgs {
    Rows x;
    const float* cos;  // [P, half]
    const float* sin;
    std::int64_t cos_stride, sin_stride;
    const std::int64_t* positions;
    std::int64_t num_heads, half;
    DType dtype;
    bool interleaved;
};

struct GatedArgs {
    const void* gate_up;  // rows of 2 F
    void* out;            // rows of F
    std::int64_t stride, out_stride, width;
    DType dtype;
    bool gelu;
};

struct InferenceKernels {
    // Bytes of scratch that a product needs for its activations, for all M rows.
    std::int64_t (*linear_scratch)(const LinearArgs&);
    // Fills the scratch for groups of rows [begin, end), kLinearRows each.
    void (*linear_prepare)(const LinearArgs&, char* scratch, std::int64_t begin, std::int64_t end);
    // Columns [n0, n1) of rows [m0, m1); m0 is a multiple of kLinearRows and n0 of kLinearColumns.
    void (*linear_run)(const LinearArgs&, const char* scratch, std::int64_t m0, std::int64_t m1, std::int64_t n0,
                       std::int64_t n1);
    // Floats that a task needs to hand over the state of one chunk.
    std::int64_t (*attention_state)(const AttentionArgs&, std::int64_t rows);
    std::int64_t (*attention_scratch)(const AttentionArgs&);  // bytes, for each thread
    void (*attention_run)(const AttentionArgs&, const AttentionTask&, char* scratch);
    void (*attention_merge)(const AttentionArgs&, const AttentionTask&, char* scratch);
    void (*write_kv)(const WriteKvArgs&, std::int64_t begin, std::int64_t end);
    void (*rms_norm)(const RmsNormArgs&, std::int64_t begin, std::int64_t end);
    void (*rotary)(const RotaryArgs&, std::int64_t begin, std::int64_t end);
    void (*gated)(const GatedArgs&, std::int64_t row, std::int64_t begin, std::int64_t end);
    float (*stream_read)(const float* p, std::int64_t begin, std::int64_t end);
};
constexpr std::int64_t kLinearRows = 80;     // a multiple of 16 (rows of a tile) and of 5 (rows whose digits share one)
constexpr std::int64_t kLinearColumns = 32;  // two tiles

#define ACCEL_DECLARE_INFERENCE(isa)                                                                                 \
    namespace isa {                                                                                                  \
    std::int64_t linear_scratch(const LinearArgs&);                                                                  \
    void linear_prepare(const LinearArgs&, char*, std::int64_t, std::int64_t);                                       \
    void linear_run(const LinearArgs&, const char*, std::int64_t, std::int64_t, std::int64_t, std::int64_t);         \
    std::int64_t attention_state(const AttentionArgs&, std::int64_t);                                                \
    std::int64_t attention_scratch(const AttentionArgs&);                                                            \
    void attention_run(const AttentionArgs&, const AttentionTask&, char*);                                           \
    void attention_merge(const AttentionArgs&, const AttentionTask&, char*);                                         \
    void write_kv(const WriteKvArgs&, std::int64_t, std::int64_t);                                                   \
    void rms_norm(const RmsNormArgs&, std::int64_t, std::int64_t);                                                   \
    void rotary(const RotaryArgs&, std::int64_t, std::int64_t);                                                      \
    void gated(const GatedArgs&, std::int64_t, std::int64_t, std::int64_t);                                          \
    float stream_read(const float*, std::int64_t, std::int64_t);                                                     \
    inline InferenceKernels inference_table() {                                                                      \
        return {linear_scratch, linear_prepare, linear_run, attention_state, attention_scratch, attention_run,       \
                attention_merge, write_kv, rms_norm, rotary, gated, stream_read};                                    \
    }                                                                                                                \
    }

ACCEL_DECLARE_INFERENCE(baseline)
#ifdef ACCEL_X86
ACCEL_DECLARE_INFERENCE(avx2)
ACCEL_DECLARE_INFERENCE(avx512)
#ifdef ACCEL_AMX
ACCEL_DECLARE_INFERENCE(amx)
#endif
#endif
#undef ACCEL_DECLARE_INFERENCE

}  // namespace accel
