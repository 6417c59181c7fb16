// How a call of an inference op is split over threads.
#pragma once
#include <string>
#include <vector>

#include "accel/inference.h"

namespace accel {

void run_linear(const InferenceKernels&, const LinearArgs&, int num_threads);
// Throws std::invalid_argument where lengths or block ids would lead outside the tensors.
void run_attention(const InferenceKernels&, const AttentionArgs&, std::int64_t num_tokens, int num_threads);
void run_write_kv(const InferenceKernels&, const WriteKvArgs&, std::int64_t num_tokens, int num_threads);
void run_rms_norm(const InferenceKernels&, const RmsNormArgs&, std::int64_t num_rows, int num_threads);
void run_rotary(const InferenceKernels&, const RotaryArgs&, std::int64_t num_rows, int num_threads);
void run_gated(const InferenceKernels&, const GatedArgs&, std::int64_t num_rows, int num_threads);
float run_read(const InferenceKernels&, const float* p, std::int64_t numel, int num_threads);

}  // namespace accel
