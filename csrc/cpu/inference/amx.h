// Tiles of the matrix unit: their shapes, for one thread and a while.
#pragma once
#include "vec.h"

namespace {

// The compiler does not know that a tile load reads memory: what was stored before must be there.
inline void written() { __asm__ volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t colsb[16] = {};
    std::uint8_t rows[16] = {};

    void set(int tile, int num_rows, int num_bytes) {
        rows[tile] = std::uint8_t(num_rows);
        colsb[tile] = std::uint16_t(num_bytes);
    }
};
static_assert(sizeof(TileConfig) == 64, "as the processor reads it");

// The shapes of all tiles, for the calling thread, until the object goes.
struct Tiles {
    explicit Tiles(const TileConfig& config) {
        written();
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

}  // namespace
