// randn: the noise contract written out. Writes samples * elements * sizeof(T) bytes, reads nothing.
#include "block.h"

namespace ddpm_fast::cpu::DDPM_ISA {

void randn(const RandnArguments& a) {
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    T* const out = static_cast<T*>(a.out);
    for_each_block(a.samples, a.elements, a.threads, [&](int64_t sample, int64_t first, int64_t count) {
      alignas(64) float z[block_elements];
      normals(a.key, a.key.first_sample + uint64_t(sample), first, count, z);
      store(z, count, out + sample * a.elements + first);
    });
  });
}

}  // namespace ddpm_fast::cpu::DDPM_ISA
