// One way to split work over threads. How it is split never changes a result: every task is computed alone.
#pragma once
#include <pthread.h>

#include <new>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#include "kernels.h"

namespace ddpm_fast::cpu::DDPM_ISA {
namespace {

// libgomp's worker threads do not survive fork(), and waking them in the child hangs; a forked child (a DataLoader
// worker) therefore runs alone.
bool forked_child = false;
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked_child = true; });

// Waking a second thread costs about as much as this many elements of any kernel.
constexpr int64_t elements_a_thread = 8192;

// libgomp is not instrumented: ThreadSanitizer is told of the order that the team's start and end impose. It looks at the body
// alone, because the addresses of what the team shares are stored by the compiler after `start` and read before it.
#if defined(__SANITIZE_THREAD__)
#define DDPM_TEAM __attribute__((no_sanitize("thread")))
#define DDPM_BODY __attribute__((noinline)) static
inline void releases(void* fence) { __tsan_release(fence); }
inline void acquires(void* fence) { __tsan_acquire(fence); }
#else
#define DDPM_TEAM
#define DDPM_BODY DDPM_INLINE
inline void releases(void*) {}
inline void acquires(void*) {}
#endif

template <typename Body>
DDPM_BODY void run(const Body& body, int64_t first, int64_t last) {
  body(first, last);
}

// Calls body(first, last) for ranges that make up [0, tasks), one a thread.
template <typename Body>
DDPM_TEAM void parallel_ranges(int64_t tasks, int64_t elements, int threads, const Body& body) {
#if defined(_OPENMP)
  if (threads > 1 && tasks > 1 && elements >= 2 * elements_a_thread && !forked_child) {
    bool failed = false;  // for want of memory: an exception must not leave the team
    [[maybe_unused]] char start, end;
    releases(&start);
#pragma omp parallel num_threads(threads)
    {
      acquires(&start);
      // The whole team is woken, as PyTorch's own operators do: a team of another size would be built anew.
      int64_t team = omp_get_num_threads(), rank = omp_get_thread_num(), useful = elements / elements_a_thread;
      if (team > useful) team = useful;
      try {
        if (rank < team) run(body, tasks * rank / team, tasks * (rank + 1) / team);
      } catch (...) {
#pragma omp atomic write
        failed = true;
      }
      releases(&end);
    }
    acquires(&end);
    if (failed) throw std::bad_alloc();
    return;
  }
#endif
  (void)elements, (void)threads;
  run(body, 0, tasks);
}

}  // namespace
}  // namespace ddpm_fast::cpu::DDPM_ISA
