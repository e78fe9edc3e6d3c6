// What the binding calls, one function per op: refuses inconsistent sizes, splits the work over torch's threads, runs
// the active level's kernel. Still no torch, no Python, no allocation.
#pragma once

#include "core/ops/list.h"
#include "cpu/kernel_table.h"

namespace lowbit::launch {

#define LOWBIT_DECLARE(op, Args) Status op(const Args& args) noexcept;
LOWBIT_OPS(LOWBIT_DECLARE)
#undef LOWBIT_DECLARE

// The workspace inside the arguments holds workspace_bytes, and is 64-byte aligned; the *_workspace_bytes functions say
// how many are needed for the threads that would run now.
#define LOWBIT_DECLARE(op, Args)                           \
  int64_t op##_workspace_bytes(const Args& args) noexcept; \
  Status op(const Args& args, int64_t workspace_bytes) noexcept;
LOWBIT_WORKSPACE_OPS(LOWBIT_DECLARE)
LOWBIT_CPU_WORKSPACE_OPS(LOWBIT_DECLARE)
LOWBIT_DECLARE(binary_conv2d, BinaryConv2dArgs)
#undef LOWBIT_DECLARE

// Runs the loop of `level` on every thread of torch's pool at once and returns the operations of all; 0 where the
// machine cannot run the level. For measurements: while it runs, `level` is the active level of the whole process.
int64_t popcount_peak(Isa level, int64_t iterations) noexcept;

}  // namespace lowbit::launch
