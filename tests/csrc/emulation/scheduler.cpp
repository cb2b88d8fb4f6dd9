// The machine of the CUDA emulation: fibers for threads, barriers, warp exchanges, shared memory.
//
// Environment, read at every launch:
//   EMULATION_ORDER       forward (default) | reverse | random:<seed>   in which order threads and blocks run
//   EMULATION_INTERBLOCK  1: under ThreadSanitizer, also find races between equal thread indices of different blocks
//   (each
//                         block gets fresh fibers: slow, for small grids)

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber_switch.h"
#include "machine.h"
#include "sanitizers.h"

namespace megatron_dppo::emulation {

Context context;

namespace {

constexpr int kWarpSize = 32;
constexpr size_t kMaxSharedBytes = 48 * 1024;
constexpr uint64_t kPoison = 0x7fc0dead7fc0deadull;  // what a lane gets from one that is not there: NaN

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Fiber {
  Place place;
  char* stack = nullptr;
  void* tsan = nullptr;
  void* asan_fake_stack = nullptr;
  uint3 index{};
  int warp = 0, lane = 0;
  State state = State::kReady;
  const char* file = "";  // of the last barrier
  int line = 0;
  unsigned mask = 0;  // of the exchange it waits in
  int source_lane = 0;
  uint64_t value = 0;
};

struct SharedArray {
  const char* file;
  int line;
  size_t bytes;
  void* data;
};

// One launch. The main context walks over blocks and fibers; a fiber runs until it waits or ends.
class Grid {
 public:
  Grid(const char* kernel, dim3 grid, dim3 block, Body body, void* argument);
  ~Grid();
  void run();

  // Called on a fiber.
  void sync_threads(const char* file, int line);
  uint64_t exchange(unsigned mask, uint64_t value, int source_lane);
  void* shared_array(const char* file, int line, size_t bytes);
  void thread_fence();
  int lane() const { return running_->lane; }
  void fiber_main();

 private:
  void start_block(size_t block);
  void run_block();
  bool run_ready_fibers();
  void complete_barrier();
  bool complete_exchange(int warp, unsigned mask);
  void complete_exchanges_of(int warp);
  void check_progress(bool progress);
  void resume(Fiber& fiber);
  void suspend(bool for_good);
  [[noreturn]] void fail_on_fiber(const std::string& what);
  void fail(const std::string& what);
  size_t count(State state) const;
  unsigned live_lanes(int warp) const;
  static std::string name_of(const Fiber& fiber);

