// What the kernel tests share: registration, random numbers, guarded memory, comparison.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <map>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "core/float_type.h"
#include "cpu/launch.h"

namespace lowbit::test {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  uint64_t bits() { return engine_(); }
  int64_t between(int64_t lowest, int64_t highest) {
    return lowest + static_cast<int64_t>(bits() % static_cast<uint64_t>(highest - lowest + 1));
  }
  bool coin() { return bits() & 1; }
  float normal() { return std::normal_distribution<float>()(engine_); }
  template <class T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[between(0, static_cast<int64_t>(values.size()) - 1)];
  }
  // A size at or next to a boundary of bytes, vectors and words, not above `limit` >= 1.
  int64_t size(int64_t limit) {
    const int64_t any =
        pick<int64_t>({1,  2,  3,   5,   7,   8,   9,   15,  16,  17,  31,  32,  33,  47,  63,  64,  65, 95,
                       96, 97, 127, 128, 129, 191, 192, 193, 255, 256, 257, 300, 383, 511, 512, 513, 640});
    return any <= limit ? any : between(1, limit);
  }

 private:
  std::mt19937_64 engine_;
};

// Records and prints a failure.
void fail(const std::string& message);

using Test = void (*)(Random& random, int cases);

// Of this program, by name.
inline std::map<std::string, Test>& tests() {
  static std::map<std::string, Test> registered;
  return registered;
}

// Defines a test, before its body: a number of random `cases`.
#define LOWBIT_TEST(name)                                                           \
  void test_##name(Random& random, int cases);                                      \
  static const bool registered_##name = tests().emplace(#name, test_##name).second; \
  void test_##name([[maybe_unused]] Random& random, [[maybe_unused]] int cases)

// `count` values at an address aligned to one value and to nothing more, or as memory from an allocator is. Bytes
// before and after are watched: by guard bytes, or after the end by the address sanitizer. New memory holds a pattern
// that no kernel leaves by chance.
enum class Alignment { value, allocator };

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count, Alignment alignment = Alignment::value)
      : count_(count), before_(alignment == Alignment::value ? sizeof(T) : static_cast<int64_t>(kAlignment)) {
    base_ = static_cast<uint8_t*>(::operator new(static_cast<size_t>(bytes() + before_ + kAfter), kAlignment));
    memset(base_, kPattern, static_cast<size_t>(bytes() + before_ + kAfter));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    for (int64_t i = 0; i < before_; ++i) touched_ |= base_[i] != kPattern;
    for (int64_t i = 0; i < kAfter; ++i) touched_ |= base_[before_ + bytes() + i] != kPattern;
    if (touched_) fail("memory next to a buffer was written");
    ::operator delete(base_, kAlignment);
  }

  T* data() { return reinterpret_cast<T*>(base_ + before_); }
  const T* data() const { return reinterpret_cast<const T*>(base_ + before_); }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return count_; }
  int64_t bytes() const { return count_ * static_cast<int64_t>(sizeof(T)); }

 private:
  static constexpr uint8_t kPattern = 0xa5;
  static constexpr std::align_val_t kAlignment{64};
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kAfter = 0;
#else
  static constexpr int64_t kAfter = 64;
#endif

  int64_t count_;
  int64_t before_;
  uint8_t* base_;
  bool touched_ = false;
};

// 64-byte aligned scratch memory, as the launchers ask for.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(bytes), data_(::operator new(static_cast<size_t>(bytes), kAlignment)) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { ::operator delete(data_, kAlignment); }

  void* data() { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  int64_t bytes_;
  void* data_;
};

// Fails unless every value has the expected bits.
template <class T>
void expect_same(const std::string& what, const Buffer<T>& got, const std::vector<T>& expected) {
  if (got.size() != static_cast<int64_t>(expected.size())) return fail(what + ": test compares unequal sizes");
  for (int64_t i = 0; i < got.size(); ++i) {
    if (memcmp(&got[i], &expected[static_cast<size_t>(i)], sizeof(T)) == 0) continue;
    return fail(what + ": element " + std::to_string(i) + " is " + std::to_string(got[i]) + ", expected " +
                std::to_string(expected[static_cast<size_t>(i)]));
  }
}

template <class T>
void expect_same(const std::string& what, const Buffer<T>& got, const Buffer<T>& expected) {
  expect_same(what, got, std::vector<T>(expected.data(), expected.data() + expected.size()));
}

inline void expect_ok(const std::string& what, Status status) {
  if (status != Status::ok) fail(what + ": " + status_text(status));
}

// Calls launch(workspace_bytes), which has so many at hand: too few are refused.
template <class Launch>
void expect_workspace(const std::string& what, int64_t bytes, const Launch& launch) {
  if (bytes > 0 && launch(bytes - 1) != Status::small_workspace) fail(what + ": a small workspace is taken");
  expect_ok(what, launch(bytes));
}

// Calls body(begin, end) on [0, items) cut at random places, parts in random order: what any thread team may do.
template <class Body>
void in_pieces(int64_t items, Random& random, const Body& body) {
  if (items == 0) return body(0, 0);
  const int64_t a = random.between(0, items), b = random.between(a, items);
  body(b, items);
  body(0, a);
  body(a, b);
}

inline bool bit_at(const uint64_t* words, int64_t bit) { return words[bit / kWordBits] >> (bit % kWordBits) & 1; }
inline void set_bit(uint64_t* words, int64_t bit) { words[bit / kWordBits] |= uint64_t{1} << (bit % kWordBits); }

// Bits of `rows` packed rows of `channels` channels, tail bits 0: random, or now and then all 0 or all 1, which brings
// counters to their limits.
inline void fill_bits(Buffer<uint64_t>& words, int64_t channels, Random& random) {
  const int64_t row_words = words_for(channels);
  const int64_t kind = random.between(0, 7);
  for (int64_t i = 0; i < words.size(); ++i) {
    const uint64_t bits = kind == 0 ? 0 : kind == 1 ? ~uint64_t{0} : random.bits();
    words[i] = bits & low_mask(channels - i % row_words * kWordBits);
  }
}

// Reads element i of an array of `type` as float32.
inline float load_float(const void* values, FloatType type, int64_t i) {
  if (type == FloatType::float32) return static_cast<const float*>(values)[i];
  const uint16_t half = static_cast<const uint16_t*>(values)[i];
  return type == FloatType::bfloat16 ? bfloat16_to_float(half) : float16_to_float(half);
}

}  // namespace lowbit::test
