// randn: the noise contract written out. Writes samples * elements * sizeof(T) bytes, reads nothing.
#include "block.h"

namespace ddpm_fast::cpu::DDPM_ISA {

namespace {

struct State {
  explicit State(const RandnArguments& a) : normals(a.key, a.sizes) {}
  Normals normals;
  Buffer buffer;
};

}  // namespace

void randn(const RandnArguments& a) {
  for_each_block<State>(a, [&](State& state, int64_t sample, int64_t first, int64_t count) {
    const int64_t offset = sample * a.sizes.elements + first;
    std::memcpy(place_for(a.out, offset, state.buffer), state.normals.draw(sample, first, count), size_t(count) * sizeof(float));
    write(a.out, offset, count, state.buffer);
  });
}

}  // namespace ddpm_fast::cpu::DDPM_ISA
