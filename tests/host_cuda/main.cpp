// host_cuda_tests [--order forward|reverse|shuffled] [--cases N] [--seed N] [TEST ...]
//
// Runs the CUDA kernels on the host, by default once in every order of a block's threads (host_cuda.h). Exit status: 0
// passed, 1 failed, 2 the arguments make no sense.
#include "../cpp/runner.h"
#include "host_cuda.h"

namespace lowbit::test {
namespace {

constexpr const char* kOrders[] = {"forward", "reverse", "shuffled"};

int run(int count, char** arguments) {
  Options options;
  options.cases = 60;
  bool understood = parse(count, arguments, {"--order"}, options);
  const std::string wanted = options.others.count("--order") ? options.others["--order"] : "";
  int ran = 0;
  for (int order = 0; understood && order < 3; ++order) {
    if (!wanted.empty() && wanted != kOrders[order]) continue;
    ++ran;
    host_cuda::set_order(static_cast<host_cuda::Order>(order), options.seed);
    Options other_cases = options;
    other_cases.seed = options.seed * 3 + static_cast<uint64_t>(order);
    run_tests(kOrders[order], other_cases, [] {
      int device = -1;
      cudaGetDevice(&device);
      if (device != 0) fail("the current device is " + std::to_string(device));
    });
  }
  if (ran == 0) {
    fprintf(stderr, "usage: host_cuda_tests [--order forward|reverse|shuffled] [--cases N] [--seed N] [TEST ...]\n");
    return 2;
  }
  return exit_status();
}

}  // namespace
}  // namespace lowbit::test

int main(int count, char** arguments) { return lowbit::test::run(count, arguments); }
