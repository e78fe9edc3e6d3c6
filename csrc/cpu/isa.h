// Instruction-set levels of the CPU library, and the macro with which an op declares one entry per level.
#pragma once

namespace lowbit {

// Ordered: a level implies every level below it.
enum class Isa : int {
  scalar = 0,  // x86-64 baseline, and every other architecture
  avx2 = 1,    // avx2, bmi1, bmi2, popcnt, fma, f16c
  avx512 = 2,  // avx512 f, bw, vl, dq, vbmi, bitalg, vpopcntdq
  amx = 3,     // amx-tile, amx-int8
};
constexpr int kIsaCount = 4;

}  // namespace lowbit

// An op need not exist on every level: kernel_table.h says which implementation serves which level.
#define LOWBIT_DECLARE_FOR_EACH_ISA(declaration) \
  namespace lowbit::scalar {                     \
  declaration;                                   \
  }                                              \
  namespace lowbit::avx2 {                       \
  declaration;                                   \
  }                                              \
  namespace lowbit::avx512 {                     \
  declaration;                                   \
  }                                              \
  namespace lowbit::amx {                        \
  declaration;                                   \
  }
