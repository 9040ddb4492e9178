// group_norm on CUDA: launch plans and launchers. The plans are pure functions, so that tests launch what the launchers would.
//
// A slab is what is normalised without a look at the rest: a group of a sample, or in channels_last as many neighbouring groups as
// fill whole 32-byte sectors. A tile is the part of a slab that the threads of one block hold in registers.
#pragma once
#include <vector>

#include "../common/arguments.h"

namespace ddpm_fast::cuda {

// What a kernel does with its tile: all at once where the tile is the whole slab, else its part of the sums, then the results.
enum class GroupNormPhase : int32_t { whole, sums, results };

// How the slabs of a sample are cut. A position is a vector of neighbouring pixels in NCHW, a pixel in channels_last.
struct GroupNormTile {
  GroupNormPhase phase;
  int32_t groups;                            // of a slab
  int32_t channels, positions;               // of a tile; the last ones of a slab may have fewer
  int32_t channel_tiles, position_tiles;     // of a slab
  int32_t slots;                             // partial sums of a channel in shared memory
};

// slabs is the kernel that the other two complete in backward: finish adds up the tiles of a group, parameters the samples.
enum class GroupNormKernel : int32_t { slabs, finish, parameters };

struct GroupNormLaunch {
  GroupNormKernel kernel;
  uint32_t grid[3];   // (tiles of a sample, samples, samples beyond the limit of y)
  uint32_t block[2];  // (x, y): consecutive threads take consecutive vectors of memory
  uint32_t shared;    // bytes
  GroupNormTile tile;
};

struct GroupNormPlan {
  int vector;                             // elements that a thread accesses at once: 16 bytes of them, or 1
  int items;                              // that a thread holds of them: few, or many, and these always where vector is 1
  std::vector<GroupNormLaunch> launches;  // in order; of slabs one, or sums and results
  int64_t workspace;                      // floats
};

struct GroupNormSizes {
  int64_t samples, channels, pixels, groups;
  bool channels_last;
  DType dtype;
};

constexpr int group_norm_most_threads = 512, group_norm_backward_most_threads = 256;
constexpr uint32_t group_norm_grid_y = 65535;   // the hardware's limit
constexpr int64_t group_norm_most_pixels = 1 << 30, group_norm_most_channels = 1 << 30;  // positions and channels are counted in 32 bits
constexpr int group_norm_finish_threads = 128;  // of a block that finishes one group's sums
constexpr int group_norm_columns = 32, group_norm_rows = 16;  // of a block that sums over samples: channels, and slices of the batch
constexpr int group_norm_parameters_threads = group_norm_columns * group_norm_rows;

// What a thread holds of x, vectors or single elements. With eight vectors a block of 256 threads covers 32 KiB and two blocks fill a
// multiprocessor; with sixteen one block does, for slabs that are larger. Backward holds as much of grad_y beside it.
constexpr int group_norm_few_items = 8, group_norm_many_items = 16;

// aligned: every tensor like x starts at a multiple of 16 bytes. The device's number of multiprocessors decides whether a slab
// that fits a block is cut all the same.
GroupNormPlan group_norm_plan(const GroupNormSizes& sizes, int multiprocessors, bool aligned);
GroupNormPlan group_norm_backward_plan(const GroupNormSizes& sizes, int multiprocessors, bool aligned);

// Launch on `stream` of `device`; return null, or the error's text. a.workspace has the floats that the plan asks for, and starts at a
// multiple of 16 bytes. Nothing is allocated and nothing waited for.
const char* group_norm(const GroupNormArguments& a, int device, void* stream);
const char* group_norm_backward(const GroupNormArguments& a, int device, void* stream);

}  // namespace ddpm_fast::cuda
