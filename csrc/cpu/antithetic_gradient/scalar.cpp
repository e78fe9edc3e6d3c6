#include "cpu/antithetic_gradient/driver.h"

namespace lowbit::scalar {
namespace {

struct Floats {
  static constexpr int kLanes = 1;
  float value;

  static Floats zero() { return {0}; }
  static Floats broadcast(float value) { return {value}; }
  static Floats load(const float* values) { return {*values}; }
  void store(float* values) const { *values = value; }
  template <class Element>
  static uint32_t load_bits(const Element* elements, int half) {
    return static_cast<uint32_t>(uint64_t{*elements} >> 32 * half);
  }
  static Floats lookup(const float* table, uint32_t& nibbles) {
    const Floats result{table[nibbles & 15]};
    nibbles >>= 4;
    return result;
  }
  static Floats add_where(Floats sum, uint32_t mask, Floats value) { return mask & 1 ? sum + value : sum; }
  friend Floats operator+(Floats a, Floats b) { return {a.value + b.value}; }
  friend Floats operator*(Floats a, Floats b) { return {a.value * b.value}; }
};

}  // namespace

void antithetic_gradient(const AntitheticGradientArgs& args, int64_t begin, int64_t end) noexcept {
  antithetic_gradient_range<Floats>(args, begin, end);
}

}  // namespace lowbit::scalar
