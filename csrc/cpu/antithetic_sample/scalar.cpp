#include "cpu/antithetic_sample/sampler.h"
#include "cpu/word/word_scalar.h"

namespace lowbit::scalar {

bool antithetic_sample(const AntitheticSampleArgs& args, int64_t begin, int64_t end) noexcept {
  return antithetic_sample_range<Word>(args, begin, end);
}

}  // namespace lowbit::scalar
