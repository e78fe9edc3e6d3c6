// Finds the best instruction-set level of this machine and holds the active kernel table. Built for the baseline.
#include "cpu/kernel_table.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace lowbit {
namespace {

#if defined(__x86_64__)
#define LOWBIT_ON_X86(implementation) implementation
#else
#define LOWBIT_ON_X86(implementation) scalar
#endif

constexpr KernelTable kTables[kIsaCount] = {
#define LOWBIT_ENTRY(entry, s, a2, a512, amx_level) s::entry,
    {LOWBIT_KERNEL_ROWS(LOWBIT_ENTRY)},
#undef LOWBIT_ENTRY
#define LOWBIT_ENTRY(entry, s, a2, a512, amx_level) LOWBIT_ON_X86(a2)::entry,
    {LOWBIT_KERNEL_ROWS(LOWBIT_ENTRY)},
#undef LOWBIT_ENTRY
#define LOWBIT_ENTRY(entry, s, a2, a512, amx_level) LOWBIT_ON_X86(a512)::entry,
    {LOWBIT_KERNEL_ROWS(LOWBIT_ENTRY)},
#undef LOWBIT_ENTRY
#define LOWBIT_ENTRY(entry, s, a2, a512, amx_level) LOWBIT_ON_X86(amx_level)::entry,
    {LOWBIT_KERNEL_ROWS(LOWBIT_ENTRY)},
#undef LOWBIT_ENTRY
};

#if defined(__x86_64__)

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  if (__get_cpuid_max(0, nullptr) < leaf) return r;
  __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
  return r;
}

// Register states that the operating system saves. A CPU flag alone does not say that a register may be used.
unsigned long long enabled_states() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

constexpr bool has(unsigned word, unsigned bits) { return (word & bits) == bits; }

// Linux grants the tile registers to a process that asks; the grant also covers its later threads.
bool request_tile_permission() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  const Registers basic = cpuid(1, 0);
  const Registers extended = cpuid(7, 0);
  Registers amd;  // the leaf that AMD introduced; Intel reports LZCNT there too
  __get_cpuid(0x80000001u, &amd.eax, &amd.ebx, &amd.ecx, &amd.edx);
  constexpr unsigned kFma = 1u << 12, kPopcnt = 1u << 23, kOsxsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
  if (!has(basic.ecx, kFma | kPopcnt | kOsxsave | kAvx | kF16c)) return Isa::scalar;
  const unsigned long long states = enabled_states();
  constexpr unsigned long long kYmmStates = 0x6, kZmmStates = 0xe6, kTileStates = 0x60000;
  constexpr unsigned kBmi1 = 1u << 3, kAvx2 = 1u << 5, kBmi2 = 1u << 8, kLzcnt = 1u << 5;
  if ((states & kYmmStates) != kYmmStates || !has(extended.ebx, kBmi1 | kAvx2 | kBmi2) || !has(amd.ecx, kLzcnt)) {
    return Isa::scalar;
  }
  constexpr unsigned kFoundation = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
  constexpr unsigned kVbmi = 1u << 1, kBitalg = 1u << 12, kVpopcntdq = 1u << 14;
  if ((states & kZmmStates) != kZmmStates || !has(extended.ebx, kFoundation | kDq | kBw | kVl) ||
      !has(extended.ecx, kVbmi | kBitalg | kVpopcntdq)) {
    return Isa::avx2;
  }
  constexpr unsigned kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
  if ((states & kTileStates) != kTileStates || !has(extended.edx, kAmxTile | kAmxInt8) || !request_tile_permission()) {
    return Isa::avx512;
  }
  return Isa::amx;
}

#else

Isa detect() { return Isa::scalar; }

#endif

std::atomic<int> active{-1};  // -1: not chosen yet

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa active_isa() {
  const int level = active.load(std::memory_order_relaxed);
  if (level >= 0) return static_cast<Isa>(level);
  select_isa(best_isa());
  return best_isa();
}

bool select_isa(Isa level) {
  if (static_cast<int>(level) < 0 || level > best_isa()) return false;
  active.store(static_cast<int>(level), std::memory_order_relaxed);
  return true;
}

const KernelTable& kernels(Isa level) { return kTables[static_cast<int>(level)]; }

const KernelTable& kernels() { return kernels(active_isa()); }

const char* isa_name(Isa level) {
  constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "amx"};
  return kNames[static_cast<int>(level)];
}

}  // namespace lowbit
