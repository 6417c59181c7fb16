// The small ops between products: RMSNorm, rotary embedding, gated activations, cache writes. fp32 inside, one rounding.
#include "vec.h"

namespace {

using accel::GatedArgs;
using accel::RmsNormArgs;
using accel::RotaryArgs;
using accel::Rows;
using accel::WriteKvArgs;

template <DType T>
using Element = typename Memory<T>::Element;

template <DType T>
Element<T>* row_of(const Rows& rows, std::int64_t row, std::int64_t num_heads) {
    return static_cast<Element<T>*>(rows.data) + row / num_heads * rows.token_stride +
           row % num_heads * rows.head_stride;
}

template <DType T, DType W>
void norm_row(const RmsNormArgs& a, const Element<T>* x, Element<T>* residual, Element<T>* out) {
    F32 squares = zero_f32();
    for_vectors(a.dim, [&](std::int64_t i, auto count) {
        F32 y = load_at<T>(x + i, count);
        if (residual != nullptr) {
            store_at<T>(residual + i, y + load_at<T>(residual + i, count), count);
            y = load_at<T>(residual + i, count);  // as rounded
        }
        squares = fma(y, y, squares);
    });
    const float inverse = 1.0f / std::sqrt(sum_lanes(squares) / float(a.dim) + a.eps);
    const Element<T>* from = residual != nullptr ? residual : x;
    const auto* weight = static_cast<const Element<W>*>(a.weight);
    for_vectors(a.dim, [&](std::int64_t i, auto count) {
        const F32 w = load_at<W>(weight + i, count) + splat(a.weight_offset);
        store_at<T>(out + i, (load_at<T>(from + i, count) * splat(inverse)) * w, count);
    });
}

template <DType T, DType W>
void norm_rows(const RmsNormArgs& a, std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
        norm_row<T, W>(a, row_of<T>(a.x, r, a.num_heads),
                       a.residual.data == nullptr ? nullptr : row_of<T>(a.residual, r, a.num_heads),
                       row_of<T>(a.out, r, a.num_heads));
    }
}

template <DType T>
void rotate_halves(const RotaryArgs& a, Element<T>* x, const float* cos, const float* sin) {
    for_vectors(a.half, [&](std::int64_t i, auto count) {
        const F32 c = load_at<DType::f32>(cos + i, count), s = load_at<DType::f32>(sin + i, count);
        const F32 first = load_at<T>(x + i, count), second = load_at<T>(x + a.half + i, count);
        store_at<T>(x + i, first * c - second * s, count);
        store_at<T>(x + a.half + i, second * c + first * s, count);
    });
}

template <DType T>
float widen(Element<T> x) {
    if constexpr (T == DType::f32) return x;
    else return bf16_to_float(x);
}
template <DType T>
Element<T> narrow(float x) {
    if constexpr (T == DType::f32) return x;
    else return float_to_bf16(x);
}

template <DType T>
void rotate_pairs(const RotaryArgs& a, Element<T>* x, const float* cos, const float* sin) {
    for (std::int64_t i = 0; i < a.half; ++i) {
        const float first = widen<T>(x[2 * i]), second = widen<T>(x[2 * i + 1]);
        x[2 * i] = narrow<T>(first * cos[i] - second * sin[i]);
        x[2 * i + 1] = narrow<T>(second * cos[i] + first * sin[i]);
    }
}

template <DType T>
void rotate_rows(const RotaryArgs& a, std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
        const std::int64_t position = a.positions[r / a.num_heads];
        const float* cos = a.cos + position * a.cos_stride;
        const float* sin = a.sin + position * a.sin_stride;
        Element<T>* x = row_of<T>(a.x, r, a.num_heads);
        if (a.interleaved) rotate_pairs<T>(a, x, cos, sin);
        else rotate_halves<T>(a, x, cos, sin);
    }
}

inline F32 silu(F32 x) { return x / (splat(1.0f) + exponential(zero_f32() - x)); }

// x / 2 * (1 + tanh(z)), by 1 + tanh(z) = 2 / (1 + e^(-2 z)).
inline F32 gelu_tanh(F32 x) {
    const F32 z = splat(0.797884561f) * (x + splat(0.044715f) * (x * x * x));
    return x / (splat(1.0f) + exponential(splat(-2.0f) * z));
}

