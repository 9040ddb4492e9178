// group_norm's launch plans: how slabs are cut into tiles that fit the registers of a block.
#include <algorithm>

#include "group_norm.h"

namespace ddpm_fast::cuda {
namespace {

constexpr int64_t sector = 32, line = 128;    // bytes
constexpr int64_t most_channels = 512;        // of a tile: bounds the tables in shared memory
constexpr int64_t enough_threads = 128;       // of a block: with eight vectors a thread, enough loads in flight
constexpr int64_t split_threads = 256;        // of a block that has a part of a slab
constexpr int64_t many_tiles = 128;           // of a slab: from there on blocks are as large as can be, as each merges all of them
constexpr int64_t small_slab = 32768;         // bytes: one block has it done before a second launch would start
constexpr int64_t large_slab = 131072;        // bytes: of these a launch needs one for every multiprocessor, of smaller ones fewer
constexpr int64_t waves = 2;                  // blocks for each multiprocessor where slabs are cut,
constexpr int64_t fewest_items = 4;           // but not so small that reading all tiles' sums costs more than they save

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t power_of_two_from(int64_t a) {
  int64_t p = 1;
  while (p < a) p *= 2;
  return p;
}
bool is_power_of_two(int64_t a) { return power_of_two_from(a) == a; }

// Shared memory of a kernel: tables have a float for each channel of the tile, sums one for each channel and slot.
struct Kernel {
  int64_t most_threads;
  int tables, sums;
};
constexpr Kernel forward{group_norm_most_threads, 4, 2}, backward{group_norm_backward_most_threads, 8, 3};

// A tile before its slab is cut: threads along x and y, and the most positions that they hold.
struct Block { int64_t x, y, channels, positions; };

class Planner {
 public:
  Planner(const GroupNormSizes& sizes, const Kernel& kernel, int multiprocessors, bool aligned)
      : s_(sizes), kernel_(kernel), multiprocessors_(multiprocessors), bytes_(sizes.dtype == DType::float32 ? 4 : 2) {
    const int64_t whole = 16 / bytes_, contiguous = s_.channels_last ? s_.channels : s_.pixels;
    vector_ = aligned && contiguous % whole == 0 ? whole : 1;
    items_ = vector_ == 1 ? group_norm_many_items : group_norm_few_items;
    positions_ = s_.channels_last ? s_.pixels : s_.pixels / vector_;
    slab_groups_ = s_.channels_last ? groups_of_whole_sectors() : 1;
    while (s_.channels_last && wider_is_better()) slab_groups_ *= 2;
    slab_channels_ = slab_groups_ * (s_.channels / s_.groups);
    slabs_ = s_.samples * (s_.groups / slab_groups_);
  }

  int vector() const { return int(vector_); }
  int items() const { return int(items_); }

  // True where one block should take a whole slab; `launch` is the way to do it, else how to cut it.
  bool plan(GroupNormLaunch& launch) {
    const int64_t slab = slab_channels_ * s_.pixels * bytes_;
    const bool small = slab <= small_slab, enough = double(slabs_) * large_slab >= double(multiprocessors_) * slab;
    const int64_t fewest = items_;
    for (; items_ <= group_norm_many_items && (small || enough); items_ *= 2) {
      const Block block = s_.channels_last ? whole_slab_channels_last() : whole_slab_nchw();
      if (block.channels < slab_channels_ || block.positions < positions_ || block.x * block.y > kernel_.most_threads) continue;
      fill(launch, block, true);
      return true;
    }
    items_ = fewest;
    fill(launch, part_of_slab(), false);
    return false;
  }

 private:
  int64_t groups_of_whole_sectors() const {
    const int64_t group = s_.channels / s_.groups;
    for (int64_t k = 1; k <= s_.groups; ++k)
      if (s_.groups % k == 0 && k * group * bytes_ % sector == 0) return k;
    for (int64_t k = 1; k <= s_.groups; ++k)  // rows of pixels start within sectors: long runs share few of them
      if (s_.groups % k == 0 && k * group * bytes_ >= line && k * group % vector_ == 0) return k;
    return s_.groups;
  }

