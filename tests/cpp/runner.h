// Command line and loop of a test program: [--cases N] [--seed N] [TEST ...] and options of its own. For its main.cpp
// alone.
#pragma once

#include <chrono>
#include <cstdlib>
#include <functional>
#include <map>

#include "common.h"

namespace lowbit::test {

struct Test {
  const char* name;
  void (*run)(Random& random, int cases);
};

struct Options {
  int cases = 500;
  uint64_t seed = 1;
  std::vector<std::string> tests;             // empty: all
  std::map<std::string, std::string> others;  // the program's own, by name
};

// False where an argument makes no sense. `own`: names of the program's own options, each with a value.
template <size_t kCount>
bool parse(int count, char** arguments, const Test (&tests)[kCount], std::initializer_list<const char*> own,
           Options& options) {
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument.rfind("--", 0) != 0) {
      bool known = false;
      for (const Test& test : tests) known |= argument == test.name;
      if (!known) return false;
      options.tests.push_back(argument);
      continue;
    }
    if (++i == count) return false;
    if (argument == "--cases") {
      options.cases = atoi(arguments[i]);
      if (options.cases < 1) return false;
    } else if (argument == "--seed") {
      options.seed = strtoull(arguments[i], nullptr, 10);
    } else {
      bool known = false;
      for (const char* name : own) known |= argument == name;
      if (!known) return false;
      options.others[argument] = arguments[i];
    }
  }
  return true;
}

// What fail() prints before its message: the variant and the test that run now.
std::string context;
int failures = 0;

// Runs the wanted tests once, each from the same seed, with `afterwards` behind each. `variant` names what is run.
template <size_t kCount>
void run_tests(const std::string& variant, const Test (&tests)[kCount], const Options& options,
               const std::function<void()>& afterwards) {
  for (const Test& test : tests) {
    bool wanted = options.tests.empty();
    for (const std::string& name : options.tests) wanted |= name == test.name;
    if (!wanted) continue;
    context = variant + " " + test.name;
    const auto start = std::chrono::steady_clock::now();
    Random random(options.seed);
    test.run(random, options.cases);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    afterwards();
    printf("%-34s %6.2f s\n", context.c_str(), seconds.count());
    fflush(stdout);
  }
}

int exit_status() {
  printf(failures == 0 ? "passed\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

void fail(const std::string& message) {
  constexpr int kMostPrinted = 20;
  if (++failures <= kMostPrinted) fprintf(stderr, "FAILED %s: %s\n", context.c_str(), message.c_str());
}

}  // namespace lowbit::test
