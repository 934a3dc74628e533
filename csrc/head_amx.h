// The AMX instructions by their documented names. A test defines FP_AMX_INTRINSICS, the header of an emulation.
#pragma once
#ifdef FP_AMX_INTRINSICS
#include FP_AMX_INTRINSICS
#else
#include <immintrin.h>
#endif

#include <cstdint>

namespace fastpref {
namespace FP_ISA {
namespace {

// What LDTILECFG reads, 64 bytes. Intel SDM, volume 1, section 18.2
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// eight tiles of 16 rows of 64 bytes
constexpr TileConfig kFullTiles = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

struct TilesConfigured {  // of this thread
  TilesConfigured() { _tile_loadconfig(&kFullTiles); }
  ~TilesConfigured() { _tile_release(); }
  TilesConfigured(const TilesConfigured&) = delete;
  TilesConfigured& operator=(const TilesConfigured&) = delete;
};

}  // namespace
}  // namespace FP_ISA
}  // namespace fastpref