  // Where slabs are many and small, twice as wide ones still give every multiprocessor its blocks, and read longer runs.
  bool wider_is_better() const {
    const int64_t run = slab_groups_ * (s_.channels / s_.groups) * bytes_;
    return s_.groups % (2 * slab_groups_) == 0 && 2 * run <= line && 2 * run * s_.pixels <= small_slab &&
           s_.samples * (s_.groups / (2 * slab_groups_)) >= 2 * waves * multiprocessors_;
  }

  // Rows of threads for a row of x: the lanes of a warp that have the same channels are added up by shuffles, which takes whole warps.
  static int64_t row_unit(int64_t x) { return x < 32 && is_power_of_two(x) ? 32 / x : 1; }

  Block block_channels_last(int64_t x, int64_t y, int64_t channels) const {
    y = std::max(round_up(y, row_unit(x)), ceil_div(32, x));
    return {x, y, channels, y * items_};
  }

  int64_t tile_channels_last() const { return std::min({slab_channels_, most_channels, kernel_.most_threads * vector_}); }

  Block whole_slab_channels_last() const {
    const int64_t channels = tile_channels_last(), x = channels / vector_;
    const int64_t y = std::max(ceil_div(positions_, items_), std::min(positions_, enough_threads / x));
    return block_channels_last(x, y, channels);
  }

  static Block pad_nchw(Block block) {
    if (block.x < 32) block.y = round_up(block.y, 32 / block.x);
    return block;
  }

  Block whole_slab_nchw() const {
    int64_t x = std::max(power_of_two_from(ceil_div(positions_, items_)), std::min<int64_t>(32, power_of_two_from(positions_)));
    while (x > 1 && x * slab_channels_ > kernel_.most_threads && x / 2 * items_ >= positions_) x /= 2;
    while (x * slab_channels_ < enough_threads && x < positions_) x *= 2;
    return pad_nchw({x, slab_channels_, slab_channels_, x * items_});
  }

  Block part_of_slab() const {
    Block block = part_of_slab(split_threads);
    const int64_t tiles = ceil_div(slab_channels_, block.channels) * ceil_div(positions_, block.positions);
    if (tiles > many_tiles) block = part_of_slab(kernel_.most_threads);
    const int64_t channel_tiles = ceil_div(slab_channels_, block.channels);
    const int64_t wanted = ceil_div(waves * multiprocessors_, slabs_ * channel_tiles);
    if (ceil_div(positions_, block.positions) < wanted) {  // fewer items a thread, so that there is a block for every multiprocessor
      const int64_t step = s_.channels_last ? block.y : block.x;
      block.positions = std::min(block.positions, std::max(round_up(ceil_div(positions_, wanted), step), fewest_items * step));
    }
    return block;
  }

  Block part_of_slab(int64_t threads) const {
    if (s_.channels_last) {
      const int64_t channels = std::min(tile_channels_last(), threads * vector_), x = channels / vector_, unit = row_unit(x);
      return block_channels_last(x, std::max<int64_t>(1, threads / x / unit) * unit, channels);
    }
    const int64_t row = std::max(power_of_two_from(ceil_div(positions_, items_)), std::min<int64_t>(32, power_of_two_from(positions_)));
    const int64_t x = std::min(threads, row), y = std::min(slab_channels_, threads / x);
    return pad_nchw({x, y, y, x * items_});
  }

