// How conv3x3 on the CPU cuts up its data: Winograd's F(2×2, 3×3) (Lavin & Gray 2016), whose names these are.
//
// A tile is 2 × 2 pixels of y; it depends on 4 × 4 of x. Both transforms are sums and differences alone, and between them stand 16
// products, one a point ξ, of (tiles, channels_in) with (channels_in, channels_out): 16 multiplications where the sum has 36.
//
//   U = G g Gᵀ           the weight's transform: (panels, points, channels_in, panel)
//   V = Bᵀ d B           a block of tiles of x:             (points, groups, chunks, group, chunk)
//   M = V U, a point     a panel of it:                     (points, tiles, panel)
//   y = Aᵀ M A           + bias + residual
//
// A row of V is in chunks so that the product reads all tiles of a group at fixed distances from one address.
#pragma once
#include "vector.h"

namespace ddpm_fast::cpu::DDPM_ISA {
namespace {

constexpr int tile_size = 2, window = 4, points = window * window;
constexpr int panel = conv3x3_panel;  // output channels of one task: two registers of AVX-512
constexpr int chunk = 16;             // input channels
constexpr int group = 12;             // tiles: at two registers each 24 sums, and what they are made of: AVX-512's 32 registers

// Of V and M of a block of tiles, which are read as soon as they are written: with U they fit the second-level cache. Where U alone
// does not, each block fetches it from the third level, so that blocks are as large as the second level lets them be.
constexpr int64_t block_floats = 128 * 1024, large_block_floats = 320 * 1024, large_weight_floats = 256 * 1024;

// What one more thread is woken for, in multiplications: some microseconds of them.
constexpr int64_t multiplications_an_element = 16;

// How one call is cut up. Every tile is computed by itself, so that neither the cut nor the batch changes a bit.
struct Tiling {
  explicit Tiling(const Conv3x3Arguments& a)
      : rows((a.height + 1) / tile_size), columns((a.width + 1) / tile_size), tiles(a.samples * rows * columns),
        chunks((a.channels_in + chunk - 1) / chunk), panels((a.channels_out + panel - 1) / panel) {
    const bool large = points * a.channels_in * a.channels_out > large_weight_floats;
    const int64_t fitting = (large ? large_block_floats : block_floats) / (points * (chunks * chunk + panel)) / group * group;
    blocks = fitting < group ? (tiles + group - 1) / group : (tiles + fitting - 1) / fitting;
    if (blocks > 1 && a.threads > 1) blocks = (blocks + a.threads - 1) / a.threads * a.threads;  // as many for each
    block = ((tiles + blocks - 1) / blocks + group - 1) / group * group;
    blocks = (tiles + block - 1) / block;
  }
  // Floats from one point to the next: a cache line more than there are, lest all points share a set of the cache.
  int64_t v_stride() const { return block * chunks * chunk + 16; }
  int64_t m_stride() const { return block * panel + 16; }

  const int64_t rows, columns, tiles, chunks, panels;  // rows and columns: of tiles in an image
  int64_t blocks, block;                               // block: tiles of each
};

// A thread's memory, which stays from call to call: new pages would cost more than what is written to them.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  float* floats(int64_t count) {
    if (count > count_) {
      ::operator delete(data_, std::align_val_t(64));
      data_ = nullptr, count_ = 0;
      data_ = static_cast<float*>(::operator new(size_t(count) * sizeof(float), std::align_val_t(64)));
      count_ = count;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace
}  // namespace ddpm_fast::cpu::DDPM_ISA
