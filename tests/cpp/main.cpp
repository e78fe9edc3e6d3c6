// kernel_tests [--isa LEVEL] [--best LEVEL] [--cases N] [--seed N] [TEST ...]
//
// Runs the tests, by default all, at every level of this machine or at the one given; --best also requires that
// detection finds exactly that level. Exit status: 0 passed, 1 failed, 2 this machine cannot run the level or the
// arguments make no sense.
#include "runner.h"

namespace lowbit::test {
namespace {

// -1 where it is no level's name.
int level_of(const std::string& name) {
  for (int level = 0; level < kIsaCount; ++level) {
    if (name == isa_name(static_cast<Isa>(level))) return level;
  }
  return -1;
}

int run(int count, char** arguments) {
  Options options;
  int isa = -1;   // every level of the machine
  int best = -1;  // whatever detection finds
  bool understood = parse(count, arguments, {"--isa", "--best"}, options);
  for (const auto& [name, value] : options.others) {
    int& level = name == "--isa" ? isa : best;
    level = level_of(value);
    understood &= level >= 0;
  }
  if (!understood) {
    fprintf(stderr, "usage: kernel_tests [--isa LEVEL] [--best LEVEL] [--cases N] [--seed N] [TEST ...]\n");
    return 2;
  }
  printf("best level of this machine: %s\n", isa_name(best_isa()));
  if (best >= 0 && static_cast<Isa>(best) != best_isa()) {
    fprintf(stderr, "expected best level %s\n", isa_name(static_cast<Isa>(best)));
    return 1;
  }
  const int first = isa >= 0 ? isa : 0;
  const int last = isa >= 0 ? isa : static_cast<int>(best_isa());
  for (int i = first; i <= last; ++i) {
    const Isa level = static_cast<Isa>(i);
    if (!select_isa(level)) {
      fprintf(stderr, "this machine cannot run %s\n", isa_name(level));
      return 2;
    }
    // Every level meets the same cases.
    run_tests(isa_name(level), options, [&] {
      if (active_isa() != level) fail(std::string("the test left the level at ") + isa_name(active_isa()));
    });
  }
  return exit_status();
}

}  // namespace
}  // namespace lowbit::test

int main(int count, char** arguments) { return lowbit::test::run(count, arguments); }
