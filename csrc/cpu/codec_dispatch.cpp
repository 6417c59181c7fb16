#include "codec_dispatch.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "parallel.h"

namespace accel {

void run_quantize(const CodecKernels& kernels, QuantizeArgs args, int num_threads) {
    args.stream = args.numel * args.form.bits / 8 >= kStreamBytes;
    const std::int64_t size = args.form.block_size;
    const auto some = [&](std::int64_t begin, std::int64_t end) {
        const auto kernel = args.src == nullptr ? kernels.requantize_sum : kernels.quantize;
        kernel(args, begin / size, (end + size - 1) / size);
    };
    parallel(args.numel, num_threads, some, (kGrain + size - 1) / size * size);
}

void run_dequantize_sum(const CodecKernels& kernels, DequantizeArgs args, int num_threads) {
    args.stream = args.numel * dtype_bytes(args.out_dtype) >= kStreamBytes;
    parallel(args.numel, num_threads,
             [&](std::int64_t begin, std::int64_t end) { kernels.dequantize_sum(args, begin, end); });
}

namespace {

// The sum of the pieces' sums, added in halves: Note [Order of the sum], reference/signs.py.
double halves(std::vector<double>& sums) {
    std::size_t width = 1;
    while (width < sums.size()) width *= 2;
    for (width /= 2; width > 0; width /= 2) {
        for (std::size_t k = 0; k + width < sums.size(); ++k) sums[k] += sums[k + width];
        sums.resize(std::min(sums.size(), width));
    }
    return sums[0];
}

}  // namespace

void run_pack_signs(const CodecKernels& kernels, PackSignsArgs args, std::uint8_t* out, std::int64_t numel,
                    int num_threads) {
    std::vector<double> sums(std::size_t((numel + kSignPiece - 1) / kSignPiece));
    const auto some_sums = [&](std::int64_t begin, std::int64_t end) {
        kernels.sign_sums(args, begin, end, sums.data() + begin / kSignPiece);
    };
    parallel(numel, num_threads, some_sums, kSignPiece);
    const double mean = halves(sums) / double(numel);
    const float scale = float(args.squared ? std::sqrt(mean) : mean);
    args.keep_error = !std::isfinite(scale);
    args.scale = args.keep_error ? std::numeric_limits<float>::quiet_NaN() : scale;
    args.bits = out + sizeof args.scale;
    std::memcpy(out, &args.scale, sizeof args.scale);
    parallel(numel, num_threads,
             [&](std::int64_t begin, std::int64_t end) { kernels.pack_signs(args, begin, end); });
}

void run_mean_signs(const CodecKernels& kernels, MeanSignsArgs args, std::int64_t numel, int num_threads) {
    args.stream = numel * dtype_bytes(args.out_dtype) >= kStreamBytes;
    parallel(numel, num_threads, [&](std::int64_t begin, std::int64_t end) { kernels.mean_signs(args, begin, end); });
}

}  // namespace accel
