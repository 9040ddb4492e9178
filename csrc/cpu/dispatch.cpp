// Chooses the build of the kernels at run time.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace ddpm_fast::cpu {
namespace {

#define DDPM_ENTRY(kernel, Arguments) kernel,
#define DDPM_TABLE(isa) \
  constexpr Kernels isa##_table() { \
    using namespace isa; \
    return {#isa, DDPM_KERNELS(DDPM_ENTRY)}; \
  }
DDPM_TABLE(portable)
#if defined(DDPM_FAST_X86)
DDPM_TABLE(avx2)
DDPM_TABLE(avx512)
#endif

constexpr Kernels tables[] = {
#if defined(DDPM_FAST_X86)
    avx512_table(),
    avx2_table(),
#endif
    portable_table(),
};

bool runs_here(const Kernels& table) {
#if defined(DDPM_FAST_X86)
  __builtin_cpu_init();
  if (!std::strcmp(table.isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
  if (!std::strcmp(table.isa, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !std::strcmp(table.isa, "portable");
}

const Kernels* find(const char* isa) {
  for (const Kernels& table : tables)
    if (runs_here(table) && (!isa || !std::strcmp(table.isa, isa))) return &table;
  return nullptr;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_relaxed);
  if (!table) chosen.store(table = find(nullptr), std::memory_order_relaxed);
  return *table;
}

bool select_isa(const char* isa) {
  const Kernels* table = find(isa);
  if (table) chosen.store(table, std::memory_order_relaxed);
  return table != nullptr;
}

int available_isas(const char* names[3]) {
  int count = 0;
  for (const Kernels& table : tables)
    if (runs_here(table)) names[count++] = table.isa;
  return count;
}

}  // namespace ddpm_fast::cpu
