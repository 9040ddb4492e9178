// One way to split work over threads. How it is split never changes a result: every block is computed alone.
#pragma once
#include <pthread.h>

#include "kernels.h"

namespace ddpm_fast::cpu::DDPM_ISA {
namespace {

// libgomp's worker threads do not survive fork(), and waking them in the child hangs; a forked child (a DataLoader
// worker) therefore runs alone.
bool forked_child = false;
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked_child = true; });

// Waking a second thread costs about as much as drawing this many normals.
constexpr int64_t parallel_elements = 16384;

// Calls body(block) for each block in [0, blocks).
template <typename Body>
void parallel_for(int64_t blocks, int64_t elements, int threads, const Body& body) {
  if (threads <= 1 || elements < parallel_elements || forked_child) {
    for (int64_t block = 0; block < blocks; ++block) body(block);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < blocks; ++block) body(block);
}

}  // namespace
}  // namespace ddpm_fast::cpu::DDPM_ISA
