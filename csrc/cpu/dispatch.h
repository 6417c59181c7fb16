// Which instruction set runs, and how a call's work is split over threads.
#pragma once
#include <string>
#include <vector>

#include "accel/codecs.h"
#include "accel/inference.h"
#include "accel/kernels.h"

namespace accel {

// Names of the instruction sets that this build holds and this processor runs, best first.
std::vector<std::string> available_isas();

// The kernels of one of them; of the best for "". Throws std::invalid_argument for another name.
const Kernels& kernels_for(const std::string& isa);
const InferenceKernels& inference_kernels_for(const std::string& isa);
const CodecKernels& codec_kernels_for(const std::string& isa);

bool has_openmp();

// Number of elements below which a call stays on the calling thread.
constexpr std::int64_t kSerialElements = 1 << 15;
// From this size on, what is only written goes around the caches: it would not stay in them anyway.
constexpr std::int64_t kStreamBytes = std::int64_t(8) << 20;

void run_step(const Kernels&, Optimizer, const StepArgs&, int num_threads);
// Many tensors as one: threads share out the elements of all rows, whatever tensors they lie in.
void run_table(const Kernels&, Optimizer, const TableRow* rows, std::int64_t num_rows, const Segment* segments,
               float grad_scale, int num_threads);
void run_cast(const Kernels&, CastArgs, std::int64_t numel, int num_threads);
NormPartial run_norm(const Kernels&, const void* grad, DType, std::int64_t numel, int num_threads);
void run_stream(const Kernels&, float* p, const float* g, float* m, float* v, std::int64_t numel, bool non_temporal,
                int num_threads);
// A sum that means nothing; whole lines of kLineBytes.
float run_stream_mix(const Kernels&, const float* src, std::int64_t read_bytes, float* dst, std::int64_t written_bytes,
                     std::int64_t places, bool non_temporal, int num_threads);

}  // namespace accel
