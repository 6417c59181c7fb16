// Codec calls over threads.
#pragma once
#include "accel/codecs.h"

namespace accel {

void run_quantize(const CodecKernels&, QuantizeArgs, int num_threads);
void run_dequantize_sum(const CodecKernels&, DequantizeArgs, int num_threads);
// The whole message: scale, bits and error.
void run_pack_signs(const CodecKernels&, PackSignsArgs, std::uint8_t* out, std::int64_t numel, int num_threads);
void run_mean_signs(const CodecKernels&, MeanSignsArgs, std::int64_t numel, int num_threads);

}  // namespace accel
