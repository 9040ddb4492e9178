// The CPU kernels, and how one of their builds is chosen.
//
// Every <op>.cpp in this folder is compiled once per instruction set (DDPM_ISA = portable, avx2, avx512) into a
// namespace of that name; `kernels()` returns the table of the best one that this processor runs. Nothing but these
// tables is visible outside a build: helpers are force-inlined or in an unnamed namespace, so that the linker cannot
// pick an AVX-512 copy of an inline function for the portable build.
#pragma once
#include "../common/arguments.h"

// Every kernel with its arguments.
#define DDPM_KERNELS(K) \
  K(randn, RandnArguments) \
  K(q_sample, QSampleArguments) \
  K(simple_loss, SimpleLossArguments) \
  K(p_step, PStepArguments) \
  K(p_step_backward, PStepArguments) \
  K(gaussian_kl, GaussianKLArguments) \
  K(vlb_terms, VlbTermsArguments) \
  K(group_norm, GroupNormArguments) \
  K(group_norm_backward, GroupNormArguments) \
  K(conv3x3, Conv3x3Arguments) \
  K(conv3x3_weight, Conv3x3WeightArguments)

namespace ddpm_fast::cpu {

struct Kernels {
  const char* isa;
#define DDPM_MEMBER(kernel, Arguments) void (*kernel)(const Arguments&);
  DDPM_KERNELS(DDPM_MEMBER)
#undef DDPM_MEMBER
};

const Kernels& kernels();
bool select_isa(const char* isa);  // for tests; null goes back to the best. False where this processor lacks it.
int available_isas(const char* names[3]);

#define DDPM_DECLARE(kernel, Arguments) void kernel(const Arguments&);
namespace portable {
DDPM_KERNELS(DDPM_DECLARE)
}
#if defined(DDPM_FAST_X86)
namespace avx2 {
DDPM_KERNELS(DDPM_DECLARE)
}
namespace avx512 {
DDPM_KERNELS(DDPM_DECLARE)
}
#endif
#undef DDPM_DECLARE

}  // namespace ddpm_fast::cpu
