#include "request.h"

#include <algorithm>

namespace accel::transfer {

Op cut(const std::shared_ptr<Request>& request, std::int64_t block_bytes) {
    Request& r = *request;
    const Piece& piece = r.pieces[r.piece];
    const File& file = *piece.file;
    Op op;
    op.request = request;
    op.piece = r.piece;
    op.offset = piece.offset + r.within;
    op.memory = piece.memory + r.within;
    const std::int64_t left = piece.nbytes - r.within;
    const std::int64_t past = op.offset % file.align;
    const std::int64_t whole = left / file.align * file.align;
    if (file.direct < 0) {
        op.nbytes = std::min(left, block_bytes);
    } else if (past != 0 || whole == 0) {
        op.nbytes = std::min(left, file.align - past);
    } else {
        op.nbytes = std::min(whole, std::max(file.align, block_bytes / file.align * file.align));
        op.direct = true;
        op.bounce = reinterpret_cast<std::uintptr_t>(op.memory) % std::uintptr_t(file.memory_align) != 0;
    }
    r.within += op.nbytes;
    if (r.within == piece.nbytes) {
        ++r.piece;
        r.within = 0;
    }
    return op;
}

}  // namespace accel::transfer
