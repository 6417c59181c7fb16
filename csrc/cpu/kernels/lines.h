// Bytes that are made in small portions, written to any address in whole lines past the caches.
#pragma once
#include "codec.h"

namespace {

// Room for kPortion bytes at a time. Lines are written when the next portion is asked for: by then what was put there has
// left the processor's store buffer, from which a load across two stores could not be served.
template <std::int64_t kPortion>
class Lines {
  public:
    void start(std::uint8_t* to, bool stream) {
        skipped_ = stream ? std::int64_t(reinterpret_cast<std::uintptr_t>(to) % kStreamAlign) : 0;
        filled_ = skipped_;
        to_ = to - skipped_;
        stream_ = stream;
    }

    // Where the next `count` bytes belong.
    std::uint8_t* next(std::int64_t count) {
        if (!stream_) {
            std::uint8_t* place = to_;
            to_ += count;
            return place;
        }
        write_lines();
        std::uint8_t* place = bytes_ + filled_;
        filled_ += count;
        return place;
    }

    void finish() {
        if (!stream_) return;
        write_lines();
        std::memcpy(to_ + skipped_, bytes_ + skipped_, std::size_t(filled_ - skipped_));
    }

  private:
    alignas(64) std::uint8_t bytes_[kPortion + 2 * kStreamAlign];
    std::uint8_t* to_;  // where bytes_[0] belongs
    std::int64_t filled_, skipped_;  // the first `skipped_` bytes are not ours
    bool stream_;

    void write_lines() {
        std::int64_t i = 0;
        if (skipped_ > 0 && filled_ >= kStreamAlign) {
            std::memcpy(to_ + skipped_, bytes_ + skipped_, std::size_t(kStreamAlign - skipped_));
            skipped_ = 0;
            i = kStreamAlign;
        }
        for (; i + kStreamAlign <= filled_; i += kStreamAlign) stream_line(bytes_ + i, to_ + i);
        if (i == 0) return;
        std::memcpy(bytes_, bytes_ + i, kStreamAlign);  // what is left is less than a line
        to_ += i;
        filled_ -= i;
    }
};

}  // namespace
