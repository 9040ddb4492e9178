// attention on CUDA: launch plans and launchers. The plans are pure functions, so that tests launch what the launcher would.
#pragma once
#include <array>

#include "../common/arguments.h"

namespace ddpm_fast::cuda {

// A kernel and how it is launched: `blocks` in x, `threads` of each.
struct AttentionLaunch {
  const char* kernel;    // its name in the source
  int padded_channels;   // its template parameters: head_channels rounded up, or 0
  int gradient;          // ... and an AttentionGradient, or 0
  int64_t blocks;
  uint32_t threads, shared_bytes;
};

// What a launch of the backward pass over keys accumulates, to be or-ed.
enum AttentionGradient : int { grad_keys = 1, grad_values = 2 };

struct AttentionBackwardPlan {
  std::array<AttentionLaunch, 4> launches;  // in order
  int count;                                // that there are
  int64_t workspace;                        // floats
};

AttentionLaunch attention_plan(int64_t samples, int64_t tokens, int64_t heads, int64_t head_channels, DType dtype);
AttentionBackwardPlan attention_backward_plan(int64_t samples, int64_t tokens, int64_t heads, int64_t head_channels, DType dtype);

// Launch on `stream` of `device` and return null, or an error's text. Every tensor starts at a multiple of 16 bytes;
// head_channels is a multiple of 8, at most 256.
const char* attention(const AttentionArguments& arguments, int device, void* stream);
const char* attention_backward(const AttentionArguments& arguments, int device, void* stream);

}  // namespace ddpm_fast::cuda
