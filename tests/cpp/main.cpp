// kernel_tests [--isa LEVEL] [--best LEVEL] [--cases N] [--seed N] [TEST ...]
//
// Runs the tests, by default all, at every level of this machine or at the one given; --best also requires that
// detection finds exactly that level. Exit status: 0 passed, 1 failed, 2 this machine cannot run the level or the
// arguments make no sense.
#include <chrono>
#include <cstdlib>

#include "common.h"

namespace lowbit::test {
namespace {

int failures = 0;
std::string context;  // level and test that run now

struct Test {
  const char* name;
  void (*run)(Random& random, int cases);
};

constexpr Test kTests[] = {
    {"dispatch", test_dispatch},
    {"launch", test_launch},
    {"half", test_half},
    {"elementary", test_elementary},
    {"philox", test_philox},
    {"align_groups", test_align_groups},
    {"binarize", test_binarize},
    {"unpack", test_unpack},
    {"binary_max_pool2d", test_binary_max_pool2d},
    {"binary_avg_pool2d", test_binary_avg_pool2d},
    {"binary_conv2d", test_binary_conv2d},
    {"binary_conv2d_input_grad", test_binary_conv2d_input_grad},
    {"binary_conv2d_weight_grad", test_binary_conv2d_weight_grad},
    {"quantized_activation", test_quantized_activation},
    {"antithetic_sample", test_antithetic_sample},
    {"antithetic_gradient", test_antithetic_gradient},
    {"popcount_peak", test_popcount_peak},
};

// -1 where it is no level's name.
int level_of(const std::string& name) {
  for (int level = 0; level < kIsaCount; ++level) {
    if (name == isa_name(static_cast<Isa>(level))) return level;
  }
  return -1;
}

struct Options {
  int isa = -1;   // -1: every level of the machine
  int best = -1;  // -1: whatever detection finds
  int cases = 500;
  uint64_t seed = 1;
  std::vector<std::string> tests;  // empty: all
};

// False where an argument makes no sense.
bool parse(int count, char** arguments, Options& options) {
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument.rfind("--", 0) != 0) {
      bool known = false;
      for (const Test& test : kTests) known |= argument == test.name;
      if (!known) return false;
      options.tests.push_back(argument);
      continue;
    }
    if (++i == count) return false;
    if (argument == "--isa") {
      options.isa = level_of(arguments[i]);
      if (options.isa < 0) return false;
    } else if (argument == "--best") {
      options.best = level_of(arguments[i]);
      if (options.best < 0) return false;
    } else if (argument == "--cases") {
      options.cases = atoi(arguments[i]);
      if (options.cases < 1) return false;
    } else if (argument == "--seed") {
      options.seed = strtoull(arguments[i], nullptr, 10);
    } else {
      return false;
    }
  }
  return true;
}

bool wanted(const Options& options, const char* name) {
  for (const std::string& test : options.tests) {
    if (test == name) return true;
  }
  return options.tests.empty();
}

void run_level(Isa level, const Options& options) {
  for (const Test& test : kTests) {
    if (!wanted(options, test.name)) continue;
    context = std::string(isa_name(level)) + " " + test.name;
    const auto start = std::chrono::steady_clock::now();
    // Every level meets the same cases.
    Random random(options.seed);
    test.run(random, options.cases);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (active_isa() != level) fail(std::string("the test left the level at ") + isa_name(active_isa()));
    printf("%-34s %6.2f s\n", context.c_str(), seconds.count());
    fflush(stdout);
  }
}

int run(int count, char** arguments) {
  Options options;
  if (!parse(count, arguments, options)) {
    fprintf(stderr, "usage: kernel_tests [--isa LEVEL] [--best LEVEL] [--cases N] [--seed N] [TEST ...]\n");
    return 2;
  }
  printf("best level of this machine: %s\n", isa_name(best_isa()));
  if (options.best >= 0 && static_cast<Isa>(options.best) != best_isa()) {
    fprintf(stderr, "expected best level %s\n", isa_name(static_cast<Isa>(options.best)));
    return 1;
  }
  const int first = options.isa >= 0 ? options.isa : 0;
  const int last = options.isa >= 0 ? options.isa : static_cast<int>(best_isa());
  for (int level = first; level <= last; ++level) {
    if (!select_isa(static_cast<Isa>(level))) {
      fprintf(stderr, "this machine cannot run %s\n", isa_name(static_cast<Isa>(level)));
      return 2;
    }
    run_level(static_cast<Isa>(level), options);
  }
  printf(failures == 0 ? "passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace

void fail(const std::string& message) {
  constexpr int kMostPrinted = 20;
  if (++failures <= kMostPrinted) fprintf(stderr, "FAILED %s: %s\n", context.c_str(), message.c_str());
}

}  // namespace lowbit::test

int main(int count, char** arguments) { return lowbit::test::run(count, arguments); }
