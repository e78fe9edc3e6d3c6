#include "cpu/antithetic_sample/sampler.h"
#include "cpu/word/word_avx512.h"

namespace lowbit::avx512 {

bool antithetic_sample(const AntitheticSampleArgs& args, int64_t begin, int64_t end) noexcept {
  return antithetic_sample_range<Word>(args, begin, end);
}

}  // namespace lowbit::avx512
