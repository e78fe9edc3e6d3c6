#include "host_cuda.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace host_cuda {
namespace {

constexpr uint8_t kPattern = 0xa5;
constexpr int kDevices = 2;
constexpr int kMultiprocessors = 4;
constexpr int kMostThreads = 1024;
constexpr size_t kMostShared = 227 * 1024;  // of a Hopper
constexpr size_t kStackBytes = 256 * 1024;

int current_device = 0;
int device_architecture = 90;
int driver_version = 13000;
Order order = Order::forward;
std::mt19937_64 engine;

struct Copy {
  void* target;
  std::vector<uint8_t> bytes;
};

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  int thread = -1;  // that it runs
  bool busy = false;
  bool (*ready)(const void*) = nullptr;  // null: nothing is waited for
  const void* argument = nullptr;
  std::deque<std::vector<Copy>> groups;  // committed
  std::vector<Copy> open;
  std::deque<std::vector<std::function<void()>>> product_groups;
  std::vector<std::function<void()>> open_products;
  bool product_fenced = false;
  int unfenced_copies = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

// The same threads that meet: what they bring now and what they brought last.
struct Meeting {
  const char* what = nullptr;
  size_t size = 0;
  int arrived = 0;
  uint64_t number = 0;
  std::vector<uint8_t> bytes[2];
};

std::vector<std::unique_ptr<Fiber>> fibers;
Fiber* running = nullptr;
ucontext_t scheduler;
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack = nullptr;  // what the sanitizer is told of every switch
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif

// The block that runs.
const std::function<void()>* kernel_body = nullptr;
void* shared = nullptr;
std::vector<int> sequence;  // threads in the order they run
size_t started = 0;
int unfenced_copies = 0;  // of all threads
int exited = 0;
int at_barrier = 0;
uint64_t barriers = 0;
std::map<std::tuple<int, uint64_t, uint64_t>, Meeting> meetings;

int block_threads() { return static_cast<int>(blockDim.x * blockDim.y * blockDim.z); }

void place_thread(int thread) {
  const unsigned index = static_cast<unsigned>(thread);
  threadIdx = {index % blockDim.x, index / blockDim.x % blockDim.y, index / blockDim.x / blockDim.y};
}

void switch_to_fiber(Fiber& fiber) {
  running = &fiber;
  if (fiber.thread >= 0) place_thread(fiber.thread);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
  swapcontext(&scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
  running = nullptr;
}

void switch_to_scheduler() {
  Fiber& self = *running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&self.fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
  swapcontext(&self.context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void release_barrier() {
  if (at_barrier == 0 || at_barrier + exited < block_threads()) return;
  at_barrier = 0;
  ++barriers;
}

// Runs one thread of the block after the other; a fiber goes through several where none of them waits.
void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  for (;;) {
    while (started < sequence.size()) {
      running->thread = sequence[started++];
      place_thread(running->thread);
      (*kernel_body)();
      async_commit();
      for (const auto& group : running->groups) {
        if (!group.empty()) fail("the thread ends with copies that it did not wait for");
      }
      running->groups.clear();
      if (!running->open_products.empty() || !running->product_groups.empty()) {
        fail("the thread ends with products that it did not wait for");
      }
      running->product_fenced = false;
      running->unfenced_copies = 0;
      ++exited;
      release_barrier();
    }
    running->thread = -1;
    running->busy = false;
    switch_to_scheduler();
  }
}

Fiber& idle_fiber() {
  for (const auto& fiber : fibers) {
    if (!fiber->busy) return *fiber;
  }
  fibers.push_back(std::make_unique<Fiber>());
  Fiber& fiber = *fibers.back();
  fiber.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (fiber.stack == MAP_FAILED) fail("no memory for a stack");
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  return fiber;
}

void run_block() {
  const int threads = block_threads();
  sequence.resize(static_cast<size_t>(threads));
  for (int i = 0; i < threads; ++i) sequence[static_cast<size_t>(i)] = order == Order::reverse ? threads - 1 - i : i;
  if (order == Order::shuffled) std::shuffle(sequence.begin(), sequence.end(), engine);
  started = 0;
  exited = at_barrier = unfenced_copies = 0;
  meetings.clear();
  std::vector<Fiber*> waiting;
  while (exited < threads) {
    bool progress = false;
    while (started < sequence.size()) {
      Fiber& fiber = idle_fiber();
      fiber.busy = true;
      switch_to_fiber(fiber);
      if (fiber.busy) waiting.push_back(&fiber);
      progress = true;
    }
    std::vector<Fiber*> still_waiting;
    for (Fiber* fiber : waiting) {
      running = fiber;
      if (fiber->ready(fiber->argument)) {
        switch_to_fiber(*fiber);
        progress = true;
      }
      if (fiber->busy) still_waiting.push_back(fiber);
    }
    waiting.swap(still_waiting);
    if (!progress) {
      running = waiting.front();
      fail("deadlock: this thread, and every other that has not ended, waits for another");
    }
  }
}

uint64_t block_count(dim3 blocks) { return uint64_t{blocks.x} * blocks.y * blocks.z; }

}  // namespace

void set_order(Order new_order, uint64_t seed) {
  order = new_order;
  engine.seed(seed);
}

void set_architecture(int architecture) { device_architecture = architecture; }

void set_driver(int version) { driver_version = version; }

cudaError_t run(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& body) {
  if (blocks.x > 0x7fffffff || blocks.y > 65535 || blocks.z > 65535) return cudaErrorInvalidConfiguration;
  if (threads.x == 0 || threads.y == 0 || threads.z == 0 || threads.z > 64 || shared_bytes > kMostShared ||
      block_count(threads) > kMostThreads) {
    return cudaErrorInvalidConfiguration;
  }
  gridDim = blocks;
  blockDim = threads;
  kernel_body = &body;
  const uint64_t count = block_count(blocks);
  // Blocks go forward, backward, or forward from one drawn by lot.
  const uint64_t from = order == Order::shuffled ? engine() % count : 0;
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t block = order == Order::reverse ? count - 1 - i : (from + i) % count;
    blockIdx = {static_cast<unsigned>(block % blocks.x), static_cast<unsigned>(block / blocks.x % blocks.y),
                static_cast<unsigned>(block / blocks.x / blocks.y)};
    constexpr std::align_val_t kAlignment{1024};
    shared = ::operator new(shared_bytes, kAlignment);
    memset(shared, kPattern, shared_bytes);
    run_block();
    ::operator delete(shared, kAlignment);
  }
  kernel_body = nullptr;
  shared = nullptr;
  return cudaSuccess;
}

void* shared_memory() { return shared; }

int thread_index() { return running->thread; }

void fail(const char* message) {
  fprintf(stderr, "FAILED in block (%u, %u, %u) of (%u, %u, %u), thread %d of %d: %s\n", blockIdx.x, blockIdx.y,
          blockIdx.z, gridDim.x, gridDim.y, gridDim.z, running ? running->thread : -1, block_threads(), message);
  fflush(stderr);
  abort();
}

void wait(bool (*ready)(const void*), const void* argument) {
  if (ready(argument)) return;
  running->ready = ready;
  running->argument = argument;
  switch_to_scheduler();
}

const void* meet(const Members& members, const char* what, const void* bytes, size_t size) {
  const int self = thread_index() - members.first;
  int expected = 0;
  for (const uint64_t bits : members.bits) expected += __builtin_popcountll(bits);
  if (self < 0 || self >= kMostGathered || !(members.bits[self / 64] >> (self % 64) & 1)) {
    fail((std::string(what) + ": the thread is not among those that its mask names").c_str());
  }
  Meeting& meeting = meetings[{members.first, members.bits[0], members.bits[1]}];
  std::vector<uint8_t>& brought = meeting.bytes[meeting.number % 2];
  if (meeting.arrived == 0) {
    meeting.what = what;
    meeting.size = size;
    brought.assign(size * kMostGathered, 0);
  } else if (strcmp(meeting.what, what) != 0 || meeting.size != size) {
    fail((std::string(what) + " meets " + meeting.what).c_str());
  }
  memcpy(brought.data() + static_cast<size_t>(self) * size, bytes, size);
  const uint64_t number = meeting.number;
  if (++meeting.arrived == expected) {
    meeting.arrived = 0;
    ++meeting.number;
  }
  wait_until([&] { return meeting.number != number; });
  return meeting.bytes[number % 2].data();
}

void async_copy(void* target, const void* global, size_t bytes, size_t valid_bytes) {
  Copy copy{target, std::vector<uint8_t>(bytes)};
  memcpy(copy.bytes.data(), global, valid_bytes);
  memset(target, kPattern, bytes);
  running->open.push_back(std::move(copy));
}

void async_commit() {
  running->groups.push_back(std::move(running->open));
  running->open.clear();
}

void async_wait(int groups_left) {
  while (running->groups.size() > static_cast<size_t>(groups_left)) {
    for (const Copy& copy : running->groups.front()) {
      memcpy(copy.target, copy.bytes.data(), copy.bytes.size());
      ++running->unfenced_copies;
      ++unfenced_copies;
    }
    running->groups.pop_front();
  }
}

void product_fence() { running->product_fenced = true; }

void proxy_fence() {
  unfenced_copies -= running->unfenced_copies;
  running->unfenced_copies = 0;
}

void require_product_fences() {
  if (!running->product_fenced) fail("a product without a fence before it");
  if (unfenced_copies != 0) fail("a product may not see copies that no proxy fence followed");
}

void product(std::function<void()> finish) { running->open_products.push_back(std::move(finish)); }

void product_commit() {
  running->product_groups.push_back(std::move(running->open_products));
  running->open_products.clear();
}

void product_wait(int groups_left) {
  while (running->product_groups.size() > static_cast<size_t>(groups_left)) {
    for (const auto& finish : running->product_groups.front()) finish();
    running->product_groups.pop_front();
  }
  running->product_fenced = false;
}

namespace {
constexpr uint32_t kSharedBase = 1024;  // not 0: an address is no offset
}

uint32_t shared_address(const void* pointer) {
  return kSharedBase + static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - static_cast<uint8_t*>(shared));
}

const void* shared_pointer(uint32_t address) { return static_cast<const uint8_t*>(shared) + address - kSharedBase; }

}  // namespace host_cuda

using namespace host_cuda;

void __syncthreads() {
  const uint64_t number = barriers;
  ++at_barrier;
  release_barrier();
  wait_until([&] { return barriers != number; });
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver_version;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidDevice          ? "cudaErrorInvalidDevice"
         : error == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration"
         : error == cudaErrorInsufficientDriver   ? "cudaErrorInsufficientDriver"
                                                  : "cudaErrorInvalidValue";
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice          ? "invalid device ordinal"
         : error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
         : error == cudaErrorInsufficientDriver   ? "CUDA driver version is insufficient for CUDA runtime version"
                                                  : "invalid argument";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  *value = attribute == cudaDevAttrMultiProcessorCount      ? kMultiprocessors
           : attribute == cudaDevAttrComputeCapabilityMajor ? device_architecture / 10
                                                            : device_architecture % 10;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return static_cast<size_t>(value) <= kMostShared ? cudaSuccess : cudaErrorInvalidValue;
}
