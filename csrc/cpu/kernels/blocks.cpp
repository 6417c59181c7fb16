// Block-wise quantization: floats into messages, and sums of messages into floats. reference/blocks.py states the meaning.
//
// Blocks are quantized several at a time: first all their extremes are found, then all their scales, then all values are
// rounded. One block's scale has to wait for the last of its elements; several together keep the processor busy.
#include "encode.h"
#include "lines.h"
#include "messages.h"

namespace {

using accel::QuantizeArgs;

constexpr std::int64_t kBuffer = 2048;  // elements
// Floats are quantized in several places in turn, a batch at each: the hardware's prefetchers follow them side by side
// (norm.cpp).
constexpr std::int64_t kStreams = 4;
using Out = Lines<kBuffer>;

template <DType S, int kBits, bool kSymmetric, bool kStochastic>
void encode_blocks(const QuantizeArgs& a, const Scales& s, const typename Memory<S>::Element* x, std::int64_t begin,
                   std::int64_t count, Out& out) {
    Random<kBuffer, kStochastic> random;
    const std::int64_t size = a.form.block_size;
    const std::int64_t most = size > kBuffer ? kBuffer : kBuffer / size * size;
    for (std::int64_t i = 0; i < count;) {  // whole blocks, or pieces of one, as many as there is room for
        const std::int64_t some = std::min(count - i, most);
        random.draw(a.key, begin + i, some);
        std::uint8_t* bytes = out.next((some * kBits + 7) / 8);
        for (std::int64_t j = 0; j < some;) {
            const std::int64_t k = (i + j) / size, run = std::min(some - j, (k + 1) * size - i - j);
            const Encode<S, kBits, kSymmetric, kStochastic> encode(s, k);
            encode.run(x + i + j, random.at(j), bytes + j * kBits / 8, run);
            j += run;
        }
        i += some;
    }
}

template <DType S, int kBits, bool kSymmetric>
void encode_blocks(const QuantizeArgs& a, const Scales& s, const typename Memory<S>::Element* x, std::int64_t begin,
                   std::int64_t count, Out& out) {
    if (a.stochastic) return encode_blocks<S, kBits, kSymmetric, true>(a, s, x, begin, count, out);
    return encode_blocks<S, kBits, kSymmetric, false>(a, s, x, begin, count, out);
}

template <DType S, int kBits, bool kSymmetric>
void quantize_batch(const QuantizeArgs& a, std::int64_t block, std::int64_t blocks, Out& out) {
    using Element = typename Memory<S>::Element;
    const std::int64_t size = a.form.block_size, begin = block * size, count = std::min(blocks * size, a.numel - begin);
    const auto* x = static_cast<const Element*>(a.src) + begin;
    Scales s;
    for (std::int64_t k = 0; k < blocks; ++k) {
        Extent<S, kSymmetric> extent;
        extent.add(x + k * size, std::min(size, count - k * size));
        extent.store(s, k);
    }
    find_scales<kBits, kSymmetric>(s, blocks);
    put_scales<kSymmetric>(a, s, block, blocks);
    encode_blocks<S, kBits, kSymmetric>(a, s, x, begin, count, out);
}

template <DType S, int kBits, bool kSymmetric>
void quantize_range(const QuantizeArgs& a, std::int64_t first, std::int64_t last) {
    const std::int64_t room = kAheadOfFloats / std::int64_t(sizeof(typename Memory<S>::Element));
    const std::int64_t batch = std::min<std::int64_t>(std::max<std::int64_t>(room / a.form.block_size, 1), kBatch);
    const std::int64_t batches = (last - first + batch - 1) / batch;
    const std::int64_t streams = batches < 4 * kStreams ? 1 : kStreams, length = (batches + streams - 1) / streams;
    const auto block_of = [&](std::int64_t k) { return first + k * batch; };
    Out out[kStreams];
    for (std::int64_t k = 0; k < streams; ++k) {
        const std::int64_t begin = block_of(k * length) * a.form.block_size;
        out[k].start(a.out + a.form.values + begin * kBits / 8, a.stream);
    }
    for (std::int64_t i = 0; i < length; ++i) {
        for (std::int64_t k = 0; k < streams && k * length + i < batches; ++k) {
            const std::int64_t block = block_of(k * length + i);
            quantize_batch<S, kBits, kSymmetric>(a, block, std::min(batch, last - block), out[k]);
        }
    }
    for (std::int64_t k = 0; k < streams; ++k) out[k].finish();
}

template <DType S>
void quantize_from(const QuantizeArgs& a, std::int64_t first, std::int64_t last) {
    if (a.form.bits == 4) {
        if (a.form.symmetric) return quantize_range<S, 4, true>(a, first, last);
        return quantize_range<S, 4, false>(a, first, last);
    }
    if (a.form.symmetric) return quantize_range<S, 8, true>(a, first, last);
    return quantize_range<S, 8, false>(a, first, last);
}

}  // namespace

void accel::ACCEL_ISA::quantize(const QuantizeArgs& a, std::int64_t first_block, std::int64_t last_block) {
    switch (a.src_dtype) {
        case DType::bf16: quantize_from<DType::bf16>(a, first_block, last_block); break;
        case DType::f16: quantize_from<DType::f16>(a, first_block, last_block); break;
        default: quantize_from<DType::f32>(a, first_block, last_block);
    }
    if (a.stream) stream_fence();
}

void accel::ACCEL_ISA::dequantize_sum(const DequantizeArgs& a, std::int64_t begin, std::int64_t end) {
    alignas(64) float buffer[kBuffer];
    for (std::int64_t i = begin; i < end; i += kBuffer) {
        const std::int64_t count = std::min(end - i, kBuffer);
        sum_messages(a.sum, i, count, buffer);
        write_floats(buffer, a.out, a.out_dtype, i, count, a.stream);
    }
    if (a.stream) stream_fence();
}
