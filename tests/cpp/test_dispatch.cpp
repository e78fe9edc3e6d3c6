// Choice of the level: what was forced is what runs, and no more than the machine can do may be forced.
#include "common.h"

namespace lowbit::test {
namespace {

// Fails unless every entry of the active table is the one that its row names for `level`.
void expect_table_of(Isa level) {
  const KernelTable& table = kernels();
#if defined(__x86_64__)
#define LOWBIT_CHECK(entry, s, a2, a512, amx_level)                                              \
  {                                                                                              \
    const decltype(&s::entry) expected[] = {s::entry, a2::entry, a512::entry, amx_level::entry}; \
    if (table.entry != expected[static_cast<int>(level)]) fail("wrong kernel for " #entry);      \
  }
#else
#define LOWBIT_CHECK(entry, s, a2, a512, amx_level) \
  if (table.entry != scalar::entry) fail("wrong kernel for " #entry);
#endif
  LOWBIT_KERNEL_ROWS(LOWBIT_CHECK)
#undef LOWBIT_CHECK
}

}  // namespace

LOWBIT_TEST(dispatch) {
  const Isa forced = active_isa();
  expect_table_of(forced);
  for (int level = 0; level < kIsaCount; ++level) {
    const Isa isa = static_cast<Isa>(level);
    const Isa before = active_isa();
    const bool selected = select_isa(isa);
    if (selected != (isa <= best_isa())) fail(std::string("select_isa is wrong about ") + isa_name(isa));
    if (active_isa() != (selected ? isa : before)) fail(std::string("wrong level after selecting ") + isa_name(isa));
    expect_table_of(active_isa());
  }
  if (select_isa(static_cast<Isa>(-1)) || select_isa(static_cast<Isa>(kIsaCount))) fail("selected a level beyond all");
  select_isa(forced);
}

}  // namespace lowbit::test