template <DType T>
void gated_row(const GatedArgs& a, std::int64_t row, std::int64_t begin, std::int64_t end) {
    const auto* gate = static_cast<const Element<T>*>(a.gate_up) + row * a.stride;
    const Element<T>* up = gate + a.width;
    auto* out = static_cast<Element<T>*>(a.out) + row * a.out_stride;
    for_vectors(end - begin, [&](std::int64_t offset, auto count) {
        const std::int64_t i = begin + offset;
        const F32 x = load_at<T>(gate + i, count);
        store_at<T>(out + i, (a.gelu ? gelu_tanh(x) : silu(x)) * load_at<T>(up + i, count), count);
    });
}

// Symmetric int8 of one row; returns its scale. A row with a NaN or an infinity in it is NaN: zeros, and so its scale.
template <DType T>
float quantize_row(const Element<T>* x, std::int64_t n, std::int8_t* to) {
    F32 largest = zero_f32(), poison = zero_f32();  // maximum() loses a NaN, a sum does not
    for_vectors(n, [&](std::int64_t i, auto count) {
        const F32 value = absolute(load_at<T>(x + i, count));
        largest = maximum(largest, value);
        poison = poison + value * zero_f32();
    });
    const float scale = max_lanes(largest) / 127.0f + sum_lanes(poison);
    for_vectors(n, [&](std::int64_t i, auto count) {
        float quotient[kLanes];
        store_f32(quotient, round_even(load_at<T>(x + i, count) / splat(scale)));
        for (int j = 0; j < count; ++j) to[i + j] = scale > 0.0f ? std::int8_t(std::max(-127.0f, std::min(127.0f, quotient[j]))) : std::int8_t(0);
    });
    return scale;
}

template <DType T>
void write_rows(const WriteKvArgs& a, std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
        const std::int64_t slot = a.slots[t];
        if (slot < 0) continue;
        for (int which = 0; which < 2; ++which) {
            for (std::int64_t h = 0; h < a.num_heads; ++h) {
                const auto* from = static_cast<const Element<T>*>(a.src[which]) + t * a.token_stride[which] +
                                   h * a.head_stride[which];
                const std::int64_t row = (slot / a.block_size * a.num_heads + h) * a.block_size + slot % a.block_size;
                if (a.scale[which] == nullptr) {
                    std::memcpy(static_cast<Element<T>*>(a.cache[which]) + row * a.head_dim, from,
                                std::size_t(a.head_dim) * sizeof(Element<T>));
                } else {
                    a.scale[which][row] = quantize_row<T>(
                        from, a.head_dim, static_cast<std::int8_t*>(a.cache[which]) + row * a.head_dim);
                }
            }
        }
    }
}

}  // namespace

void accel::ACCEL_ISA::rms_norm(const RmsNormArgs& a, std::int64_t begin, std::int64_t end) {
    if (a.dtype == DType::f32) return norm_rows<DType::f32, DType::f32>(a, begin, end);
    if (a.weight_dtype == DType::f32) return norm_rows<DType::bf16, DType::f32>(a, begin, end);
    norm_rows<DType::bf16, DType::bf16>(a, begin, end);
}

void accel::ACCEL_ISA::rotary(const RotaryArgs& a, std::int64_t begin, std::int64_t end) {
    if (a.dtype == DType::f32) rotate_rows<DType::f32>(a, begin, end);
    else rotate_rows<DType::bf16>(a, begin, end);
}

void accel::ACCEL_ISA::gated(const GatedArgs& a, std::int64_t row, std::int64_t begin, std::int64_t end) {
    if (a.dtype == DType::f32) gated_row<DType::f32>(a, row, begin, end);
    else gated_row<DType::bf16>(a, row, begin, end);
}

void accel::ACCEL_ISA::write_kv(const WriteKvArgs& a, std::int64_t begin, std::int64_t end) {
    if (a.dtype == DType::f32) write_rows<DType::f32>(a, begin, end);
    else write_rows<DType::bf16>(a, begin, end);
}

// Reads and next to nothing else: what a product with few rows of activations can reach.
float accel::ACCEL_ISA::stream_read(const float* p, std::int64_t begin, std::int64_t end) {
    F32 sums[8];
    for (F32& s : sums) s = zero_f32();
    std::int64_t i = begin;
    for (; i + 8 * kLanes <= end; i += 8 * kLanes) {
        __builtin_prefetch(p + i + 4096, 0, 2);
        for (int k = 0; k < 8; ++k) sums[k] = sums[k] + load_f32(p + i + k * kLanes);
    }
    for (int k = 1; k < 8; ++k) sums[0] = sums[0] + sums[k];
    float total = sum_lanes(sums[0]);
    for (; i < end; ++i) total += p[i];
    return total;
}
