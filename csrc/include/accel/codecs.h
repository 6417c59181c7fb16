// The table of codec kernels that each instruction set provides; as kernels.h. How messages lie in memory:
// accel_kernels/messages.py. Messages may lie at any address.
#pragma once
#include <cstdint>

#include "accel/kernels.h"

namespace accel {

struct BlockFormat {
    int bits;  // 8 or 4
    std::int64_t block_size;
    bool symmetric;
    std::int64_t minima, values;  // where they begin in a message, in bytes
};

using Message = const std::uint8_t*;

// `scale` times the sum of messages, in their order.
struct SumArgs {
    const Message* messages;
    std::int64_t num_messages;
    BlockFormat form;
    float scale;
};

struct DequantizeArgs {
    SumArgs sum;
    std::int64_t numel;
    void* out;
    DType out_dtype;
    bool stream;  // bypass the caches when writing
};

struct QuantizeArgs {
    const void* src;  // floats, or
    DType src_dtype;
    SumArgs sum;  // a sum of messages in as large blocks
    std::uint8_t* out;
    std::int64_t numel;
    BlockFormat form;
    bool stochastic;
    std::uint64_t key;  // already mixed seed of the stochastic rounding
    bool stream;        // bypass the caches when writing
};

struct PackSignsArgs {
    const void* src;
    DType src_dtype;
    float* error;  // or null
    std::uint8_t* bits;
    float scale;
    bool squared;     // the scale is of squares, else of magnitudes
    bool keep_error;  // the scale is NaN: error stays as it is
};

struct MeanSignsArgs {
    const Message* messages;
    std::int64_t num_messages;
    void* out;
    DType out_dtype;
    float factor;  // 1 / num_messages
    bool stream;
};

// Elements that are summed together: Note [Order of the sum], accel_kernels/reference/signs.py.
constexpr std::int64_t kSignPiece = 4096;
// Where ranges of the sign kernels begin: at a multiple of this.
constexpr std::int64_t kSignGroup = 64;

struct CodecKernels {
    void (*quantize)(const QuantizeArgs&, std::int64_t first_block, std::int64_t last_block);
    void (*requantize_sum)(const QuantizeArgs&, std::int64_t first_block, std::int64_t last_block);
    void (*dequantize_sum)(const DequantizeArgs&, std::int64_t begin, std::int64_t end);  // begin is even
    // The sum of each piece from begin, a multiple of kSignPiece, on.
    void (*sign_sums)(const PackSignsArgs&, std::int64_t begin, std::int64_t end, double* sums);
    void (*pack_signs)(const PackSignsArgs&, std::int64_t begin, std::int64_t end);
    void (*mean_signs)(const MeanSignsArgs&, std::int64_t begin, std::int64_t end);
};

#define ACCEL_DECLARE_CODECS(isa)                                                           \
    namespace isa {                                                                         \
    void quantize(const QuantizeArgs&, std::int64_t, std::int64_t);                         \
    void requantize_sum(const QuantizeArgs&, std::int64_t, std::int64_t);                   \
    void dequantize_sum(const DequantizeArgs&, std::int64_t, std::int64_t);                 \
    void sign_sums(const PackSignsArgs&, std::int64_t, std::int64_t, double*);              \
    void pack_signs(const PackSignsArgs&, std::int64_t, std::int64_t);                      \
    void mean_signs(const MeanSignsArgs&, std::int64_t, std::int64_t);                      \
    inline CodecKernels codec_table() {                                                     \
        return {quantize, requantize_sum, dequantize_sum, sign_sums, pack_signs, mean_signs}; \
    }                                                                                       \
    }

ACCEL_DECLARE_CODECS(baseline)
#ifdef ACCEL_X86
ACCEL_DECLARE_CODECS(avx2)
ACCEL_DECLARE_CODECS(avx512)
#endif
#undef ACCEL_DECLARE_CODECS

}  // namespace accel
