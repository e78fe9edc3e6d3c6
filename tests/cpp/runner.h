// Command line and loop of a test program: [--cases N] [--seed N] [TEST ...] and options of its own. For its main.cpp
// alone.
#pragma once

#include <chrono>
#include <cstdlib>
#include <functional>

#include "common.h"

namespace lowbit::test {

struct Options {
  int cases = 500;
  uint64_t seed = 1;
  std::vector<std::string> tests;             // empty: all
  std::map<std::string, std::string> others;  // the program's own, by name
};

// False where an argument makes no sense. `own`: names of the program's own options, each with a value.
bool parse(int count, char** arguments, std::initializer_list<const char*> own, Options& options) {
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument.rfind("--", 0) != 0) {
      if (tests().count(argument) == 0) return false;
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
void run_tests(const std::string& variant, const Options& options, const std::function<void()>& afterwards) {
  for (const auto& [name, test] : tests()) {
    bool wanted = options.tests.empty();
    for (const std::string& other : options.tests) wanted |= other == name;
    if (!wanted) continue;
    context = variant + " " + name;
    const auto start = std::chrono::steady_clock::now();
    Random random(options.seed);
    test(random, options.cases);
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
