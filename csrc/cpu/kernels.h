// The CPU kernels, and how one of their builds is chosen.
//
// Every <op>.cpp in this folder is compiled once per instruction set (DDPM_ISA = portable, avx2, avx512) into a
// namespace of that name; `kernels()` returns the table of the best one that this processor runs. Nothing but these
// tables is visible outside a build: helpers are force-inlined or in an unnamed namespace, so that the linker cannot
// pick an AVX-512 copy of an inline function for the portable build.
#pragma once
#include "../common/arguments.h"

namespace ddpm_fast::cpu {

struct Kernels {
  const char* isa;
  void (*randn)(const RandnArguments&);
  void (*q_sample)(const QSampleArguments&);
};

const Kernels& kernels();
bool select_isa(const char* isa);  // for tests; null goes back to the best. False where this processor lacks it.
int available_isas(const char* names[3]);

#define DDPM_DECLARE_KERNELS(isa) \
  namespace isa { \
  void randn(const RandnArguments&); \
  void q_sample(const QSampleArguments&); \
  }
DDPM_DECLARE_KERNELS(portable)
#if defined(DDPM_FAST_X86)
DDPM_DECLARE_KERNELS(avx2)
DDPM_DECLARE_KERNELS(avx512)
#endif

}  // namespace ddpm_fast::cpu