  void fill(GroupNormLaunch& launch, const Block& block, bool whole) const {
    GroupNormTile& tile = launch.tile;
    tile.phase = whole ? GroupNormPhase::whole : GroupNormPhase::sums;
    tile.groups = int32_t(slab_groups_);
    tile.channels = int32_t(block.channels);
    tile.positions = int32_t(std::min(block.positions, positions_));
    tile.channel_tiles = int32_t(ceil_div(slab_channels_, block.channels));
    tile.position_tiles = int32_t(ceil_div(positions_, tile.positions));
    if (s_.channels_last) tile.slots = int32_t(row_unit(block.x) > 1 ? block.x * block.y / 32 : block.y);
    else tile.slots = int32_t(std::max<int64_t>(1, block.x / 32));
    const int64_t samples_y = std::min<int64_t>(s_.samples, group_norm_grid_y);
    launch.grid[0] = uint32_t(s_.groups / slab_groups_ * tile.channel_tiles * tile.position_tiles);
    launch.grid[1] = uint32_t(samples_y);
    launch.grid[2] = uint32_t(ceil_div(s_.samples, samples_y));
    launch.block[0] = uint32_t(block.x);
    launch.block[1] = uint32_t(block.y);
    launch.shared = uint32_t(sizeof(float) * block.channels * (kernel_.tables + kernel_.sums * tile.slots));
  }

  GroupNormSizes s_;
  Kernel kernel_;
  int64_t multiprocessors_, bytes_;
  int64_t vector_, items_, positions_, slab_groups_, slab_channels_, slabs_;
};

GroupNormPlan launches(Planner planner) {
  GroupNormLaunch launch{};
  const bool whole = planner.plan(launch);
  GroupNormPlan plan{planner.vector(), planner.items(), {}, 0};
  plan.launches.push_back(launch);
  if (!whole) {
    launch.tile.phase = GroupNormPhase::results;
    plan.launches.push_back(launch);
  }
  return plan;
}

// Floats for the sums of tiles. Room for either alignment, so that a caller need not know what the launcher finds.
template <typename Floats> int64_t workspace(const GroupNormSizes& sizes, const Kernel& kernel, int multiprocessors, Floats floats) {
  int64_t most = 0;
  for (const bool aligned : {false, true}) {
    const GroupNormPlan plan = launches({sizes, kernel, multiprocessors, aligned});
    most = std::max(most, floats(plan.launches.size() > 1, plan.launches[0].tile));
  }
  return most;
}

}  // namespace

GroupNormPlan group_norm_plan(const GroupNormSizes& sizes, int multiprocessors, bool aligned) {
  GroupNormPlan plan = launches({sizes, forward, multiprocessors, aligned});
  plan.workspace = workspace(sizes, forward, multiprocessors, [&](bool cut, const GroupNormTile& tile) {
    return cut ? 4 * sizes.samples * sizes.groups * tile.channel_tiles * tile.position_tiles : 0;
  });
  return plan;
}

GroupNormPlan group_norm_backward_plan(const GroupNormSizes& sizes, int multiprocessors, bool aligned) {
  GroupNormPlan plan = launches({sizes, backward, multiprocessors, aligned});
  if (plan.launches.size() > 1) {
    GroupNormLaunch finish = plan.launches[0];
    finish.kernel = GroupNormKernel::finish;
    finish.grid[0] = uint32_t(sizes.groups);
    finish.block[0] = group_norm_finish_threads;
    finish.block[1] = 1;
    finish.shared = 0;
    plan.launches.insert(plan.launches.begin() + 1, finish);
  }
  const uint32_t blocks = uint32_t(ceil_div(sizes.channels, group_norm_columns));
  plan.launches.push_back({GroupNormKernel::parameters, {blocks, 1, 1}, {group_norm_columns, group_norm_rows}, 0, {}});
  plan.workspace = workspace(sizes, backward, multiprocessors, [&](bool cut, const GroupNormTile& tile) {
    return sizes.samples * (2 * sizes.channels + (cut ? 2 * sizes.groups + 3 * sizes.channels * tile.position_tiles : 0));
  });
  return plan;
}

}  // namespace ddpm_fast::cuda
