#include "bind_inference.h"

#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "inference_dispatch.h"

namespace py = pybind11;

namespace accel {

namespace {

// Calls in their order, to be made again with the same addresses.
using Tape = std::vector<std::function<void(int num_threads)>>;
thread_local Tape* recording = nullptr;

// Make a call, without the GIL, and note it where this thread records.
template <class Call>
void run(int num_threads, Call call) {
    {
        py::gil_scoped_release release;
        call(num_threads);
    }
    if (recording != nullptr) recording->push_back(std::move(call));
}

void replay(const Tape& tape, int num_threads) {
    py::gil_scoped_release release;
    for (const auto& call : tape) call(num_threads);
}

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Rows rows(std::uintptr_t address, std::int64_t token_stride, std::int64_t head_stride) {
    return {pointer<void>(address), token_stride, head_stride};
}

void linear(int kind, std::uintptr_t x, std::int64_t x_stride, std::uintptr_t weight, std::uintptr_t scale,
            std::uintptr_t zero, std::uintptr_t bias, std::uintptr_t out, std::int64_t m, std::int64_t n, std::int64_t k,
            std::int64_t group, int dtype, int num_threads, const std::string& isa) {
    const LinearArgs args{pointer<void>(x), x_stride, pointer<void>(weight), pointer<float>(scale),
                          pointer<std::uint8_t>(zero), pointer<void>(bias), pointer<void>(out), m, n, k, group,
                          DType(dtype), WeightKind(kind)};
    const InferenceKernels& kernels = inference_kernels_for(isa);
    run(num_threads, [=, &kernels](int threads) { run_linear(kernels, args, threads); });
}

void paged_attention(std::uintptr_t q, std::int64_t q_token_stride, std::int64_t q_head_stride, std::uintptr_t k_cache,
                     std::uintptr_t v_cache, std::uintptr_t k_scale, std::uintptr_t v_scale,
                     std::uintptr_t block_tables, std::int64_t table_stride, std::int64_t table_width,
                     std::uintptr_t query_starts, std::uintptr_t context_lens, std::uintptr_t alibi_slopes,
                     std::uintptr_t out, std::int64_t num_tokens, std::int64_t num_sequences, std::int64_t num_heads,
                     std::int64_t num_kv_heads, std::int64_t head_dim, std::int64_t num_blocks, std::int64_t block_size,
                     std::int64_t window, double scale, double softcap, int dtype, int num_threads,
                     const std::string& isa) {
    AttentionArgs args{};
    args.q = pointer<void>(q);
    args.q_token_stride = q_token_stride;
    args.q_head_stride = q_head_stride;
    args.k_cache = pointer<void>(k_cache);
    args.v_cache = pointer<void>(v_cache);
    args.k_scale = pointer<float>(k_scale);
    args.v_scale = pointer<float>(v_scale);
    args.block_tables = pointer<std::int32_t>(block_tables);
    args.query_starts = pointer<std::int32_t>(query_starts);
    args.context_lens = pointer<std::int32_t>(context_lens);
    args.alibi_slopes = pointer<float>(alibi_slopes);
    args.out = pointer<void>(out);
    args.num_sequences = num_sequences;
    args.num_heads = num_heads;
    args.num_kv_heads = num_kv_heads;
    args.head_dim = head_dim;
    args.num_blocks = num_blocks;
    args.block_size = block_size;
    args.table_width = table_width;
    args.table_stride = table_stride;
    args.window = window;
    args.scale = float(scale);
    args.softcap = float(softcap);
    args.dtype = DType(dtype);
    const InferenceKernels& kernels = inference_kernels_for(isa);
    run(num_threads, [=, &kernels](int threads) { run_attention(kernels, args, num_tokens, threads); });
}

void write_kv(std::uintptr_t k, std::int64_t k_token_stride, std::int64_t k_head_stride, std::uintptr_t v,
              std::int64_t v_token_stride, std::int64_t v_head_stride, std::uintptr_t k_cache, std::uintptr_t v_cache,
              std::uintptr_t k_scale, std::uintptr_t v_scale, std::uintptr_t slots, std::int64_t num_tokens,
              std::int64_t num_heads, std::int64_t head_dim, std::int64_t num_blocks, std::int64_t block_size, int dtype,
              int num_threads, const std::string& isa) {
    const WriteKvArgs args{{pointer<void>(k), pointer<void>(v)},
                           {k_token_stride, v_token_stride},
                           {k_head_stride, v_head_stride},
                           {pointer<void>(k_cache), pointer<void>(v_cache)},
                           {pointer<float>(k_scale), pointer<float>(v_scale)},
                           pointer<std::int64_t>(slots),
                           num_heads,
                           head_dim,
                           block_size,
                           DType(dtype)};
    const InferenceKernels& kernels = inference_kernels_for(isa);
    run(num_threads, [=, &kernels](int threads) {
        for (std::int64_t t = 0; t < num_tokens; ++t) {
            if (args.slots[t] >= num_blocks * block_size) {
                throw std::invalid_argument("slots[" + std::to_string(t) + "]: expected below " +
                                            std::to_string(num_blocks * block_size) + ", got " +
                                            std::to_string(args.slots[t]));
            }
        }
        run_write_kv(kernels, args, num_tokens, threads);
    });
}

void rms_norm(std::uintptr_t x, std::int64_t x_token, std::int64_t x_head, std::uintptr_t residual,
              std::int64_t residual_token, std::int64_t residual_head, std::uintptr_t out, std::int64_t out_token,
              std::int64_t out_head, std::uintptr_t weight, int weight_dtype, std::int64_t num_rows,
              std::int64_t num_heads, std::int64_t dim, double eps, double weight_offset, int dtype, int num_threads,
              const std::string& isa) {
    const RmsNormArgs args{rows(x, x_token, x_head), rows(residual, residual_token, residual_head),
                           rows(out, out_token, out_head), pointer<void>(weight), DType(weight_dtype), DType(dtype),
                           num_heads, dim, float(eps), float(weight_offset)};
    const InferenceKernels& kernels = inference_kernels_for(isa);
    run(num_threads, [=, &kernels](int threads) { run_rms_norm(kernels, args, num_rows, threads); });
}

void rotary(std::uintptr_t x, std::int64_t token_stride, std::int64_t head_stride, std::int64_t num_heads,
            std::uintptr_t cos, std::int64_t cos_stride, std::uintptr_t sin, std::int64_t sin_stride,
            std::int64_t num_positions, std::uintptr_t positions, std::int64_t num_tokens, std::int64_t half,
            bool interleaved, int dtype, int num_threads, const std::string& isa) {
    const RotaryArgs args{rows(x, token_stride, head_stride), pointer<float>(cos), pointer<float>(sin), cos_stride,
                          sin_stride, pointer<std::int64_t>(positions), num_heads, half, DType(dtype), interleaved};
    const InferenceKernels& kernels = inference_kernels_for(isa);
    run(num_threads, [=, &kernels](int threads) {
        for (std::int64_t t = 0; t < num_tokens; ++t) {
            if (args.positions[t] < 0 || args.positions[t] >= num_positions) {
                throw std::invalid_argument("positions[" + std::to_string(t) + "]: expected 0 to " +
                                            std::to_string(num_positions - 1) + ", got " +
                                            std::to_string(args.positions[t]));
            }
        }
        run_rotary(kernels, args, num_tokens * num_heads, threads);
    });
}

void gated(std::uintptr_t gate_up, std::int64_t stride, std::uintptr_t out, std::int64_t out_stride,
           std::int64_t num_rows, std::int64_t width, bool gelu, int dtype, int num_threads, const std::string& isa) {
    const GatedArgs args{pointer<void>(gate_up), pointer<void>(out), stride, out_stride, width, DType(dtype), gelu};
    const InferenceKernels& kernels = inference_kernels_for(isa);
    run(num_threads, [=, &kernels](int threads) { run_gated(kernels, args, num_rows, threads); });
}

float stream_read(std::uintptr_t p, std::int64_t numel, int num_threads, const std::string& isa) {
    const InferenceKernels& kernels = inference_kernels_for(isa);
    py::gil_scoped_release release;
    return run_read(kernels, pointer<float>(p), numel, num_threads);
}

}  // namespace

void bind_inference(py::module_& m) {
    py::class_<Tape>(m, "Tape")
        .def(py::init<>())
        .def("__len__", &Tape::size)
        .def("record", [](Tape& tape) { recording = &tape; })
        .def("replay", &replay);
    m.def("stop_recording", [] { recording = nullptr; });
    m.def("linear", &linear);
    m.def("paged_attention", &paged_attention);
    m.def("write_kv", &write_kv);
    m.def("rms_norm", &rms_norm);
    m.def("rotary", &rotary);
    m.def("gated", &gated);
    m.def("stream_read", &stream_read);
}

}  // namespace accel
