// One run of elements that share an optimizer's coefficients, as Python packs it (segments.py: RECORD).
//
// The coefficients are computed once, in double precision, in Python and rounded once to fp32, so that every
// back end and every instruction set starts from the same bits. What c[k] means is written at each kernel.
#pragma once
#include <cstdint>

namespace accel {

struct Segment {
    std::int64_t start;  // first element
    std::int64_t stop;   // one past the last element
    float c[8];
    std::uint32_t flags;
    std::uint32_t reserved;
};
static_assert(sizeof(Segment) == 56, "segments.py packs 56 bytes");

// One tensor of a table, as Python packs it (tables.py: ROW); 0 where there is no second state or no copy.
struct TableRow {
    std::uint64_t param, grad, state0, state1, low;
    std::int64_t numel;
    std::int32_t segment;  // which segment's coefficients; its range is not looked at
    std::uint8_t grad_dtype, low_dtype, reserved[2];
};
static_assert(sizeof(TableRow) == 56, "tables.py packs 56 bytes");

// Segment::flags
constexpr std::uint32_t kFlagL2 = 1;        // weight decay is added to the gradient, as decay * param
constexpr std::uint32_t kFlagMomentum = 2;  // SGD: a momentum buffer is read and written
constexpr std::uint32_t kFlagFirst = 4;     // SGD: the buffer holds nothing yet
constexpr std::uint32_t kFlagNesterov = 8;  // SGD

}  // namespace accel
