#include "engine.h"

#include <cerrno>
#include <stdexcept>

namespace accel::transfer {

std::shared_ptr<Request> Engine::submit(std::vector<Piece> pieces, bool writes) {
    auto request = make_shared_here<Request>(std::move(pieces), writes);
    std::lock_guard<std::mutex> lock(mutex_);
    if (closing_) throw std::logic_error("the engine is closed");
    for (const Piece& piece : request->pieces) {
        if (piece.file->detached) throw std::logic_error("the file is closed");
    }
    for (const Piece& piece : request->pieces) ++piece.file->num_running;
    if (request->pieces.empty()) {
        end(*request);
    } else {
        queue_.push_back(request);
        wake();
    }
    return request;
}

bool Engine::wait(Request& request, std::chrono::milliseconds at_most) {
    std::unique_lock<std::mutex> lock(mutex_);
    return request.finished.wait_for(lock, at_most, [&] { return request.done.load(); });
}

bool Engine::detach(File& file, std::chrono::milliseconds at_most) {
    std::unique_lock<std::mutex> lock(mutex_);
    file.detached = true;
    return file.idle.wait_for(lock, at_most, [&] { return file.num_running == 0; });
}

int Engine::add_buffer(std::byte*, std::int64_t) { return -EOPNOTSUPP; }
void Engine::remove_buffer(int) {}

bool Engine::next(Op& op) {
    if (!again_.empty()) {
        op = std::move(again_.front());
        again_.pop_front();
        return true;
    }
    while (!queue_.empty()) {
        const std::shared_ptr<Request>& request = queue_.front();
        if (!request->failed && request->piece < request->pieces.size()) {
            op = cut(request, settings_.block_bytes);
            ++request->num_in_flight;
            if (request->piece == request->pieces.size()) queue_.pop_front();
            return true;
        }
        queue_.pop_front();
    }
    return false;
}

void Engine::finish(Op op, std::int64_t result) {
    Request& request = *op.request;
    int code = 0;
    bool failed = false;
    if (result == -EINTR || result == -EAGAIN) {
        result = 0;
    } else if (result == -EINVAL && op.direct) {
        // A file system that opens with O_DIRECT and then cannot, or has coarser blocks than it said.
        op.direct = op.bounce = false;
        result = 0;
    } else if (result <= 0) {
        failed = true;
        code = result < 0 ? int(-result) : request.writes ? EIO : 0;
        result = 0;
    }
    request.bytes_done += result;
    op.offset += result;
    op.memory += result;
    op.nbytes -= result;
    if (failed && !request.failed) {
        request.failed = true;
        request.failure = {code, op.piece, op.offset};
    }
    if (op.nbytes > 0 && !request.failed) {
        if (op.direct && (op.offset % op.file().align != 0 || op.nbytes % op.file().align != 0)) {
            op.direct = op.bounce = false;  // stopped inside a block, as at the end of a file
        }
        again_.push_back(std::move(op));
        return;
    }
    const bool all_cut = request.failed || request.piece == request.pieces.size();
    if (--request.num_in_flight == 0 && all_cut) end(request);
}

void Engine::end(Request& request) {
    for (const Piece& piece : request.pieces) {
        if (--piece.file->num_running == 0) piece.file->idle.notify_all();
    }
    request.done.store(true);
    request.finished.notify_all();
}

}  // namespace accel::transfer