  const char* kernel_;
  Body body_;
  void* argument_;
  size_t num_blocks_;
  bool fresh_fibers_;
  bool reverse_ = false, shuffle_ = false;
  std::mt19937 random_;
  std::vector<Fiber> fibers_;
  std::vector<size_t> order_;
  std::vector<SharedArray> shared_;
  std::vector<void*> used_memory_;  // freed after the grid, so that no address means two things to ThreadSanitizer
  std::vector<void*> used_fibers_;
  std::vector<char*> used_stacks_;
  std::string error_;
  Fiber* running_ = nullptr;
  Place main_;
  void* main_tsan_;
  void* main_fake_stack_ = nullptr;
  const void* main_stack_ = nullptr;
  size_t main_stack_bytes_ = 0;
  // Keys of ThreadSanitizer's happens-before. Barriers use two in turn: who is ahead must not order who is behind.
  char launched_ = 0, finished_ = 0, fence_ = 0;
  std::vector<char> barrier_keys_;
  size_t block_ = 0;
  unsigned barrier_phase_ = 0;
};

Grid* grid_that_runs = nullptr;

Grid::Grid(const char* kernel, dim3 grid, dim3 block, Body body, void* argument)
    : kernel_(kernel),
      body_(body),
      argument_(argument),
      num_blocks_(size_t{grid.x} * grid.y * grid.z),
      main_tsan_(current_tsan_fiber()) {
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error(std::string("emulation of ") + kernel + ": no such launch configuration");
  const char* order = std::getenv("EMULATION_ORDER");
  reverse_ = order != nullptr && std::strcmp(order, "reverse") == 0;
  shuffle_ = order != nullptr && std::strncmp(order, "random:", 7) == 0;
  if (shuffle_) random_.seed(std::strtoul(order + 7, nullptr, 10));
  fresh_fibers_ = kThreadSanitizer && std::getenv("EMULATION_INTERBLOCK") != nullptr;
  context.grid_dim = grid;
  context.block_dim = block;
  barrier_keys_.assign(2 * num_blocks_, 0);
  fibers_.resize(threads);
  order_.resize(threads);
  std::iota(order_.begin(), order_.end(), size_t{0});
  if (reverse_) std::reverse(order_.begin(), order_.end());
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers_[i];
    fiber.index = uint3{static_cast<unsigned>(i % block.x), static_cast<unsigned>(i / block.x % block.y),
                        static_cast<unsigned>(i / block.x / block.y)};
    fiber.warp = static_cast<int>(i / kWarpSize);
    fiber.lane = static_cast<int>(i % kWarpSize);
  }
}

Grid::~Grid() {
  acquire(&finished_);
  if (!error_.empty()) {  // threads that never came to their end are ordered before what follows
    for (Fiber& fiber : fibers_) {
      if (fiber.tsan == nullptr) continue;
      switch_tsan_fiber(fiber.tsan);
      release(&finished_);
      switch_tsan_fiber(main_tsan_);
    }
    acquire(&finished_);
  }
  ignore_writes(true);
  for (const SharedArray& array : shared_) std::free(array.data);
  for (void* memory : used_memory_) std::free(memory);
  ignore_writes(false);
  for (void* fiber : used_fibers_) destroy_tsan_fiber(fiber);
  for (char* stack : used_stacks_) free_stack(stack);
}

void Grid::run() {
  release(&launched_);
  std::vector<size_t> blocks(num_blocks_);
  std::iota(blocks.begin(), blocks.end(), size_t{0});
  if (reverse_) std::reverse(blocks.begin(), blocks.end());
  if (shuffle_) std::shuffle(blocks.begin(), blocks.end(), random_);
  for (size_t i = 0; i < num_blocks_ && error_.empty(); ++i) {
    start_block(blocks[i]);
    run_block();
  }
  if (!error_.empty()) throw std::runtime_error("emulation of " + std::string(kernel_) + ": " + error_);
}

void Grid::start_block(size_t block) {
  block_ = block;
  barrier_phase_ = 0;
  const dim3 grid = context.grid_dim;
  context.block = uint3{static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
                        static_cast<unsigned>(block / grid.x / grid.y)};
  for (const SharedArray& array : shared_) used_memory_.push_back(array.data);
  shared_.clear();
  for (Fiber& fiber : fibers_) {
    if (fiber.stack == nullptr || fresh_fibers_) {
      fiber.stack = allocate_stack();
      used_stacks_.push_back(fiber.stack);
      fiber.tsan = create_tsan_fiber(name_of(fiber).c_str());
      if (fiber.tsan != nullptr) used_fibers_.push_back(fiber.tsan);
    }
    fiber.state = State::kReady;
    prepare(fiber.place, fiber.stack, kStackBytes, [] { grid_that_runs->fiber_main(); });
  }
}

void Grid::run_block() {
  while (error_.empty() && count(State::kDone) < fibers_.size()) {
    if (shuffle_) std::shuffle(order_.begin(), order_.end(), random_);
    bool progress = run_ready_fibers();
    if (error_.empty() && count(State::kAtBarrier) > 0 &&
        count(State::kAtBarrier) + count(State::kDone) == fibers_.size()) {
      complete_barrier();
      progress = true;
    }
    if (error_.empty()) check_progress(progress);
  }
}

bool Grid::run_ready_fibers() {
  bool progress = false;
  for (size_t i : order_) {
    Fiber& fiber = fibers_[i];
    if (fiber.state != State::kReady) continue;
    progress = true;
    resume(fiber);
    if (!error_.empty()) break;
    if (fiber.state == State::kDone) complete_exchanges_of(fiber.warp);  // others may have waited only for this one
  }
  return progress;
}

void Grid::complete_barrier() {
  const Fiber* first = nullptr;
  for (const Fiber& fiber : fibers_) {
    if (fiber.state == State::kDone) return fail("__syncthreads() after thread " + name_of(fiber) + " has returned");
    if (first == nullptr) first = &fiber;
    if (fiber.line != first->line || std::strcmp(fiber.file, first->file) != 0)
      return fail("divergent __syncthreads(): " + name_of(*first) + " at line " + std::to_string(first->line) + ", " +
                  name_of(fiber) + " at line " + std::to_string(fiber.line));
  }
  for (Fiber& fiber : fibers_) fiber.state = State::kReady;
  ++barrier_phase_;
}

// Hands values over once every live lane of `mask` waits in an exchange with this very mask.
bool Grid::complete_exchange(int warp, unsigned mask) {
  Fiber* const lanes = &fibers_[static_cast<size_t>(warp) * kWarpSize];
  const unsigned needed = mask & live_lanes(warp);
  for (int i = kWarpSize - 1; i >= 0; --i)  // lanes mostly come in order
    if ((needed >> i & 1) != 0 && (lanes[i].state != State::kInWarp || lanes[i].mask != mask)) return false;
  uint64_t received[kWarpSize];
  for (int i = 0; i < kWarpSize; ++i)
    if ((needed >> i & 1) != 0)
      received[i] = (needed >> lanes[i].source_lane & 1) != 0 ? lanes[lanes[i].source_lane].value : kPoison;
  for (int i = 0; i < kWarpSize; ++i) {
    if ((needed >> i & 1) == 0) continue;
    lanes[i].value = received[i];
    lanes[i].state = State::kReady;
  }
  return true;
}

void Grid::complete_exchanges_of(int warp) {
  for (Fiber& fiber : fibers_)
    if (fiber.warp == warp && fiber.state == State::kInWarp) complete_exchange(warp, fiber.mask);
}

void Grid::check_progress(bool progress) {
  if (progress) return;
  for (const Fiber& fiber : fibers_) {
    if (fiber.state == State::kDone) continue;
    const bool in_warp = fiber.state == State::kInWarp;
    return fail("deadlock: " + name_of(fiber) + " waits in a " + (in_warp ? "warp operation" : "__syncthreads()") +
                ", last barrier at line " + std::to_string(fiber.line));
  }
}

void Grid::resume(Fiber& fiber) {
  running_ = &fiber;
  context.thread = fiber.index;
  start_switch(&main_fake_stack_, fiber.stack, kStackBytes);
  switch_tsan_fiber(fiber.tsan);
  switch_place(main_, fiber.place);
  finish_switch(main_fake_stack_, nullptr, nullptr);
}

void Grid::suspend(bool for_good) {
  Fiber& fiber = *running_;
  start_switch(for_good ? nullptr : &fiber.asan_fake_stack, main_stack_, main_stack_bytes_);
  switch_tsan_fiber(main_tsan_);
  switch_place(fiber.place, main_);
  finish_switch(fiber.asan_fake_stack, &main_stack_, &main_stack_bytes_);
}

void Grid::fiber_main() {
  finish_switch(nullptr, &main_stack_, &main_stack_bytes_);
  acquire(&launched_);
  body_(argument_);
  release(&finished_);
  running_->state = State::kDone;
  suspend(true);
  std::abort();
}

void Grid::sync_threads(const char* file, int line) {
  Fiber& fiber = *running_;
  fiber.file = file;
  fiber.line = line;
  fiber.state = State::kAtBarrier;
  void* const key = &barrier_keys_[2 * block_ + barrier_phase_ % 2];
  release(key);
  suspend(false);
  acquire(key);
}

uint64_t Grid::exchange(unsigned mask, uint64_t value, int source_lane) {
  Fiber& fiber = *running_;
  if ((mask >> fiber.lane & 1) == 0) fail_on_fiber(name_of(fiber) + " is not in the mask of its own warp operation");
  fiber.mask = mask;
  fiber.value = value;
  fiber.source_lane = source_lane;
  fiber.state = State::kInWarp;
  if (!complete_exchange(fiber.warp, mask)) suspend(false);
  return fiber.value;
}

void* Grid::shared_array(const char* file, int line, size_t bytes) {
  size_t total = bytes;
  for (const SharedArray& array : shared_) {
    if (array.line == line && std::strcmp(array.file, file) == 0) return array.data;
    total += array.bytes;
  }
  if (total > kMaxSharedBytes) fail_on_fiber("more than 48 KiB of static shared memory");
  ignore_writes(true);  // making it is no write by whichever thread comes first
  void* const data = std::malloc(bytes);
  std::memset(data, 0xff, bytes);  // NaN: a read before a write shows
  ignore_writes(false);
  shared_.push_back({file, line, bytes, data});
  return data;
}

void Grid::thread_fence() {
  release(&fence_);
  acquire(&fence_);
}

void Grid::fail_on_fiber(const std::string& what) {
  fail(what);
  suspend(true);
  std::abort();
}

void Grid::fail(const std::string& what) {
  if (error_.empty()) error_ = what;
}

size_t Grid::count(State state) const {
  return std::count_if(fibers_.begin(), fibers_.end(), [state](const Fiber& f) { return f.state == state; });
}

unsigned Grid::live_lanes(int warp) const {
  const size_t first = static_cast<size_t>(warp) * kWarpSize;
  unsigned lanes = 0;
  for (size_t i = first; i < std::min(first + kWarpSize, fibers_.size()); ++i)
    if (fibers_[i].state != State::kDone) lanes |= 1u << fibers_[i].lane;
  return lanes;
}

std::string Grid::name_of(const Fiber& fiber) {
  return "block " + std::to_string(context.block.x) + " thread " + std::to_string(fiber.index.x);
}

}  // namespace

void run_grid(const char* kernel, dim3 grid, dim3 block, Body body, void* argument) {
  Grid launch(kernel, grid, block, body, argument);
  grid_that_runs = &launch;
  launch.run();
}
void sync_threads(const char* file, int line) { grid_that_runs->sync_threads(file, line); }
void thread_fence() { grid_that_runs->thread_fence(); }
uint64_t exchange(unsigned mask, uint64_t value, int source) { return grid_that_runs->exchange(mask, value, source); }
void* shared_array(const char* file, int line, size_t bytes) { return grid_that_runs->shared_array(file, line, bytes); }
int lane() { return grid_that_runs->lane(); }

}  // namespace megatron_dppo::emulation

// The few runtime calls that the launchers make.
cudaError_t CUDARTAPI cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrL2CacheSize ? 50 << 20 : 132;  // else multiprocessors: both are an H100's
  return cudaSuccess;
}
const char* CUDARTAPI cudaGetErrorString(cudaError_t) { return "the emulated runtime refuses this"; }
